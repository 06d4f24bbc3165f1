"""What an export costs is measured on the export itself: stages, their peaks, what is left."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import pytest

from mmr5_bench.evidence.memory import reset_peak
from mmr5_bench.export_cost import StageCosts, main
from mmr5_export.cli import USAGE
from mmr5_runtime.artifact import read_manifest

ARGUMENTS = ["--model", "mini", "--method", "rtn", "--no-verify", "--backend", "onnxruntime"]
BY_STAGE = reset_peak()


def measured(folder: Path, *first: str) -> dict[str, object]:
    cost = folder / "cost.json"
    assert main([*first, str(cost), *ARGUMENTS, "--output", str(folder / "made" / "engine")]) == 0
    found: dict[str, object] = json.loads(cost.read_bytes())
    return found


def test_stages_and_backends_of_a_real_export_are_there(tmp_path: Path) -> None:
    found = measured(tmp_path)
    assert not list((tmp_path / "made").iterdir())
    assert (found["source"], found["layers"], found["method"]) == ("mini", 4, "rtn")
    seconds, peaks = found["stage_seconds"], found["stage_peak_resident_bytes"]
    assert isinstance(seconds, dict) and isinstance(peaks, dict)
    assert {"hash", "write", "onnxruntime"} <= set(seconds)
    assert found["verified"] == {
        "onnxruntime": "checked by onnx; not executed in this export (--no-verify)"
    }
    if BY_STAGE:
        assert set(peaks) == set(seconds)
        assert found["peak_resident_bytes"] == max(peaks.values())


def test_an_engine_that_is_kept_is_the_one_that_was_measured(tmp_path: Path) -> None:
    found = measured(tmp_path, "--keep")
    assert read_manifest(tmp_path / "made" / "engine").num_bytes == found["engine_bytes"]


@pytest.mark.skipif(not BY_STAGE, reason="the high-water mark is set back through /proc")
def test_a_stage_does_not_answer_for_the_one_before() -> None:
    costs = StageCosts()
    costs("large", 0, 1)
    with mmap.mmap(-1, 64 << 20) as held:  # which goes back at once, whatever malloc would keep
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        costs("large", 1, 1)
    costs("small", 0, 1)
    found = costs.finish()["stage_peak_resident_bytes"]
    assert found["large"] - found["small"] > 60 << 20
    assert found["large"] - found["prepare"] > 60 << 20


@pytest.mark.parametrize("flag", ["--json", "--dry-run"])
def test_what_measures_nothing_is_refused(
    tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main([str(tmp_path / "cost.json"), *ARGUMENTS, "--output", str(tmp_path / "x"), flag])
    assert left.value.code == USAGE and "leave them out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
