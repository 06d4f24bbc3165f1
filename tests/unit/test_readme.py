"""Generated tables: what they show, and that the README's own come from the kept results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmr5_bench.cli import main
from mmr5_bench.evidence.document import Entry, Evidence, QualityRow, new_evidence
from mmr5_bench.evidence.observe import entry_of, observation, work_id
from mmr5_bench.evidence.statistics import Interval
from mmr5_bench.readme import load_document, table_of, write_table
from mmr5_runtime.types import RerankResult, Usage

ROOT = Path(__file__).resolve().parents[2]
RESULT = RerankResult((0,), "ok", "eos", "", "", Usage(9, 6, 3, 2), first_token_ms=40.0)


def _document() -> Evidence:
    """Accuracy of one engine; nothing was timed."""
    metric: Interval = {"value": 0.5, "low": 0.25, "high": 0.75}
    names = ("recall@1", "recall@3", "recall@5", "macro_recall@1", "ok", "top1_agreement")
    document = new_evidence("Accuracy", "Of mini.", {"host_cpu": "x", "threads": 1})
    document["provenance"]["commit"] = "abc1234"
    row: QualityRow = {
        "subject": "int4-gptq (int4)",
        "dataset": "MiniDocs",
        "axes": {"pages": 5},
        "quality": {"cases": 40, **dict.fromkeys(names, metric)},
    }
    document["qualities"] = [row]
    return document


def _timed(subject: str, **more: Any) -> Entry:
    axes = {"pages": 5, "quant": "int4", "cache": "cold", "stop": "eos", "think": "full"}
    seen = [observation(ms, RESULT) for ms in (100.0, 200.0)]
    entry = entry_of("rerank", subject, axes, work_id(1), seen, warmup=0)
    return {**entry, **more}  # type: ignore[typeddict-item]


def test_table_shows_values_intervals_and_origin() -> None:
    name, table = table_of(_document(), "mini-accuracy")
    assert name == "mini-accuracy"
    assert "| int4-gptq (int4) | 5 | 40 | 0.500 [0.250, 0.750] |" in table
    assert "Of mini." in table and "abc1234" in table


def test_a_latency_table_has_a_row_per_cell() -> None:
    document = {**_document(), "entries": [_timed("ours int4")]}
    table = table_of(document, "mini-latency")[1]
    assert "| 5 | int4 | cold | eos | full | 150 [100, 200] | 195 [100, 200] | 40 |" in table
    assert "2 lists per row" in table


def test_a_peers_table_has_ratios_to_the_baseline() -> None:
    ratio = {"value": 0.5, "low": 0.4, "high": 0.6}
    share = {"value": 1.0, "low": 0.9, "high": 1.0}
    ours = _timed("ours", ratios={"p50": ratio, "p95": ratio}, quality={"identical": share})
    table = table_of({**_document(), "entries": [_timed("transformers"), ours]}, "mini-peers")[1]
    assert "| 5 | transformers | 150 [100, 200] | 195 [100, 200] | 40 | 1 | 1 |  |  |" in table
    assert "| 0.50 [0.40, 0.60] | 0.50 [0.40, 0.60] | 100 % [90, 100] |  |" in table


def test_nothing_measured_has_no_table() -> None:
    with pytest.raises(ValueError, match="no entries"):
        table_of({**_document(), "qualities": []}, "x")


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
    assert "<!-- r -->" in capsys.readouterr().err
    assert main(["readme", str(tmp_path / "absent.json")]) == 1
    assert "absent.json" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("[1]")
    assert main(["readme", str(tmp_path / "other.json")]) == 1
    assert "other.json is no result file" in capsys.readouterr().err


def test_a_document_that_no_table_shows_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"kind": "weather"}))
    with pytest.raises(ValueError, match="weather.*mmr5-evidence, minidocs-quantization"):
        load_document(tmp_path / "r.json")


@pytest.mark.parametrize(
    "name, page",
    [
        ("mini-quantization", "README.md"),
        ("mini-latency", "README.md"),
        ("mini-peers", "README.md"),
        ("backends-cpu", "README.md"),
        ("backends-mini", "docs/onnxruntime.md"),
        ("mini-reuse", "docs/reuse.md"),
    ],
)
def test_tables_are_those_that_the_results_give(name: str, page: str) -> None:
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    marker, table = table_of(load_document(path), path.stem)
    assert marker == name
    assert table in (ROOT / page).read_text(encoding="utf-8")
