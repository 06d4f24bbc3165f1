"""Generated tables: what they show, and that the README's own come from the kept results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmr5_bench.cli import main
from mmr5_bench.readme import accuracy_table, load_document, table_of, write_table

ROOT = Path(__file__).resolve().parents[2]


def _document() -> dict[str, Any]:
    metric = {"value": 0.5, "low": 0.25, "high": 0.75}
    names = ("recall@1", "recall@3", "recall@5", "well_formed", "top1_agreement")
    row = {"pages": 5, "quant": "int4", "cases": 40, "metrics": dict.fromkeys(names, metric)}
    return {
        "kind": "minidocs-accuracy",
        "dtype": "float32",
        "provenance": {"commit": "abc1234"},
        "rows": [row],
    }


def test_table_shows_values_intervals_and_origin() -> None:
    table = accuracy_table(_document())
    assert "| 5 | int4 | 0.500 [0.250, 0.750] |" in table
    assert "40 held-out lists" in table and "abc1234" in table and "float32" in table


def test_only_what_stands_between_the_markers_changes(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- t -->\nold\n<!-- /t -->\nafter\n")
    assert write_table(readme, "t", "new")
    assert readme.read_text() == "before\n<!-- t -->\nnew\n<!-- /t -->\nafter\n"
    assert not write_table(readme, "t", "new")


def test_missing_markers_and_files_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text("nothing here\n")
    (tmp_path / "r.json").write_text(json.dumps(_document()))
    arguments = ["readme", str(tmp_path / "r.json"), "--readme", str(tmp_path / "README.md")]
    assert main(arguments) == 1
    assert "<!-- mini-accuracy -->" in capsys.readouterr().err
    assert main(["readme", str(tmp_path / "absent.json")]) == 1
    assert "absent.json" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("[1]")
    assert main(["readme", str(tmp_path / "other.json")]) == 1
    assert "other.json is no result file" in capsys.readouterr().err


def test_a_document_that_no_table_shows_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"kind": "weather"}))
    with pytest.raises(ValueError, match="weather.*minidocs-accuracy, minidocs-quantization"):
        load_document(tmp_path / "r.json")


@pytest.mark.parametrize(
    "name, page", [("mini-quantization", "README.md"), ("mini-reuse", "docs/reuse.md")]
)
def test_tables_are_those_that_the_results_give(name: str, page: str) -> None:
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    marker, table = table_of(load_document(path))
    assert marker == name
    assert table in (ROOT / page).read_text(encoding="utf-8")
