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

A folder without job.json holds nothing to go on from: that file is the last one a new export
brings to the disk before its first step, and the first one that goes when the export is over.
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
from safetensors.torch import load_file
from torch import Tensor

from mmr5_export.changes import changes
from mmr5_export.write import save_tensors, sync
from mmr5_runtime.artifact import file_sha256, work_name
from mmr5_runtime.types import CheckpointError, ExportError

_JOB, _JOURNAL, _LOCK, _STEPS = "job.json", "journal.jsonl", "lock", "steps"
_NAMED = 4  # differences between two jobs that a message spells out


def work_folder(output: Path) -> Path:
    """Where the export of ``output`` works."""
    output = output.absolute()
    return output.with_name(work_name(output.name))


def resumable(folder: Path) -> bool:
    """Whether a work folder holds an export to go on with."""
    return (folder / _JOB).is_file()


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

    def hidden(self, step: str) -> dict[str, list[str]]:
        """sha256 of the hidden states that a finished step wrote, by stage."""
        hashes: dict[str, list[str]] = self._steps[step].get("hidden", {})
        return hashes

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

    def finish(
        self,
        step: str,
        result: Any,
        tensors: Mapping[str, Tensor] | None = None,
        hidden: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Brings the tensors of a step to the disk, then its line.

        ``hidden`` are the sha256 of states that are there already, by stage. Raises ``OSError``
        when the disk refuses; the step is then not finished.
        """
        line: dict[str, Any] = {"step": step, "result": result}
        if hidden is not None:
            line["hidden"] = dict(hidden)
        if tensors is not None:
            path = self._file(step)
            path.parent.mkdir(exist_ok=True)
            line["sha256"] = save_tensors(path, tensors)
            sync(path.parent)
        text = json.dumps(line, allow_nan=False)
        with (self.folder / _JOURNAL).open("a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync(self.folder)
        # As it reads back: a resumed export must not see a tuple where the first run saw a list.
        self._steps[step] = json.loads(text)

    def read(self) -> None:
        """Takes over the lines on disk; a torn last one is dropped, in the file too.

        Nothing else is ever rewritten: a kill in here costs nothing either. Raises
        :class:`ExportError` for a whole line that cannot be read.
        """
        path = self.folder / _JOURNAL
        if not path.exists():
            return
        content = path.read_bytes()
        *lines, torn = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                _ = entry["result"]
                self._steps[entry["step"]] = entry
            except (ValueError, KeyError, TypeError) as error:
                raise ExportError(
                    f"line {number} of {path} is damaged ({error!r}); start the export over with "
                    "--force."
                ) from error
        if torn:
            os.truncate(path, len(content) - len(torn))
            sync(path)

    def _file(self, step: str) -> Path:
        return self.folder / _STEPS / f"{step}.safetensors"


@contextmanager
def open_journal(
    folder: Path, job: Mapping[str, Any], *, resume: bool, discard: bool
) -> Iterator[Journal]:
    """The journal of ``folder`` for ``job``, whose values ``json`` can write.

    ``resume`` goes on with an export that was cut off, if it had the same job; ``discard`` throws
    it away. The folder is removed when the block succeeds, fails before its first step, or fails
    for its checkpoint, which no second attempt mends; else it stays for ``resume``.

    Raises :class:`ExportError` when another process works there, when there is something to resume
    and neither was asked for, when the job changed (naming what), and when what is there is
    damaged.
    """
    job = json.loads(json.dumps(job))
    if folder.is_dir() and discard and not resume:
        with _locked(folder):
            _clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        journal = Journal(folder)
        if resumable(folder):
            _check_job(folder, job, resume)
            journal.read()
        else:
            _clear(folder)
            _write_job(folder, job)
        try:
            yield journal
        except BaseException as error:
            if not journal._steps or isinstance(error, CheckpointError):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        # A kill before the job goes leaves a journal that says how the export ended.
        _clear(folder, first=(_STEPS, "hidden", "engine", _JOB))
        shutil.rmtree(folder)


def _write_job(folder: Path, job: Mapping[str, Any]) -> None:
    unfinished = folder / f"{_JOB}.unfinished"
    unfinished.write_text(json.dumps(job, indent=1, sort_keys=True), encoding="utf-8")
    sync(unfinished)
    unfinished.rename(folder / _JOB)
    sync(folder)


def _check_job(folder: Path, job: Mapping[str, Any], resume: bool) -> None:
    if not resume:
        raise ExportError(
            f"{folder} holds an export that was cut off; go on with --resume or start over with "
            "--force."
        )
    path = folder / _JOB
    try:
        before = json.loads(path.read_bytes())
        if not isinstance(before, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise ExportError(
            f"{path} is damaged ({error}); start the export over with --force."
        ) from error
    changed = list(changes(before, job))
    if changed:
        more = f", and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
        raise ExportError(
            f"{folder} cannot be resumed because {', '.join(changed[:_NAMED])}{more}; repeat the "
            "command as it was or start over with --force."
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


def _clear(folder: Path, first: Sequence[str] = (_JOB,)) -> None:
    """Empties a work folder, all but the lock that is held on it; some things before others."""
    for path in (*(folder / name for name in first), *folder.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink(missing_ok=True)
