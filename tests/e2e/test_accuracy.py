"""The accuracy run: its arithmetic on made-up results, and one real run from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.exporting import quick_export
from mmr5_bench.accuracy import summarise
from mmr5_bench.cli import main
from mmr5_bench.minidocs.lists import PageKey, RerankCase
from mmr5_runtime import RerankResult, Usage


def _case(gold: set[int]) -> RerankCase:
    pages = tuple(PageKey(topic=i, kind=0, seed=i) for i in range(4))
    grades = tuple(2 if i in gold else 0 for i in range(4))
    return RerankCase("q", 0, 0, pages, grades)


def _result(*order: int, status: str = "ok") -> RerankResult:
    return RerankResult(
        order=order,
        status=status,  # type: ignore[arg-type]
        stop_reason="eos",
        text="",
        reasoning="",
        usage=Usage(1, 1, 1, 4),
    )


def test_summary_by_hand() -> None:
    cases = [_case({0}), _case({1}), _case({2, 3}), _case({3})]
    results = [
        _result(0, 1, 2, 3),
        _result(0, 1, 2, 3, status="fallback"),
        _result(2, 0, 1, 3),
        _result(1, 0, 2, 3, status="repaired"),
    ]
    reference = [results[0], results[0], results[2], results[2]]
    metrics = summarise(cases, results, reference)["quality"]
    assert metrics.pop("cases") == 4
    assert metrics["recall@1"]["value"] == (1 + 0 + 0.5 + 0) / 4
    assert metrics["recall@3"]["value"] == (1 + 1 + 0.5 + 0) / 4
    assert metrics["recall@5"]["value"] == 1.0
    assert metrics["macro_recall@3"]["value"] == pytest.approx(2.5 / 4)  # all of one kind
    assert metrics["mrr"]["value"] == (1 + 1 / 2 + 1 + 1 / 4) / 4
    assert [metrics[s]["value"] for s in ("ok", "repaired", "fallback")] == [0.5, 0.25, 0.25]
    assert metrics["top1_agreement"]["value"] == 0.75
    assert all(m["low"] <= m["value"] <= m["high"] for m in metrics.values())


def test_run_writes_every_order(
    tiny_engine: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results" / "accuracy.json"
    engines = [str(tiny_engine("bf16")), str(tiny_engine("int4"))]
    options = ["--pages", "2", "--cases", "1", "--jobs", "1", "-o", str(output)]
    assert main(["accuracy", *engines, *options]) == 0
    document = json.loads(output.read_text())
    rows = document["qualities"]
    assert [row["axes"]["quant"] for row in rows] == ["bf16", "int4"]
    assert all(sorted(row["records"][0]["order"]) == [0, 1] for row in rows)
    assert rows[0]["quality"]["top1_agreement"]["value"] == 1.0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["qualities"][0]["records"] is None


def test_missing_engine_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["accuracy", str(tmp_path / "none"), "--jobs", "1", "-o", str(tmp_path / "r.json")]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("mmr5-bench: error: ") and error.count("\n") == 1
    assert not (tmp_path / "r.json").exists()


def test_engines_that_read_other_pixels_are_not_compared(
    tiny_engine: Callable[[str], Path],
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other"
    quick_export(str(tiny_checkpoint), "bf16", other, max_pixels=28 * 28 * 8)
    engines = [str(tiny_engine("bf16")), str(other)]
    output = tmp_path / "accuracy.json"
    assert main(["accuracy", *engines, "--pages", "2", "--cases", "1", "-o", str(output)]) == 1
    assert "has another pixel budget than" in capsys.readouterr().err and not output.exists()
