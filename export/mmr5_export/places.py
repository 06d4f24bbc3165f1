"""Where an export writes, and what may lie there: a mistyped path must not cost somebody's files.

Only what an export made is ever replaced. An engine folder is known by its manifest; a checkpoint
folder, which looks like anybody's, by a file of ours in it, which readers of checkpoints ignore.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmr5_export.journal import resumable, work_folder
from mmr5_export.options import ExportOptions, OptionError
from mmr5_export.source import MINI
from mmr5_runtime.artifact import MANIFEST_NAME, is_partial, partial_name
from mmr5_runtime.types import ExportError

MARKER_NAME = "mmr5_checkpoint.json"


def rejected_folder(output: Path) -> Path:
    """Where an engine goes that verification rejects."""
    return output.absolute().with_name(f"{output.name}.rejected")


def unfinished_checkpoint(checkpoint_out: Path, output: Path) -> Path:
    """Where the checkpoint of an export lies until the engine has its name too.

    Beside its place, so that no disk is crossed at the end. The name is that of the export and not
    of a process: one that goes on, or starts over, finds and replaces what a killed one left.
    """
    checkpoint_out = checkpoint_out.absolute()
    owner = hashlib.sha256(os.fsencode(output.absolute())).hexdigest()[:8]
    return checkpoint_out.with_name(partial_name(checkpoint_out.name, owner))


def check_places(model: str | Path, output: Path, options: ExportOptions) -> None:
    """What can be said about the paths of an export before anything is read.

    Raises :class:`OptionError` when a folder that is written is, or holds, what is read or what
    else is written, and :class:`ExportError` when one is there already and must not be replaced.
    """
    if is_partial(output.absolute()):
        raise OptionError(
            f"--output {output} has a name of unfinished exports, which readers refuse; choose "
            "another --output."
        )
    _check_apart(model, output, options)
    if not (options.resume and resumable(work_folder(output))):
        check_output(output, options.force)
    if options.min_top1_agreement is not None:
        check_output(rejected_folder(output), force=True)
    if options.checkpoint_out is not None:
        check_checkpoint(options.checkpoint_out, options.force or options.resume)


def _check_apart(model: str | Path, output: Path, options: ExportOptions) -> None:
    source = Path(model).expanduser() if str(model) != MINI else None
    read = {
        "--model": source if source is not None and source.is_dir() else None,
        "--calib-data": options.calib_data,
        "--response-cache": options.response_cache,
    }
    engine = {
        f"--output {output}": output,
        f"the work folder {work_folder(output)}": work_folder(output),
        f"the folder {rejected_folder(output)}": rejected_folder(output),
    }
    written = dict(engine)
    if options.checkpoint_out is not None:
        beside = options.checkpoint_out
        written[f"--checkpoint-out {beside}"] = beside
        for name, folder in engine.items():
            if _holds(folder, beside) or _holds(beside, folder):
                raise OptionError(
                    f"--checkpoint-out {beside} and {name} lie in one another; choose another "
                    "--checkpoint-out."
                )
        if read["--model"] is not None and _holds(read["--model"], beside):
            raise OptionError(
                f"--checkpoint-out {beside} lies in --model {model}; choose a folder outside it."
            )
    for name, folder in written.items():
        for option, path in read.items():
            if path is not None and _holds(folder, path):
                raise OptionError(
                    f"{name} is or holds {option} {path}, which it would replace; choose another "
                    "folder to write."
                )


def check_output(output: Path, force: bool) -> None:
    """Raises :class:`ExportError` when ``output`` is there and must not, or cannot, be replaced.

    Even ``force`` replaces only an engine folder or an empty one.
    """
    if not _exists(output):
        return
    if not force:
        raise ExportError(f"{output} exists already; choose another --output or pass --force.")
    if not _is_folder_with(output, MANIFEST_NAME):
        raise ExportError(
            f"{output} is not an engine folder, so --force does not replace it; choose another "
            "--output or remove it yourself."
        )


def check_checkpoint(folder: Path, force: bool, job: str | None = None) -> None:
    """Raises :class:`ExportError` when a checkpoint cannot be written to ``folder``.

    Even ``force`` replaces only a folder that an export wrote or an empty one; without it, one that
    the export ``job`` (see :func:`job_sha256`) wrote itself is replaced.
    """
    if not _exists(folder):
        there = next(path for path in folder.absolute().parents if _exists(path))
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise ExportError(
                f"--checkpoint-out {folder} cannot be made in {there}; choose a folder that can be "
                "written to."
            )
        return
    if not force and (job is None or checkpoint_job(folder) != job):
        raise ExportError(
            f"{folder} exists already; choose another --checkpoint-out or pass --force."
        )
    if not _is_folder_with(folder, MARKER_NAME):
        raise ExportError(
            f"{folder} is no checkpoint that mmr5-export wrote, so it is not replaced; choose "
            "another --checkpoint-out or remove it yourself."
        )


def mark_checkpoint(folder: Path, job: str) -> None:
    """Marks a checkpoint folder as written by the export ``job``."""
    content = {"kind": "mmr5-export-checkpoint", "job": job}
    (folder / MARKER_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def checkpoint_job(folder: Path) -> str | None:
    """The export that wrote a checkpoint folder; None when it was none or is not known."""
    try:
        job = json.loads((folder / MARKER_NAME).read_bytes())["job"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(job)


def job_sha256(identity: Mapping[str, Any]) -> str:
    """A name for an export: the hash of all that its result depends on, values as in JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _is_folder_with(folder: Path, name: str) -> bool:
    """Whether it is a folder, not a link to one, that is empty or has the file."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return (folder / name).is_file() or not any(folder.iterdir())


def _holds(folder: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
