"""Do two ways of serving the same lists rank them alike?

An approximation can leave recall as it was and still change which page is chosen, most of all for
later candidates (arXiv 2601.08343). So agreement is also counted by the slot a candidate had in the
list, and recall is compared pair by pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mmr5_runtime.agreement import (
    bootstrap_interval,
    kendall_tau,
    overlap_at,
    paired_interval,
    recall_at,
    top1,
    wilson_interval,
)
from mmr5_runtime.types import RequestError

KS = (1, 3, 5)


@dataclass(frozen=True)
class CaseOrders:
    """Both orders of one list: permutations of its 0-based candidates, best first.

    ``relevant`` holds the candidates that answer the question, None (or empty) where unknown.
    Raises ValueError for orders that are no such permutations, RequestError for a relevant
    candidate that is not in the list.
    """

    a: tuple[int, ...]
    b: tuple[int, ...]
    relevant: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        candidates = list(range(len(self.a)))
        if not candidates or sorted(self.a) != candidates or sorted(self.b) != candidates:
            raise ValueError(f"{self.a} and {self.b} are not two orders of the same candidates")
        strange = set(self.relevant or ()) - set(candidates)
        if strange:
            raise RequestError(
                f"relevant={self.relevant} names {min(strange)}, but the list has "
                f"{len(candidates)} candidates, counted from 0; leave it out."
            )


@dataclass(frozen=True)
class Estimate:
    """A mean over ``lists`` lists with its 95 % interval."""

    value: float
    low: float
    high: float
    lists: int


@dataclass(frozen=True)
class SlotAgreement:
    """How often the candidate of one slot gets the same place in both; out of ``lists`` lists."""

    share: float
    lists: int


@dataclass(frozen=True)
class RecallChange:
    """Mean Recall@k of both, and ``b - a`` with its paired interval."""

    a: float
    b: float
    difference: Estimate


@dataclass(frozen=True)
class ConsistencyReport:
    """Agreement of two ways, ``a`` and ``b``, of ranking the same lists.

    ``top1`` is the share of lists with the same first candidate, ``order`` of those equal
    throughout; ``overlap`` the share that the first k have in common, by k, over lists of more than
    k candidates (shorter ones agree whatever happens). ``slots`` has one entry per input position.
    ``recall`` is over the labelled lists, empty without any.
    """

    lists: int
    top1: Estimate
    order: Estimate
    overlap: Mapping[int, Estimate]
    kendall_tau: Estimate
    slots: tuple[SlotAgreement, ...]
    recall: Mapping[int, RecallChange]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON has it; keys k as text."""
        document = asdict(self)
        for name in ("overlap", "recall"):
            document[name] = {str(k): value for k, value in document[name].items()}
        document["slots"] = list(document["slots"])
        return document

    def __str__(self) -> str:
        """A table to read, shares in percent and differences in points, with 95 % intervals."""
        rows = [
            ("same first candidate", _percent(self.top1)),
            ("same order", _percent(self.order)),
            *((f"overlap of the first {k}", _percent(e)) for k, e in self.overlap.items()),
            ("Kendall tau", _interval(self.kendall_tau, 1, 3)),
        ]
        for k, recall in self.recall.items():
            change = _interval(recall.difference, 100, 1, sign="+")
            rows.append(
                (f"Recall@{k}", f"{100 * recall.a:.1f} % to {100 * recall.b:.1f} %, {change} pt")
            )
        for number, slot in enumerate(self.slots, start=1):
            rows.append(
                (f"same place of candidate {number}", f"{100 * slot.share:.1f} % of {slot.lists}")
            )
        width = max(len(name) for name, _ in rows)
        labelled = next((r.difference.lists for r in self.recall.values()), 0)
        title = f"{self.lists} lists, {labelled} labelled"
        return "\n".join([title, *(f"{name:<{width}}  {value}" for name, value in rows)])


def compare_orders(cases: Sequence[CaseOrders], ks: Sequence[int] = KS) -> ConsistencyReport:
    """Compares two ways of ranking over ``cases``, at the depths ``ks``.

    Raises RequestError for no cases and for a depth below 1.
    """
    if not cases:
        raise RequestError("there are no lists to compare; pass at least one question with pages.")
    if any(k < 1 for k in ks):
        raise RequestError(f"ks={tuple(ks)} has a depth below 1; count candidates from 1.")
    deeper = {k: [case for case in cases if len(case.a) > k] for k in ks}
    return ConsistencyReport(
        lists=len(cases),
        top1=_share([top1(case.a, case.b) for case in cases]),
        order=_share([case.a == case.b for case in cases]),
        overlap={
            k: _mean([overlap_at(case.a, case.b, k) for case in longer])
            for k, longer in deeper.items()
            if longer
        },
        kendall_tau=_mean([kendall_tau(case.a, case.b) for case in cases]),
        slots=_slots(cases),
        recall=_recall(cases, ks),
    )


def _slots(cases: Sequence[CaseOrders]) -> tuple[SlotAgreement, ...]:
    slots = []
    for slot in range(max(len(case.a) for case in cases)):
        same = [case.a.index(slot) == case.b.index(slot) for case in cases if slot < len(case.a)]
        slots.append(SlotAgreement(sum(same) / len(same), len(same)))
    return tuple(slots)


def _recall(cases: Sequence[CaseOrders], ks: Sequence[int]) -> dict[int, RecallChange]:
    labelled = [(case, case.relevant) for case in cases if case.relevant]
    changes = {}
    for k in ks if labelled else ():
        a = [recall_at(case.a, relevant, k) for case, relevant in labelled]
        b = [recall_at(case.b, relevant, k) for case, relevant in labelled]
        means = sum(a) / len(a), sum(b) / len(b)
        difference = Estimate(means[1] - means[0], *paired_interval(a, b), len(a))
        changes[k] = RecallChange(*means, difference)
    return changes


def _share(flags: Sequence[bool]) -> Estimate:
    low, high = wilson_interval(sum(flags), len(flags))
    return Estimate(sum(flags) / len(flags), low, high, len(flags))


def _mean(values: Sequence[float]) -> Estimate:
    low, high = bootstrap_interval(values)
    return Estimate(sum(values) / len(values), low, high, len(values))


def _percent(estimate: Estimate) -> str:
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def _interval(estimate: Estimate, scale: int, digits: int, sign: str = "") -> str:
    shown = (scale * x for x in (estimate.value, estimate.low, estimate.high))
    value, low, high = (f"{x:{sign}.{digits}f}" for x in shown)
    return f"{value} [{low}, {high}]"
