"""Runs one export again and again, kills it at random moments, resumes it, and compares bytes.

A program of its own: everything is imported once, and every export is a fork of that state, so that
a round costs what the export costs. A moment is a number of finished steps and a random time after
them: moments drawn from the clock alone would nearly all fall into the longest step.

One argument, a JSON object: ``checkpoint``, ``data``, ``folder`` to work in, ``quant``, ``rounds``,
``steps`` that the export takes, further ``options``, whether to write a ``checkpoint_out``, and
whether verification ``rejects`` the engine. Prints one JSON document: the hashes of the undisturbed
export, and of every round with the journal's last step at the kill.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llmcompressor.modifiers.gptq.gptq_quantize  # noqa: F401  (its import takes seconds)
import torch

from helpers.exporting import tree_hashes
from mmr5_export import export, publish
from mmr5_export.agreement import VerificationFailed
from mmr5_export.evaluate import Evaluation
from mmr5_export.job import Job
from mmr5_export.journal import resumable, work_folder
from mmr5_export.options import ExportOptions
from mmr5_export.places import rejected_folder

LONGEST_WAIT = 0.3  # about as long as a step of this size takes
LONGEST_ENDING = 0.01  # and the time from the last step to the end
PUBLISHED, REJECTED = 0, 5


@dataclass(frozen=True)
class Case:
    """One export, and how often to kill it."""

    checkpoint: str
    data: str
    folder: str
    quant: str
    rounds: int
    steps: int
    options: dict[str, Any]
    checkpoint_out: bool
    rejects: bool

    @property
    def status(self) -> int:
        return REJECTED if self.rejects else PUBLISHED

    def made(self, output: Path) -> Path:
        """Where the engine appears."""
        return rejected_folder(output) if self.rejects else output


def reject(job: Job, evaluation: Evaluation | None) -> str:
    """Stands for a verification that finds the engine wanting: answers of six tokens never do."""
    return "the engine is worse than asked; ask for less."


def start(case: Case, output: Path, resume: bool) -> int:
    """Forks a process that exports; returns its number."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        torch.set_num_threads(1)
        options = dict(case.options)
        if case.rejects:
            vars(publish)["verdict"] = reject
            options["min_top1_agreement"] = 1.0
        if case.checkpoint_out:
            options["checkpoint_out"] = output.with_name("checkpoint")
        settings = ExportOptions(
            calib_data=Path(case.data),
            calib_samples=5,
            held_out=2,
            max_new_tokens=6,
            response_cache=output.with_suffix(".answers"),
            resume=resume,
            **options,
        )
        export(case.checkpoint, case.quant, output, settings)
        status = PUBLISHED
    except VerificationFailed:
        status = REJECTED
    finally:
        os._exit(status)


def finish(case: Case, output: Path, resume: bool) -> None:
    """An export that must end as the case says."""
    _, status = os.waitpid(start(case, output, resume), 0)
    if os.waitstatus_to_exitcode(status) != case.status:
        sys.exit(f"the export ended with status {status}, resumed: {resume}")


def steps_done(case: Case, output: Path) -> list[str]:
    """What the journal says was done."""
    journal = work_folder(output) / "journal.jsonl"
    try:
        lines = journal.read_bytes().split(b"\n")[:-1]
    except OSError:  # not there yet, or no longer
        return ["over"] * case.steps if case.made(output).is_dir() else []
    return [str(json.loads(line)["step"]) for line in lines]


def kill_after(case: Case, process: int, output: Path, steps: int, seconds: float) -> None:
    """Kills an export ``seconds`` after it finished so many steps, if it still runs by then."""
    while len(steps_done(case, output)) < steps and not os.waitpid(process, os.WNOHANG)[0]:
        time.sleep(0.001)
    time.sleep(seconds)
    try:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    except (ProcessLookupError, ChildProcessError):
        pass  # it was faster


def hashes(case: Case, output: Path) -> dict[str, str]:
    """Every file of the engine, and of the checkpoint where there is to be one."""
    found = tree_hashes(case.made(output))
    if case.checkpoint_out:
        beside = tree_hashes(output.with_name("checkpoint"))
        found |= {f"checkpoint/{name}": value for name, value in beside.items()}
    return found


def one_round(case: Case, output: Path, number: int, rng: random.Random) -> dict[str, Any]:
    """One export, killed and resumed."""
    output.parent.mkdir()
    steps = number % (case.steps + 1)
    longest = LONGEST_ENDING if steps == case.steps else LONGEST_WAIT
    kill_after(case, start(case, output, False), output, steps, rng.uniform(0, longest))
    step = (steps_done(case, output) or ["nothing"])[-1]
    work = work_folder(output)
    if resumable(work) or not case.made(output).is_dir():
        finish(case, output, True)
    else:
        shutil.rmtree(work, ignore_errors=True)  # over; only the cleaning up was cut off
    left = sorted(path.name for path in output.parent.iterdir() if path.suffix != ".answers")
    return {"step": step, "hashes": hashes(case, output), "left": left}


def main() -> None:
    case = Case(**json.loads(sys.argv[1]))
    undisturbed = Path(case.folder) / "undisturbed" / "engine"
    undisturbed.parent.mkdir()
    finish(case, undisturbed, False)
    rounds, rng = [], random.Random(7)
    for number in range(case.rounds):
        output = Path(case.folder) / f"round-{number}" / "engine"
        rounds.append(one_round(case, output, number, rng))
        shutil.rmtree(output.parent)
    print(json.dumps({"undisturbed": hashes(case, undisturbed), "rounds": rounds}))


if __name__ == "__main__":
    main()
