"""What an unfinished export has done so far, so that it can be killed at any moment and go on.

The work folder lies beside the output, under a name that readers refuse::

    job.json        what the export was asked for and on what it runs
    journal.jsonl   one line per finished step, in order; the last may be torn
    lock            held by the process at work
    steps/          the tensors a finished step gave, named in its line with their sha256
    hidden/         hidden states between two layers
    engine/         the engine folder in the making

A step counts as done when its line is in the journal, and the line is written after everything it
speaks of is on the disk. What a killed step left is overwritten by the next attempt. Every step is
a function of the job and of the steps before, so the result does not depend on interruptions.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmr5_runtime.artifact import file_sha256, work_name
from mmr5_runtime.types import ExportError

_JOB, _JOURNAL, _LOCK, _STEPS = "job.json", "journal.jsonl", "lock", "steps"


def work_folder(output: Path) -> Path:
    """Where the export of ``output`` works."""
    output = output.absolute()
    return output.with_name(work_name(output.name))


class Journal:
    """Finished steps of one export, by name; opened with :func:`open_journal`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._steps: dict[str, dict[str, Any]] = {}

    def done(self, step: str) -> bool:
        """Whether ``step`` is finished."""
        return step in self._steps

    def result(self, step: str) -> Any:
        """What was recorded with a finished step."""
        return self._steps[step]["result"]

    def tensors(self, step: str) -> dict[str, Tensor]:
        """The tensors of a finished step.

        Raises :class:`ExportError` when they are no longer what was written.
        """
        path = self._file(step)
        try:
            if file_sha256(path) != self._steps[step]["sha256"]:
                raise ExportError(f"{path} was altered; start the export over with --force.")
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise ExportError(
                f"{path} cannot be read back ({error}); start the export over with --force."
            ) from error

    def finish(self, step: str, result: Any, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Brings the tensors of a step to the disk, then its line."""
        line: dict[str, Any] = {"step": step, "result": result}
        if tensors is not None:
            path = self._file(step)
            path.parent.mkdir(exist_ok=True)
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)
            _sync(path)
            line["sha256"] = file_sha256(path)
        text = json.dumps(line, allow_nan=False)
        with (self.folder / _JOURNAL).open("a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        # As it reads back: a resumed export must not see a tuple where the first run saw a list.
        self._steps[step] = json.loads(text)

    def read(self) -> None:
        """Takes over the lines on disk; a torn last one is dropped, in the file too."""
        path = self.folder / _JOURNAL
        whole = b""
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            if not line.endswith(b"\n"):
                break
            entry = json.loads(line)
            self._steps[entry["step"]] = entry
            whole += line
        path.write_bytes(whole)

    def _file(self, step: str) -> Path:
        return self.folder / _STEPS / f"{step}.safetensors"


@contextmanager
def open_journal(
    folder: Path, job: Mapping[str, Any], *, resume: bool, discard: bool
) -> Iterator[Journal]:
    """The journal of ``folder`` for ``job``, whose values ``json`` can write.

    ``resume`` goes on with an export that was cut off, if it had the same job; ``discard`` throws
    it away. The folder is removed when the block succeeds, or fails before its first step; else it
    stays for ``resume``.

    Raises :class:`ExportError` when another process works there, when there is something to resume
    and neither was asked for, and when the job changed (naming what).
    """
    job = json.loads(json.dumps(job))
    if folder.is_dir() and discard and not resume:
        with _locked(folder):
            _clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        journal = Journal(folder)
        path = folder / _JOB
        if path.exists():
            _check_job(folder, job, resume)
            journal.read()
        else:
            _clear(folder)
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(job, indent=1, sort_keys=True), encoding="utf-8")
            unfinished.rename(path)
        try:
            yield journal
        except BaseException:
            if not journal._steps:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        # In this order a kill in between leaves a journal that says all is done, or nearly nothing.
        _clear(folder, first=(_STEPS, "hidden", "engine", _JOB))
        shutil.rmtree(folder)


def _check_job(folder: Path, job: Mapping[str, Any], resume: bool) -> None:
    if not resume:
        raise ExportError(
            f"{folder} holds an export that was cut off; go on with --resume or start over with "
            "--force."
        )
    before = json.loads((folder / _JOB).read_text(encoding="utf-8"))
    keys = sorted(before.keys() | job.keys())
    changed = [key for key in keys if before.get(key) != job.get(key)]
    if changed:
        was = "; ".join(f"{key} was {_brief(before.get(key))}" for key in changed[:3])
        raise ExportError(
            f"{folder} cannot be resumed because {was} and is now "
            f"{', '.join(_brief(job.get(key)) for key in changed[:3])}; repeat the command as it "
            "was or start over with --force."
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / _LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ExportError(
                f"another export works in {folder}; wait for it or choose another --output."
            ) from error
        yield


def _clear(folder: Path, first: Sequence[str] = ()) -> None:
    """Empties a work folder, all but the lock that is held on it; some things before others."""
    for path in (*(folder / name for name in first), *folder.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
