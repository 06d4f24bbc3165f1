"""What a runbook has come to so far: one JSON file, whole at every moment.

``runbook.json`` has for every step its ``status``: ``done``, ``failed`` (another exit status than
0), ``timed out``, ``skipped`` (with the ``reason``), ``interrupted``, or ``running`` where the
runbook itself was killed; with ``rc``, ``seconds``, ``bound_s``, the ``files`` it left with their
sizes, and the last lines of its output (``tail``; all of it is in ``logs/``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from mmr5_bench.files import write_json
from mmr5_bench.runbook.bounded import Ending, last_lines
from mmr5_bench.runbook.steps import Step

KIND, SCHEMA = "mmr5-runbook", 1
BOOK = "runbook.json"
LOGS = "logs"
Status = Literal["done", "failed", "timed out", "skipped", "interrupted", "running"]


class Record(TypedDict, total=False):
    """One step of a run; see the module."""

    name: str
    about: str
    status: Status
    reason: str
    command: list[str]
    bound_s: float
    rc: int
    seconds: float
    files: dict[str, int]
    tail: list[str]


@dataclass
class Book:
    """The record of one folder of results."""

    folder: Path
    document: dict[str, Any]
    _before: dict[str, tuple[int, int]] = field(default_factory=dict)  # files when a step began

    @classmethod
    def open(cls, folder: Path, *, dry_run: bool, provenance: dict[str, str]) -> Book:
        """The one in ``folder``, to be gone on with, or a new one.

        Raises ValueError when the folder has a book that cannot be read, or one of a dry run and
        this is none (or the other way round), or of other code.
        """
        path = folder / BOOK
        fresh = {
            "kind": KIND,
            "schema": SCHEMA,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "dry_run": dry_run,
            "provenance": provenance,
            "steps": [],
        }
        if not path.exists():
            return cls(folder, fresh)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            old, commit = found["dry_run"], found["provenance"]["commit"]
            steps = {record["name"]: record["status"] for record in found["steps"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no runbook ({error!r}); give another --out") from error
        if old != dry_run:
            kind = "a dry run" if old else "a real run"
            raise ValueError(f"{folder} has the results of {kind}; give another --out")
        if commit != provenance["commit"] and "done" in steps.values():
            raise ValueError(
                f"{folder} has results of commit {commit}, this is {provenance['commit']}; give "
                "another --out, or --again without --only to measure everything anew"
            )
        for record in found["steps"]:
            if record["status"] == "running":
                record |= {"status": "interrupted", "reason": "the runbook was ended"}
        return cls(folder, found)

    @property
    def records(self) -> list[Record]:
        """In the order of the steps."""
        return cast(list[Record], self.document["steps"])

    def is_done(self, step: Step) -> bool:
        """Whether an earlier run ended ``step`` well and its files are still there."""
        found = self._find(step.name)
        whole = all((self.folder / name).is_file() for name in step.files)
        return found is not None and found["status"] == "done" and whole

    def was_tried(self, step: Step) -> bool:
        """Whether ``step`` began before and did not end well."""
        found = self._find(step.name)
        return found is not None and found["status"] in ("failed", "timed out", "interrupted")

    def written(self, step: Step) -> dict[str, int]:
        """Size of the files that ``step`` has written since it began; not what lay there before."""
        states = _states(self.folder, step.files)
        new = [name for name, state in states.items() if state != self._before.get(name)]
        return {name: (self.folder / name).stat().st_size for name in new}

    def skip(self, step: Step, reason: str) -> None:
        """A step that is not run; what an earlier run found of it stays."""
        found = self._find(step.name)
        if found is None or found["status"] == "skipped":
            self._put({"name": step.name, "about": step.about, "status": "skipped"}, reason=reason)

    def start(self, step: Step, command: Sequence[str], bound: float) -> None:
        """A step that runs now."""
        given = list(command)
        self._before = _states(self.folder, step.files)
        record: Record = {"name": step.name, "about": step.about, "status": "running"}
        self._put({**record, "command": given, "bound_s": round(bound, 1)})

    def end(self, step: Step, status: Status, ending: Ending | None, reason: str = "") -> None:
        """How the running step ended; without ``ending`` it was interrupted, or never started."""
        record: Record = {**(self._find(step.name) or {}), "status": status}
        if ending is not None:
            record |= {"rc": ending.rc, "seconds": round(ending.seconds, 1)}
        record["files"] = self.written(step)
        log = self.log(step)
        record["tail"] = last_lines(log) if log.is_file() else []
        self._put(record, reason=reason)

    def log(self, step: Step) -> Path:
        """Where the output of a step goes."""
        return self.folder / LOGS / f"{step.name}.log"

    def order(self, steps: Sequence[Step]) -> None:
        """Puts the records into the order of ``steps``."""
        places = {step.name: index for index, step in enumerate(steps)}
        self.records.sort(key=lambda record: places.get(record["name"], len(places)))
        self._write()

    def _find(self, name: str) -> Record | None:
        return next((record for record in self.records if record["name"] == name), None)

    def _put(self, record: Record, reason: str = "") -> None:
        if reason:
            record["reason"] = reason
        kept = [other for other in self.records if other["name"] != record["name"]]
        self.document["steps"] = [*kept, record]
        self._write()

    def _write(self) -> None:
        write_json(self.document, self.folder / BOOK)


def _states(folder: Path, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """What tells a file from an older one of its name, of those that are there."""
    found = {name: (folder / name).stat() for name in names if (folder / name).is_file()}
    return {name: (state.st_mtime_ns, state.st_ino) for name, state in found.items()}
