"""A calibrated export, killed at random moments and resumed, gives the very same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import kill_export
from helpers.exporting import tree_hashes, write_samples
from mmr5_export import export
from mmr5_export.options import ExportOptions
from mmr5_runtime.types import ExportError

# Steps: answering, answers, embed, three layers, complete; of mixed recipes also sensitivity.
CASES: dict[str, dict[str, Any]] = {
    "plain": {"quant": "int4", "steps": 7, "rounds": 16},
    "mixed, with a checkpoint": {
        "quant": "int4-mixed",
        "steps": 8,
        "rounds": 11,
        "options": {"bits": 5.5},
        "checkpoint_out": True,
    },
    "with other engines": {
        "quant": "int4",
        "steps": 7,
        "rounds": 7,
        "options": {
            "backend": ["onnxruntime", "tensorrt-llm"],
            "trt_target": ["llm-api", "onnx"],
            "max_pixels": 37632,
        },
    },
    "rejected": {"quant": "int4", "steps": 7, "rounds": 9, "rejects": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_exports_are_byte_identical(
    tiny_checkpoint: Path, tmp_path: Path, name: str
) -> None:
    case = {"options": {}, "checkpoint_out": False, "rejects": False, **CASES[name]}
    case["data"] = str(write_samples(tmp_path / "data", 8))
    work = tmp_path / "work"
    work.mkdir()
    script = Path(str(kill_export.__file__))
    arguments = json.dumps({**case, "checkpoint": str(tiny_checkpoint), "folder": str(work)})
    done = subprocess.run(
        [sys.executable, str(script), arguments],
        env={"PYTHONPATH": str(script.parents[1]), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    expected, engine = document["undisturbed"], "engine.rejected" if case["rejects"] else "engine"
    assert "mmr5_engine.json" in expected and "report.json" in expected
    assert ("checkpoint/config.json" in expected) == case["checkpoint_out"]
    assert len(document["rounds"]) == case["rounds"]
    for number, found in enumerate(document["rounds"]):
        assert found["hashes"] == expected, f"round {number}, killed after {found['step']}"
        beside = ["checkpoint"] if case["checkpoint_out"] else []
        assert found["left"] == [*beside, engine], found["step"]
    cut = [found["step"] for found in document["rounds"] if found["step"] != "over"]
    assert len(set(cut)) >= 3, f"the kills did not spread over the steps: {cut}"


def test_a_hidden_state_that_was_altered_is_noticed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    options: dict[str, Any] = {
        "calib_data": write_samples(tmp_path / "data", 3),
        "method": "rtn",
        "held_out": 2,
        "max_new_tokens": 4,
        "response_cache": tmp_path / "answers.jsonl",
    }
    output = tmp_path / "engine"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("mmr5_export.pipeline.make_engine", cut)
        export(tiny_checkpoint, "int4", output, ExportOptions(**options))
    (state, _) = sorted((tmp_path / "engine.partial-work" / "hidden").rglob("*.safetensors"))
    whole = state.read_bytes()
    state.write_bytes(whole[:-2] + bytes(2))  # still a file of the right size and form
    assert state.read_bytes() != whole
    before = tree_hashes(tmp_path)
    with pytest.raises(ExportError, match=r"00000\.safetensors was altered; .*--force"):
        export(tiny_checkpoint, "int4", output, ExportOptions(**options, resume=True))
    state.write_bytes(whole)
    assert before.keys() <= tree_hashes(tmp_path).keys()  # nothing was thrown away
    export(tiny_checkpoint, "int4", output, ExportOptions(**options, resume=True))
    assert output.is_dir() and not (tmp_path / "engine.partial-work").exists()
