"""Runs one export again and again, kills it at random moments, resumes it, and compares bytes.

A program of its own: everything is imported once, and every export is a fork of that state, so that
a round costs what the export costs. A moment is a number of finished steps and a random time after
them: moments drawn from the clock alone would nearly all fall into the longest step.

Arguments: checkpoint, calibration data, work folder, quant, rounds. Prints one JSON document: the
hashes of the undisturbed export, and of every round with the journal's last step at the kill.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import llmcompressor.modifiers.gptq.gptq_quantize  # noqa: F401  (its import takes seconds)
import torch

from helpers.exporting import tree_hashes
from mmr5_export import export
from mmr5_export.journal import work_folder
from mmr5_export.options import ExportOptions

STEPS = 6  # answers, embed, three layers, complete
LONGEST_WAIT = 0.3  # about as long as a step of this size takes


def start(checkpoint: Path, data: Path, quant: str, output: Path, resume: bool) -> int:
    """Forks a process that exports; returns its number."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        torch.set_num_threads(1)
        options = ExportOptions(
            calib_data=data,
            calib_samples=5,
            held_out=2,
            max_new_tokens=6,
            response_cache=output.with_suffix(".answers"),
            resume=resume,
        )
        export(checkpoint, quant, output, options)
        status = 0
    finally:
        os._exit(status)


def finish(process: int) -> None:
    """Waits for an export that must succeed."""
    _, status = os.waitpid(process, 0)
    if status:
        sys.exit(f"the export failed with status {status}")


def steps_done(output: Path) -> list[str]:
    """What the journal says was done."""
    journal = work_folder(output) / "journal.jsonl"
    try:
        lines = journal.read_bytes().split(b"\n")[:-1]
    except OSError:  # not there yet, or no longer
        return ["published"] * STEPS if output.is_dir() else []
    return [str(json.loads(line)["step"]) for line in lines]


def kill_after(process: int, output: Path, steps: int, seconds: float) -> None:
    """Kills an export ``seconds`` after it finished so many steps, if it still runs by then."""
    while len(steps_done(output)) < steps and not os.waitpid(process, os.WNOHANG)[0]:
        time.sleep(0.001)
    time.sleep(seconds)
    try:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    except (ProcessLookupError, ChildProcessError):
        pass  # it was faster


def main() -> None:
    checkpoint, data, folder, quant, rounds = sys.argv[1:]
    arguments = Path(checkpoint), Path(data), quant
    undisturbed = Path(folder) / "engine"
    finish(start(*arguments, undisturbed, False))
    results, rng = [], random.Random(7)
    for number in range(int(rounds)):
        output = Path(folder) / f"round-{number}" / "engine"
        output.parent.mkdir()
        process = start(*arguments, output, False)
        kill_after(process, output, number % (STEPS + 1), rng.uniform(0, LONGEST_WAIT))
        step = (steps_done(output) or ["nothing"])[-1]
        if not output.is_dir() or work_folder(output).is_dir():
            finish(start(*arguments, output, True))
        left = sorted(path.name for path in output.parent.iterdir())
        results.append({"step": step, "hashes": tree_hashes(output), "left": left})
        shutil.rmtree(output.parent)
    print(json.dumps({"undisturbed": tree_hashes(undisturbed), "rounds": results}))


if __name__ == "__main__":
    main()
