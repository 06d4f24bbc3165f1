"""How the command shows that it is at work: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from mmr5_export.assemble import Progress

_STAGES = {
    "hash": "hashing the checkpoint",
    "check": "checking the weights",
    "respond": "writing calibration answers",
    "sensitivity": "measuring sensitivity",
    "layer": "quantizing layers",
    "write": "writing tensors",
    "verify": "verifying",
    "onnxruntime": "writing for ONNX Runtime",
    "engine": "writing for TensorRT-LLM engines",
    "llm-api": "writing for TensorRT-LLM's LLM API",
    "onnx": "writing for TensorRT",
}
_QUIET_SECONDS = 30.0  # a short run stays silent, and a long one says something about this often


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """A rich progress bar on a terminal where rich is installed, lines on stderr elsewhere."""
    if not sys.stderr.isatty():
        yield progress_lines(sys.stderr)
        return
    try:
        from rich import progress as columns
        from rich.console import Console
    except ImportError:
        yield progress_lines(sys.stderr)
        return
    bar = columns.Progress(
        columns.TextColumn("{task.description}"),
        columns.BarColumn(),
        columns.MofNCompleteColumn(),
        columns.TimeElapsedColumn(),
        columns.TimeRemainingColumn(),
        columns.TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        tasks: dict[str, columns.TaskID] = {}

        def show(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(_STAGES[stage], total=total, note=note)
            bar.update(tasks[stage], completed=done, total=total, note=note)

        yield show


def progress_lines(stream: TextIO, clock: Callable[[], float] = time.monotonic) -> Progress:
    """Writes a line for every finished stage and layer of a run that takes longer than 30 seconds.

    Between those, whatever the stage, one line per 30 seconds. ``clock`` gives seconds.
    """
    started = last = clock()

    def show(stage: str, done: int, total: int, note: str = "") -> None:
        nonlocal last
        now = clock()
        finished = done == total or (stage == "layer" and done > 0)
        if now - started < _QUIET_SECONDS or not (finished or now - last >= _QUIET_SECONDS):
            return
        last = now
        minutes = f"{(now - started) / 60:.0f} min"
        words = [f"mmr5-export: {_STAGES[stage]}: {done} of {total}", minutes, note]
        print(", ".join(filter(None, words)), file=stream, flush=True)

    return show
