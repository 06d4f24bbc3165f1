"""What was timed, as entries of an evidence document, and how often as fast each contender is.

``ratios`` is as everywhere: time over that of the baseline, ``transformers`` in bfloat16. Beside it
``speedups`` has, against each contender that is worth comparing with, how many times as fast an
entry is: the other way round, since that is what the goals are given in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmr5_bench.backends.measure import Timed
from mmr5_bench.backends.names import BASELINE, MEASURED, NATIVE, REFERENCE
from mmr5_bench.backends.shapes import Shape
from mmr5_bench.evidence.document import Entry, validate_entry
from mmr5_bench.evidence.observe import work_id
from mmr5_bench.evidence.statistics import (
    STATISTICS,
    Statistic,
    latency_summary,
    mean_interval,
    ratio_interval,
    share_interval,
)

PREFIX = "backends["
GOALS = {"step": 3.0, "prefill": 1.5}
"""How many times as fast as the baseline :data:`MEASURED` is meant to be."""
_SPEEDUPS: tuple[Statistic, ...] = ("p50", "p95")
_WARMUP = 1


def entries_of(shape: Shape, tracks: Sequence[Timed], seed: int) -> list[Entry]:
    """An entry per contender and case, without comparisons."""
    return [_entry(shape, track, seed) for track in tracks]


def _entry(shape: Shape, track: Timed, seed: int) -> Entry:
    case, contender, samples = track.case, track.contender, list(track.samples_ms)
    axes = {"shape": shape.name, "case": case.kind, "tokens": case.tokens, "behind": case.behind}
    name = ",".join(f"{key}={value}" for key, value in axes.items())
    quant = contender.dtype if contender.backend == "transformers" else "int4"
    latency = latency_summary(samples)
    return validate_entry(
        {
            "name": f"{PREFIX}{name}]",
            "subject": contender.subject,
            "axes": {
                **axes,
                "label": case.label,
                "quant": quant,
                "dtype": contender.dtype,
                "backend": contender.backend,
            },
            "work": work_id(name, seed),
            "samples_ms": samples,
            "warmup": _WARMUP,
            "latency_ms": latency,
            "rates": {
                "tokens_per_s": 1e3 * case.tokens / latency["p50"]["value"],
                "cores": sum(track.cores) / len(track.cores),
            },
            "quality": {
                "cases": len(samples),
                "cosine": mean_interval([one.cosine for one in track.agreements]),
                "greedy": share_interval([one.greedy for one in track.agreements]),
            },
        }
    )


def compared(entries: Iterable[Entry]) -> list[Entry]:
    """``entries`` with ``ratios`` and ``speedups``, paired by round with entries of equal ``work``.

    Speedups are against ``transformers`` in both types and, for ONNX Runtime, :data:`NATIVE`: our
    torch engine of the same format. Where rounds differ in number, those that both did count.
    """
    listed = list(entries)
    made: list[Entry] = []
    for entry in listed:
        others = {
            name: other["samples_ms"]
            for other in listed
            if other["work"] == entry["work"] and (name := _rival(entry, other))
        }
        mine = entry["samples_ms"]
        row = entry.copy()
        row.pop("ratios", None)
        if baseline := others.get(BASELINE):
            row["ratios"] = {name: _paired(baseline, mine, name) for name in STATISTICS}
        row["speedups"] = {
            name: {statistic: _paired(mine, theirs, statistic) for statistic in _SPEEDUPS}
            for name, theirs in others.items()
        }
        made.append(row)
    return made


def _rival(entry: Entry, other: Entry) -> str | None:
    """What ``other`` is to ``entry`` as something to compare it with."""
    if other is entry:
        return None
    if other["subject"] in (BASELINE, REFERENCE):
        return other["subject"]
    same = entry["axes"]["quant"] == other["axes"]["quant"]
    torch = other["axes"].get("backend", "native") == "native"
    graphs = entry["axes"].get("backend") == "onnxruntime"
    return NATIVE if graphs and torch and same else None


def goals_of(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each goal of :data:`MEASURED` with what was found; it holds if its whole interval does."""
    found = []
    for entry in entries:
        axes = entry["axes"]
        if entry["subject"] != MEASURED or axes.get("case") not in GOALS:
            continue
        speedup = entry["speedups"][BASELINE]["p50"]
        least = GOALS[axes["case"]]
        found.append(
            {
                "what": f"{axes['shape']}, {axes['label']}: {least:g} times as fast as {BASELINE}",
                "found": speedup,
                "least": least,
                "holds": speedup["low"] >= least,
            }
        )
    return found


def _paired(before: Sequence[float], after: Sequence[float], statistic: Statistic) -> Any:
    count = min(len(before), len(after))
    return ratio_interval(before[:count], after[:count], statistic, paired=True)
