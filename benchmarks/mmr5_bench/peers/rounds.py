"""What was measured of every contender, and the evidence document that is made of it.

One :class:`Track` per contender holds its rounds by workload. A finished round goes to the journal
beside the output at once; the document is made anew from all tracks and replaced as a whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mmr5_bench.evidence.document import Entry, validate_entry
from mmr5_bench.evidence.quality import Judged, quality_of
from mmr5_bench.evidence.statistics import (
    STATISTICS,
    latency_summary,
    ratio_interval,
    share_interval,
)
from mmr5_bench.peers.base import Answer, ListWork, Peer
from mmr5_bench.peers.workloads import Workload


@dataclass(frozen=True)
class Round:
    """One answered list: its number, hash and gold pages, the wall time and the answer."""

    index: int
    digest: str
    gold: tuple[int, ...]
    domain: str
    prompt_tokens: int
    image_tokens: int
    ms: float
    answer: Answer

    @classmethod
    def of(cls, index: int, work: ListWork, ms: float, answer: Answer) -> Round:
        pads = sum(rows * columns for _, rows, columns in work.grids) // 4
        about = (work.digest, work.gold, work.domain, len(work.prompt_ids), pads)
        return cls(index, *about, ms, answer)

    def to_json(self) -> dict[str, Any]:
        """As it stands in the journal."""
        return asdict(self)


@dataclass
class Track:
    """What one contender did: rounds by label of the workload."""

    peer: Peer
    subject: str
    axes: Mapping[str, Any]
    warmup: int
    rounds: dict[str, list[Round]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    gpu: dict[str, Any] | None = None

    @property
    def count(self) -> int:
        """Lists answered, of all workloads together."""
        return sum(len(rounds) for rounds in self.rounds.values())


def entries_of(
    tracks: Sequence[Track], workloads: Sequence[Workload], baseline: str, note: str = ""
) -> list[Entry]:
    """An entry per contender and workload that has rounds; ``baseline`` is a contender's name."""
    found = []
    for workload in workloads:
        reference = next((t for t in tracks if t.peer.name == baseline), None)
        against = reference.rounds.get(workload.label, []) if reference else []
        for track in tracks:
            if rounds := track.rounds.get(workload.label):
                compared = None if track is reference else against
                found.append(_entry(track, workload, rounds, compared, note))
    return found


def identical(a: Answer, b: Answer) -> bool:
    """Whether two answers are the same tokens: by their ids where both show them, else by text and
    number, which differ unless one text was cut into other tokens of the same number."""
    if a.token_ids is not None and b.token_ids is not None:
        return a.token_ids == b.token_ids
    return a.text == b.text and a.tokens == b.tokens


def _entry(
    track: Track,
    workload: Workload,
    rounds: Sequence[Round],
    against: Sequence[Round] | None,
    note: str,
) -> Entry:
    samples = [one.ms for one in rounds]
    entry: dict[str, Any] = {
        "name": f"peers[{workload.label}]",
        "subject": track.subject,
        "axes": {
            "pages": workload.pages,
            "workload": workload.name,
            "generated": "own" if workload.generated is None else workload.generated,
            "forced": workload.forced,
            "cache": "cold",
            **track.axes,
        },
        "work": _work(rounds),
        "samples_ms": samples,
        "warmup": track.warmup,
        "latency_ms": latency_summary(samples),
        "stages_ms": _stages(rounds),
        "tokens": {
            "prompt": _mean([one.prompt_tokens for one in rounds]),
            "image": _mean([one.image_tokens for one in rounds]),
            "completion": _mean([one.answer.tokens for one in rounds]),
        },
        "quality": _quality(track, workload, rounds, against),
        "memory": track.memory,
        "gpu": track.gpu,
        "note": note,
    }
    entry |= _first_tokens(rounds)
    if against:
        entry["ratios"] = _ratios(rounds, against)
    return validate_entry({key: value for key, value in entry.items() if value not in ({}, None)})


def _work(rounds: Sequence[Round]) -> str:
    """Hash over the lists that were answered: equal for contenders that got equally far."""
    return hashlib.sha256(" ".join(one.digest for one in rounds).encode()).hexdigest()[:16]


def _stages(rounds: Sequence[Round]) -> dict[str, float]:
    """Mean time per stage; ``other`` is what the stages leave of the wall time."""
    names = dict.fromkeys(name for one in rounds for name in one.answer.stages_ms)
    means = {name: _mean([r.answer.stages_ms.get(name, 0.0) for r in rounds]) for name in names}
    return {**means, "other": max(_mean([one.ms for one in rounds]) - sum(means.values()), 0.0)}


def _first_tokens(rounds: Sequence[Round]) -> dict[str, Any]:
    """Time to the first token, and from one to the next, where every answer tells."""
    firsts = [one.answer.ttft_ms for one in rounds]
    known = [first for first in firsts if first is not None]
    if len(known) < len(rounds):
        return {}
    between = [
        max(one.ms - first, 0.0) / (one.answer.tokens - 1)
        for one, first in zip(rounds, known, strict=True)
        if one.answer.tokens > 1
    ]
    found: dict[str, Any] = {"ttft_ms": latency_summary(known)}
    return found | ({"per_token_ms": latency_summary(between)} if between else {})


def _quality(
    track: Track,
    workload: Workload,
    rounds: Sequence[Round],
    against: Sequence[Round] | None,
) -> dict[str, Any]:
    """Metrics of lists with gold pages, and agreement with the baseline on the lists of both."""
    both = [] if against is None else list(zip(rounds, against, strict=False))
    found: dict[str, Any] = {}
    if all(one.gold for one in rounds):
        # A reference for some lists only would hold the two means against different lists.
        everywhere = len(both) == len(rounds)
        judged = [
            Judged(
                mine.answer.order,
                mine.gold,
                mine.answer.status,
                mine.domain,
                both[number][1].answer.order if everywhere else None,
            )
            for number, mine in enumerate(rounds)
        ]
        found = quality_of(judged)
    # What stops early is not meant to be the same tokens, and random weights are not the same ones.
    if both and track.axes.get("stop") == "eos" and not workload.forced:
        same = [identical(mine.answer, theirs.answer) for mine, theirs in both]
        found = {"cases": len(rounds), **found, "identical": share_interval(same)}
    return found


def _ratios(rounds: Sequence[Round], against: Sequence[Round]) -> dict[str, Any]:
    """Time over the baseline's, on the lists that both answered, with paired intervals."""
    count = min(len(rounds), len(against))
    mine = [one.ms for one in rounds[:count]]
    theirs = [one.ms for one in against[:count]]
    return {name: ratio_interval(theirs, mine, name, paired=True) for name in STATISTICS}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
