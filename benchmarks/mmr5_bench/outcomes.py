"""What one engine made of one list, and the file in which such outcomes are collected.

One line of JSON per case and process, written at once: a run that is killed loses the case it was
at, and a line that was cut off is skipped when the file is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmr5_runtime.types import Status, StopReason

Key = tuple[int, str]
"""Number of the case, and the identity of the engine."""


@dataclass(frozen=True)
class Outcome:
    """One engine on one case.

    ``order`` and ``status`` are of its own greedy answer of ``completion_tokens``. The rest sums
    over the ``tokens`` of the reference's answer, in nats where it is no count. ``response`` holds
    the ids of that answer, in the reference's own outcome only.
    """

    order: tuple[int, ...]
    status: Status
    stop_reason: StopReason
    completion_tokens: int
    tokens: int
    kl: float
    reference_nll: float
    nll: float
    agreeing: int
    response: tuple[int, ...] | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        response = data["response"]
        return cls(
            **{
                **data,
                "order": tuple(data["order"]),
                "response": None if response is None else tuple(response),
            }
        )


@dataclass(frozen=True)
class OutcomeFile:
    """Outcomes of ``run``, which names everything they depend on beside case and engine.

    Lines of other runs stay in the file and are passed over.
    """

    path: Path
    run: str

    def append(self, outcomes: Mapping[Key, Outcome]) -> None:
        """Adds outcomes in one write, so that processes may share the file."""
        lines = [
            {"run": self.run, "case": case, "engine": engine, **asdict(outcome)}
            for (case, engine), outcome in outcomes.items()
        ]
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)

    def read(self) -> dict[Key, Outcome]:
        """Every whole line of this run; empty when there is no file yet."""
        if not self.path.is_file():
            return {}
        found: dict[Key, Outcome] = {}
        for line in self.path.read_bytes().splitlines():
            try:
                data = json.loads(line)
            except ValueError:  # cut off by a kill
                continue
            if isinstance(data, dict) and data.pop("run", None) == self.run:
                key = data.pop("case"), data.pop("engine")
                found[key] = Outcome.from_json(data)
        return found

    def close_line(self) -> None:
        """Ends a line that was cut off, so that the next one does not run into it."""
        if self.path.is_file() and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("ab") as file:
                file.write(b"\n")
