"""The runbook itself: steps one after the other inside a budget of minutes."""

from __future__ import annotations

import os
import shutil
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmr5_bench.runbook.book import Book
from mmr5_bench.runbook.bounded import GRACE_SECONDS, run_bounded
from mmr5_bench.runbook.steps import SCRATCH, Step

_MARGIN_SHARE = 0.1  # of a bound, at least, a step is not told of; see Step.margin
ARCHIVED_BYTES = 64 << 20  # results are far smaller; what is larger was left behind
_PATHS = (".", "kernels", "export", "benchmarks", "tests")


@dataclass(frozen=True)
class Session:
    """What a run is given. ``only`` and ``skip`` are names of steps or of their groups."""

    checkout: Path
    minutes: float = 25.0
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    again: bool = False
    archive: Path | None = None
    grace: float = GRACE_SECONDS

    def chooses(self, step: Step) -> bool:
        """Whether ``step`` was asked for."""
        names = {step.name, step.group}
        return (not self.only or bool(names & set(self.only))) and not names & set(self.skip)


def check_names(session: Session, steps: Sequence[Step]) -> None:
    """Raises ValueError for a name in ``only`` or ``skip`` that is no step and no group."""
    known = [name for step in steps for name in (step.name, step.group)]
    for name in (*session.only, *session.skip):
        if name not in known:
            raise ValueError(
                f"there is no step {name!r}; there are {', '.join(dict.fromkeys(known))}"
            )


def run_steps(
    session: Session, steps: Sequence[Step], book: Book, say: Callable[[str], None]
) -> None:
    """Runs ``steps`` in order; what happens to each is in ``book`` at once.

    Those that began before and did not end well come after all others, so that several short runs
    into one folder get on. The records are in the order of ``steps`` at the end.
    A step that fails or takes too long ends, and the next one goes on. One that is not to begin any
    more, for lack of time or of something it needs, is skipped with the reason. KeyboardInterrupt
    ends the running step and is raised again, with everything recorded.
    """
    check_names(session, steps)
    ends = time.monotonic() + 60 * session.minutes
    try:
        for step in sorted(steps, key=book.was_tried):
            if session.chooses(step):
                _clean(step, book.folder)
            left = ends - time.monotonic()
            if reason := _why_not(session, step, book, left):
                say(f"{step.name}: {reason}")
                continue
            _run_step(session, step, book, min(step.seconds, left), say)
            if session.archive is not None:
                write_archive(book.folder, session.archive)
    finally:
        book.order(steps)


def _why_not(session: Session, step: Step, book: Book, left: float) -> str | None:
    if not session.chooses(step):
        reason = "not asked for"
    elif book.is_done(step) and not session.again:
        return "done before"
    elif missing := step.missing():
        reason = missing
    elif (free := shutil.disk_usage(book.folder).free) < step.disk_bytes:
        reason = f"needs {step.disk_bytes / 1e9:.0f} GB of disk, {free / 1e9:.0f} are free"
    elif left < step.least:
        reason = f"takes {step.least:.0f} s or more, {max(left, 0):.0f} were left"
    else:
        return None
    book.skip(step, reason)
    return reason


def _run_step(
    session: Session, step: Step, book: Book, bound: float, say: Callable[[str], None]
) -> None:
    told = max(bound - max(_MARGIN_SHARE * bound, step.margin), bound / 2)
    command = step.command(told)
    say(f"{step.name}: {step.about} (up to {bound:.0f} s)")
    book.start(step, command, bound)
    try:
        ending = run_bounded(
            command,
            seconds=bound,
            log=book.log(step),
            cwd=session.checkout,
            env=environment(session.checkout, os.environ),
            grace=session.grace,
        )
    except OSError as error:
        book.end(step, "failed", None, str(error))
        return
    except KeyboardInterrupt:
        book.end(step, "interrupted", None, "the runbook was interrupted")
        raise
    finally:
        _clean(step, book.folder)
    written = book.written(step)
    absent = [name for name in step.files if name not in written]
    if ending.timed_out:
        book.end(step, "timed out", ending, f"was ended after {bound:.0f} s")
    elif ending.rc not in (0, step.early):
        book.end(step, "failed", ending, f"exit status {ending.rc}")
    elif absent:
        book.end(step, "failed", ending, f"did not write {', '.join(absent)}")
    else:
        book.end(step, "done", ending, "ended before its last part" if ending.rc else "")
    record = book.records[-1]
    say(f"{step.name}: {record['status']} after {ending.seconds:.0f} s")
    if record["status"] != "done" and record["tail"]:
        say("\n".join(f"    {line}" for line in record["tail"][-5:]))


def _clean(step: Step, folder: Path) -> None:
    """Removes the folders that a killed ``step`` could not remove itself."""
    if step.scratch:
        for path in folder.glob(f"{step.scratch}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def environment(checkout: Path, given: Mapping[str, str]) -> dict[str, str]:
    """``given`` for a program of this checkout, where nothing of it is installed."""
    paths = [str(checkout / part) for part in _PATHS]
    before = [part for part in given.get("PYTHONPATH", "").split(os.pathsep) if part]
    return {
        **given,
        "PYTHONPATH": os.pathsep.join([*paths, *(part for part in before if part not in paths)]),
        # Else the folder kernels/ can be taken for the package of that name.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        # Nothing is fetched, and nobody waits for a network that is not there.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


def write_archive(folder: Path, archive: Path) -> list[str]:
    """The results in ``folder`` as one tar.gz, whole at every moment.

    Gives the names of what is too large for results and left out; scratch folders are no results.
    """
    left_out = []
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(f".{archive.name}.{os.getpid()}")
    try:
        with tarfile.open(partial, "w:gz") as packed:
            for path in sorted(folder.rglob("*")):
                name = path.relative_to(folder)
                scratch = len(name.parts) > 1 and name.parts[0].startswith(SCRATCH)
                itself = path == partial or path.resolve() == archive.resolve()
                if scratch or itself or not path.is_file():
                    continue
                if path.stat().st_size > ARCHIVED_BYTES:
                    left_out.append(name.as_posix())
                else:
                    packed.add(path, name.as_posix())
        os.replace(partial, archive)
    finally:
        partial.unlink(missing_ok=True)
    return left_out
