"""One program under a time bound: its output in a file, nothing of it left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

GRACE_SECONDS = 10.0  # between asking a program to end and ending it
TAIL_LINES, TAIL_COLUMNS = 15, 300
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Ending:
    """How a program ended: exit status (negative: the signal), seconds, whether time was over."""

    rc: int
    seconds: float
    timed_out: bool


def run_bounded(
    command: Sequence[str],
    *,
    seconds: float,
    log: Path,
    cwd: Path,
    env: Mapping[str, str],
    grace: float = GRACE_SECONDS,
) -> Ending:
    """Runs ``command`` for at most ``seconds``, then SIGTERM and, after ``grace``, SIGKILL.

    Both outputs go to ``log``. The signals are for everything that the program started in its
    process group, and what is left of the group when it ends is killed. An interruption of this
    process ends the program in the same way before it goes on. OSError when it cannot be started.
    """
    began = time.perf_counter()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=dict(env),
            process_group=0,
        )
        timed_out = False
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _end(process, grace)
    return Ending(process.returncode, time.perf_counter() - began, timed_out)


def last_lines(log: Path) -> list[str]:
    """The end of a program's output, without blank lines, long ones cut."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()][-TAIL_LINES:]
    return [line if len(line) <= TAIL_COLUMNS else f"{line[:TAIL_COLUMNS]} ..." for line in lines]


@contextmanager
def terminations_interrupt() -> Iterator[None]:
    """Inside, SIGTERM arrives as Ctrl-C does, and Ctrl-C also where a shell has switched it off."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes], grace: float) -> None:
    if process.poll() is None:
        _signal(process, signal.SIGTERM)
        try:
            process.wait(timeout=grace)
        except subprocess.TimeoutExpired:
            pass
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):  # nobody of the group is left
        pass
