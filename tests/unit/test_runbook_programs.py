"""The programs of the runbook: ended whole, in an environment of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmr5_bench.runbook.bounded import (
    TAIL_COLUMNS,
    TAIL_LINES,
    last_lines,
    run_bounded,
    terminations_interrupt,
)
from mmr5_bench.runbook.environment import nvidia_smi
from mmr5_bench.runbook.session import environment

ROOT = Path(__file__).parents[2]
HUNG = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)"


def test_nothing_is_left_of_a_program_that_refuses_to_end(tmp_path: Path) -> None:
    # It starts a program of its own, which refuses as well.
    child = f"{HUNG}; time.sleep(60)"
    code = (
        f"{HUNG}; import subprocess, sys; "
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        "print(p.pid, flush=True); time.sleep(60)"
    )
    log = tmp_path / "log"
    ending = run_bounded(
        [sys.executable, "-c", code],
        seconds=2.0,
        log=log,
        cwd=tmp_path,
        env=os.environ,
        grace=0.3,
    )
    assert ending.timed_out and ending.rc == -signal.SIGKILL
    pid = int(next(line for line in log.read_text().split() if line.isdigit()))
    for _ in range(100):
        if not _runs(pid):
            return
        time.sleep(0.05)
    raise AssertionError("the program's own child is still there")


def _runs(pid: int) -> bool:
    """Whether a process is there and no zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_end_of_a_long_output_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"\xff\n\n" + b"".join(b"%d " % i + b"x" * 5000 + b"\n" for i in range(40)))
    lines = last_lines(log)
    assert len(lines) <= TAIL_LINES and lines[-1].startswith("39 xxx")
    assert all(len(line) <= TAIL_COLUMNS + 4 for line in lines)


def test_programs_find_this_checkout_and_no_network() -> None:
    made = environment(ROOT, {"PYTHONPATH": "/elsewhere", "HOME": "/root"})
    code = "import mmr5_bench, mmr5_export, mmr5_kernels, mmr5_runtime, helpers; import os;"
    code += "print(os.environ['HF_HUB_OFFLINE'], mmr5_kernels.__path__[0])"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=made
    ).stdout
    assert shown.split() == ["1", str(ROOT / "kernels" / "mmr5_kernels")]
    assert made["PYTHONPATH"].endswith("/elsewhere") and made["HOME"] == "/root"


@pytest.mark.parametrize(("line", "shown"), [("' '", ""), ("'a, b'", "a, b")])
def test_the_driver_may_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, shown: str
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho {line}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert nvidia_smi() == shown


def test_reuse_without_a_gpu_is_one_line(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "gpu" / "reuse_7b.py"
    made = environment(ROOT, {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    done = subprocess.run(
        [sys.executable, str(script), "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env=made,
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and "error: there is no CUDA device" in done.stderr


def test_a_termination_interrupts_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), terminations_interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == before
