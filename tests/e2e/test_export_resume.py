"""A calibrated export, killed at random moments and resumed, gives the very same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import kill_export
from helpers.exporting import write_samples

ROUNDS = 21


@pytest.mark.slow
def test_killed_and_resumed_exports_are_byte_identical(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "data", 8)
    work = tmp_path / "work"
    work.mkdir()
    script = Path(str(kill_export.__file__))
    arguments = [str(tiny_checkpoint), str(data), str(work), "int4", str(ROUNDS)]
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={"PYTHONPATH": str(script.parents[1]), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    expected = document["undisturbed"]
    assert "mmr5_engine.json" in expected and "report.json" in expected
    assert len(document["rounds"]) == ROUNDS
    for number, found in enumerate(document["rounds"]):
        assert found["hashes"] == expected, f"round {number}, killed after {found['step']}"
        assert found["left"] in (["engine", "engine.answers"], ["engine"]), found["step"]
    cut = [found["step"] for found in document["rounds"] if found["step"] != "published"]
    assert len(set(cut)) >= 3, f"the kills did not spread over the steps: {cut}"
