"""What was measured of every contender, and the evidence document that is made of it.

One :class:`Track` per contender holds its rounds by workload; the document is made anew from all
tracks and replaced as a whole. Entries of the same lists have the same ``work``, however many of
them were answered. Image decoding counts as ``load_pages`` here: our engines open a page there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mmr5_bench.evidence.document import Entry, validate_entry
from mmr5_bench.evidence.observe import work_id
from mmr5_bench.evidence.quality import Judged, quality_of
from mmr5_bench.evidence.statistics import (
    STATISTICS,
    latency_summary,
    ratio_interval,
    share_interval,
)
from mmr5_bench.peers.base import Answer, ListWork, Peer, Setting
from mmr5_bench.peers.workloads import Workload

_STAGES = {"image_decode": "load_pages"}  # one stage where runtimes cut the same work differently
_SLACK = 1.01  # what clocks that are read one after the other may differ by


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
        """ValueError when the stages of ``answer`` took more than ``ms``, the wall time."""
        _rest(ms, answer.stages_ms)
        tokens = (len(work.prompt_ids), work.image_tokens)
        return cls(index, work.digest, work.gold, work.domain, *tokens, ms, answer)

    def to_json(self) -> dict[str, Any]:
        """As it stands in the journal."""
        return asdict(self)


@dataclass
class Track:
    """What one contender did: rounds by label of the workload; ``dtype`` is that of the run."""

    peer: Peer
    subject: str
    axes: Mapping[str, Any]
    dtype: str
    warmup: int
    rounds: dict[str, list[Round]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    gpu: dict[str, Any] | None = None

    @classmethod
    def of(cls, peer: Peer, setting: Setting, warmup: int) -> Track:
        """Of a contender that has not answered yet."""
        return cls(peer, peer.subject(setting), peer.axes(setting), setting.dtype, warmup)

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
        "name": f"peers[{workload.label},dtype={track.dtype}]",
        "subject": track.subject,
        "axes": {
            "pages": workload.pages,
            "workload": workload.name,
            "generated": "own" if workload.generated is None else workload.generated,
            "forced": workload.forced,
            "cache": "cold",
            "dtype": track.dtype,
            **track.axes,
        },
        "work": work_of(workload, rounds[0]),
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


def work_of(workload: Workload, first: Round) -> str:
    """Of the lists that are asked, which follow from these; how many were answered is not in it."""
    budget = workload.reader.budget
    return work_id(
        workload.label,
        workload.seed,
        workload.forced,
        (budget.min_pixels, budget.max_pixels),
        workload.reader.tokenizer.template.profile,
        (first.index, first.digest),
    )


def _stages(rounds: Sequence[Round]) -> dict[str, float]:
    """Mean time per stage; ``other`` is what the stages leave of the wall time.

    ValueError when they add up to more than it.
    """
    sums: dict[str, float] = {}
    for one in rounds:
        for name, ms in one.answer.stages_ms.items():
            name = _STAGES.get(name, name)
            sums[name] = sums.get(name, 0.0) + ms
    means = {name: ms / len(rounds) for name, ms in sums.items()}
    return {**means, "other": _rest(_mean([one.ms for one in rounds]), means)}


def _rest(ms: float, stages: Mapping[str, float]) -> float:
    """What ``stages`` leave of ``ms``; ValueError when they take more, by over a hundredth."""
    total = sum(stages.values())
    if total > _SLACK * ms:
        raise ValueError(
            f"stages of {total:.3f} ms in a wall time of {ms:.3f} ms; a span counts another twice "
            "or the device was not waited for: mend the contender's stages_ms"
        )
    return max(ms - total, 0.0)


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
