"""``mmr5-bench latency`` on tiny random engines: one document, kept on errors, clear refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mmr5_bench.cli import main
from mmr5_bench.evidence.document import load_evidence

SMALL = ["--pages", "2", "--lists", "2", "--warmup", "1", "--max-new-tokens", "4", "--ceilings=0"]


def test_measures_the_product_of_the_axes(
    tiny_engine: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deep" / "latency.json"
    engines = [f"plain={tiny_engine('bf16')}", f"small={tiny_engine('int4')}"]
    arguments = ["latency", *engines, *SMALL, "--cache", "cold,seen", "--title", "Of a test"]
    assert main([*arguments, "-o", str(output)]) == 0
    evidence = load_evidence(output)
    axes = [(entry["axes"]["quant"], entry["axes"]["cache"]) for entry in evidence["entries"]]
    assert axes == [(quant, cache) for quant in ("plain", "small") for cache in ("cold", "seen")]
    assert all(len(entry["samples_ms"]) == 2 for entry in evidence["entries"])
    assert evidence["title"] == "Of a test" and "ceilings" not in evidence
    assert evidence["provenance"]["command"].startswith("mmr5-bench")
    last = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert [entry["name"] for entry in last["entries"]] == [e["name"] for e in evidence["entries"]]
    assert output.with_suffix(".jsonl").is_file()


def test_nothing_measured_is_one_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "latency.json"
    assert main(["latency", str(tmp_path / "absent"), *SMALL, "-o", str(output)]) == 1
    captured = capfd.readouterr()
    assert "there is no engine in" in captured.err and "nothing was measured" in captured.err
    assert captured.out == "" and not output.exists()
