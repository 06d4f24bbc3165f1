"""What one engine made of one list, and the file in which such outcomes are collected.

One line of JSON per case and process, written at once: a run that is killed loses the case it was
at, and a line that was cut off is skipped when the file is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmr5_bench.files import append_lines, read_lines
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
        append_lines(self.path, lines)

    def read(self) -> dict[Key, Outcome]:
        """Every whole line of this run; empty when there is no file yet."""
        found: dict[Key, Outcome] = {}
        for _, data in read_lines(self.path):
            if data.pop("run", None) == self.run:
                key = data.pop("case"), data.pop("engine")
                found[key] = Outcome.from_json(data)
        return found
