"""What was made of one question, and the file in which finished questions are kept.

One line of JSON per question, written at once: a run that is killed loses the question it was at,
and goes on from there when it is started again. Lines of other runs stay and are passed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, get_args

from mmr5_bench.files import append_lines, read_lines
from mmr5_bench.mmdocir.metrics import Ranked

Outcome = Literal["ok", "repaired", "fallback", "error"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

_KINDS: dict[str, Any] = {
    "question": int,
    "document": int,
    "domain": str,
    "error": dict | None,
    "interventions": int,
    "warm": int,
    "tokens": dict | None,
    "ms": int | float | None,
    "first_token_ms": int | float | None,
    "stages_ms": dict,
    "text_sha256": str | None,
}


class Record(TypedDict):
    """One question. Pages are 0-based in its document.

    ``status`` is that of ``RerankResult``, or ``error`` when the question could not be asked: then
    ``order`` is that of the candidates, ``error`` has the type and message, and what was never
    measured is None. ``ms`` is the wall time of the request, decoding the image files and all of
    preprocessing included; reading them from the table is not. ``stages_ms`` adds up to it.
    ``warm`` says whether the model had run in this process before.
    """

    question: int
    document: int
    domain: str
    gold: list[int]
    candidates: list[int]
    order: list[int]
    status: Outcome
    stop_reason: str | None
    error: dict[str, str] | None
    interventions: int
    exactness: str | None
    warm: bool
    tokens: dict[str, int] | None
    ms: float | None
    first_token_ms: float | None
    stages_ms: dict[str, float]
    text_sha256: str | None
    text: NotRequired[str]


def ranked(record: Record) -> Ranked:
    """The record as metrics take it."""
    return Ranked(
        record["document"], record["domain"], tuple(record["order"]), tuple(record["gold"])
    )


def check_record(data: Any) -> Record:
    """``data`` itself when it is a whole record; ValueError naming what it lacks."""
    if not isinstance(data, dict):
        raise ValueError("it is no object")
    # Not __required_keys__, which does not see NotRequired in annotations that are text.
    if missing := set(Record.__annotations__) - {"text"} - set(data):
        raise ValueError(f"it lacks {min(missing)!r}")
    for key in ("gold", "candidates", "order"):
        if not isinstance(data[key], list) or not all(type(page) is int for page in data[key]):
            raise ValueError(f"its {key} is no list of pages")
    for key, kinds in _KINDS.items():
        if not isinstance(data[key], kinds) or isinstance(data[key], bool) != (key == "warm"):
            raise ValueError(f"its {key} is {data[key]!r}")
    for key in ("tokens", "stages_ms"):
        if not all(isinstance(value, int | float) for value in (data[key] or {}).values()):
            raise ValueError(f"its {key} are no numbers")
    if data["tokens"] is not None and not {"prompt", "image", "completion"} <= set(data["tokens"]):
        raise ValueError("its tokens are not all there")
    if (data["error"] is None) == (data["status"] == "error"):
        raise ValueError("its status contradicts its error")
    if data["error"] is not None and not {"type", "message"} <= set(data["error"]):
        raise ValueError("its error has no type and message")
    if not data["candidates"] or sorted(data["order"]) != sorted(set(data["candidates"])):
        raise ValueError("its order is no permutation of its candidates")
    if data["status"] not in OUTCOMES:
        raise ValueError(f"its status {data['status']!r} is unknown")
    return data  # type: ignore[return-value]


@dataclass(frozen=True)
class Journal:
    """Records of finished questions of ``run``, which names everything that decides them."""

    path: Path
    run: str

    def add(self, record: Record) -> None:
        """Adds a line in one write; OSError when the disk takes only a part of it."""
        append_lines(self.path, [{"run": self.run, "record": record}])

    def read(self) -> dict[int, Record]:
        """Every record of this run by question; empty when there is no file yet.

        ValueError for a whole line of this run that holds no record: somebody changed it.
        """
        found: dict[int, Record] = {}
        for number, data in read_lines(self.path):
            if data.get("run") == self.run:
                try:
                    record = check_record(data.get("record"))
                except ValueError as error:
                    raise ValueError(
                        f"{self.path} line {number}: {error}; delete the line to ask it again"
                    ) from error
                found[record["question"]] = record
        return found
