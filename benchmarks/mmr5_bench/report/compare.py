"""Two runs of the same work, entry by entry and as a whole, against what may become worse.

pairs of entries -> ratio with interval -> widened by the noise between entries -> verdict per rule

Many comparisons are made at once, on machines that other people use, so four things stand between
a ratio and ``regressed``:

* *Level.* Intervals have level 1 - 0.05 / m for m comparisons (entries x latency rules), so that
  all of them together are wrong in 5 % of runs on either side (Bonferroni).
* *Noise between entries.* The bootstrap sees how rounds scatter and not that a neighbour was busy
  during all rounds of one entry. How far entries lie from their median ratio shows that: the larger
  of 1.4826 MAD and the root mean square towards the other side, less what the bootstrap explains,
  is added in quadrature. An entry is only certain to be slower when no entry is faster by as much.
* *The whole.* One pooled ratio over all entries (see ``ratios``) finds a general slowdown that no
  single entry can prove. Between runs it moves with the machine, which no interval knows. So it is
  ``regressed`` when the ratio exceeds what is allowed and its interval exceeds half of that: half
  way from nothing to twice the allowance is where both errors are least.

* *Pace.* Where both runs timed a fixed piece of work around every round (the pytest plugin and
  ``mmr5-bench latency`` do, see ``evidence.pace``), the second is brought to the pace of the first,
  round by round: what a busy neighbour slows slows that as well.

Measured on simulated runs without a pace, 100 per figure: lists that differ fourfold in length, 5 %
noise, one round in 25 taking 1.3 to 2 times as long, each run off by up to 2.5 % (4 %) and every
entry by 2 %.
With ``p95:10%`` and 24 entries of 12 rounds an identical rerun fails 0 (0) times in 100, and one
slower by 20 % fails 100 (99) times; with 20 rounds 0 (0) and 100 (100) times; 6 entries of 12
rounds 0 and 94 times. When a neighbour makes one entry in ten slower by 10 to 50 % from its first
round to its last, 15 identical runs in 100 fail, by a single entry: measure again, or order rounds
so that no entry has a stretch of time of its own. One entry alone, slower by 30 %, is certain 69
times in 100 by p50 and 45 by p95 and else mostly ``suspect``; of entries of an identical rerun 9 %
are that by p95 and some by p50, which is why ``--strict`` is for long runs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, Literal, TypedDict

import numpy as np

from mmr5_bench.evidence.document import Entry, Evidence, entry_key
from mmr5_bench.evidence.statistics import Interval
from mmr5_bench.report.qualities import judge_qualities
from mmr5_bench.report.ratios import MIN_ENTRIES, Floats, Pair, paired_ratio, pooled_ratio
from mmr5_bench.report.rules import Latency, LatencyRule, QualityRule, Rule

Verdict = Literal["regressed", "suspect", "ok", "improved"]
DEFAULT_RULES: tuple[Rule, ...] = (LatencyRule("p50", 0.1), LatencyRule("p95", 0.1))
FAMILY_ERROR = 0.05
# Fewer rounds cannot prove anything: of 4 noisy pairs all are slower once in 16 times.
MIN_ROUNDS = 5
# Between fewer entries noise cannot be measured, and what a quiet machine has is assumed.
ASSUMED_NOISE = 0.02
_RESAMPLES = 10_000


class Row(TypedDict):
    """One rule on one entry, or on all of them.

    ``ratio`` is after over before by pairs of rounds, and so not the quotient of the two times.
    """

    name: str
    subject: str
    rule: str
    before_ms: float | None
    after_ms: float | None
    ratio: Interval
    rounds: int
    verdict: Verdict
    note: str


def compare(
    before: Evidence,
    after: Evidence,
    rules: Sequence[Rule] = (),
    *,
    allow_machine_diff: bool = False,
    strict: bool = False,
) -> dict[str, Any]:
    """Every verdict and whether the comparison failed, as one JSON document.

    Without ``rules`` p50 and p95 are judged by :data:`DEFAULT_RULES` and nothing but work that
    differs fails. ``rows`` has a :class:`Row` per entry and latency rule, ``pooled`` one per
    latency rule, ``quality`` one per metric. ValueError for different machines (unless allowed),
    for an entry that is twice in a file, and when nothing can be compared.
    """
    from mmr5_bench.evidence.machine import machine_differences  # torch only when it is needed

    machines = machine_differences(before["machine"], after["machine"])
    if machines and not allow_machine_diff:
        raise ValueError(
            f"these runs are of different machines ({'; '.join(machines)}); measure both on one, "
            "or pass --allow-machine-diff to compare them all the same"
        )
    old, new = _by_key(before, "the first file"), _by_key(after, "the second file")
    shared = [key for key in old if key in new]
    other_work = [key for key in shared if old[key]["work"] != new[key]["work"]]
    pairs = [(old[key], new[key]) for key in shared if key not in other_work]
    latency = [r for r in rules or DEFAULT_RULES if isinstance(r, LatencyRule)]
    rows, pooled = judge_latencies(pairs, latency) if pairs else ([], [])
    quality = judge_qualities(
        before, after, pairs, [r for r in rules if isinstance(r, QualityRule)]
    )
    if not (pairs or quality or other_work):
        raise ValueError(
            "nothing can be compared: no entry of one file has the name, subject and work of one "
            "in the other; run the same benchmarks with the same options"
        )
    verdicts = Counter(row["verdict"] for row in [*rows, *pooled, *quality])
    bad = verdicts["regressed"] + (verdicts["suspect"] if strict else 0)
    return {
        "kind": "mmr5-comparison",
        "rules": [rule.text for rule in rules or DEFAULT_RULES],
        "strict": strict,
        "failed": bool(other_work) or bool(rules and bad),
        "verdicts": dict(verdicts),
        "machine_differences": machines,
        "different_work": [" ".join(key) for key in other_work],
        "only_before": [" ".join(key) for key in old if key not in new],
        "only_after": [" ".join(key) for key in new if key not in old],
        "pooled": pooled,
        "rows": rows,
        "quality": quality,
    }


def judge_latencies(
    pairs: Sequence[tuple[Entry, Entry]], rules: Sequence[LatencyRule]
) -> tuple[list[Row], list[Row]]:
    """Rows of every entry, and one over all entries per rule (none for a single entry)."""
    if not rules:
        return [], []
    level = 1 - FAMILY_ERROR / (len(pairs) * len(rules))
    below, above = (NormalDist().inv_cdf((1 + level) / 2) * noise for noise in _noise(pairs))
    rows: list[Row] = []
    pooled: list[Row] = []
    for rule in rules:
        ratios = [_ratio(pair, rule.statistic, level) for pair in pairs]
        for pair, ratio in zip(pairs, ratios, strict=True):
            rows.append(_row(pair, rule, _widened(ratio, below, above)))
        if len(pairs) > 1:
            pooled.append(_pooled_row(pairs, rule))
    return rows, pooled


def _row(pair: tuple[Entry, Entry], rule: LatencyRule, ratio: Interval) -> Row:
    samples = _rounds(pair)
    rounds = samples[0].size
    verdict = _verdict(ratio, rule.allowed, rule.allowed)
    notes = []
    if verdict == "regressed" and rounds < MIN_ROUNDS:
        verdict = "suspect"
        notes.append(f"{rounds} rounds prove nothing")
    if any(len(entry["samples_ms"]) != rounds for entry in pair):
        notes.append(f"first {rounds} rounds of each")
    if any((entry.get("gpu") or {}).get("throttled") for entry in pair):
        notes.append("GPU throttled")
    if _paced(pair):
        notes.append("at one pace")
    old, new = (_statistic(taken, rule.statistic) for taken in samples)
    return {
        "name": pair[0]["name"],
        "subject": pair[0]["subject"],
        "rule": rule.text,
        "before_ms": old,
        "after_ms": new,
        "ratio": ratio,
        "rounds": rounds,
        "verdict": verdict,
        "note": ", ".join(notes),
    }


def _pooled_row(pairs: Sequence[tuple[Entry, Entry]], rule: LatencyRule) -> Row:
    rounds = [_rounds(pair) for pair in pairs]
    ratio = pooled_ratio(rounds, rule.statistic)
    return {
        "name": f"all {len(pairs)} entries",
        "subject": "",
        "rule": rule.text,
        "before_ms": None,
        "after_ms": None,
        "ratio": ratio,
        "rounds": sum(before.size for before, _ in rounds),
        "verdict": _verdict(ratio, rule.allowed, rule.allowed / 2),
        "note": "",
    }


def _noise(pairs: Sequence[tuple[Entry, Entry]]) -> tuple[float, float]:
    """Standard deviation of log ratios between entries that rounds do not explain.

    The first is for lower ends and counts entries that became faster, the second the other way.
    """
    if len(pairs) < MIN_ENTRIES:
        return ASSUMED_NOISE, ASSUMED_NOISE
    ratios = [_ratio(pair, "p50", 0.95) for pair in pairs]
    logs = np.log([ratio["value"] for ratio in ratios])
    away = logs - np.median(logs)
    errors = [math.log(ratio["high"] / ratio["low"]) / (2 * 1.96) for ratio in ratios]
    explained = float(np.median(np.square(errors)))
    typical = float((1.4826 * np.median(np.abs(away))) ** 2)
    towards = (float(np.mean(np.square(away[side]))) for side in (away <= 0, away >= 0))
    faster, slower = (math.sqrt(max(max(typical, far) - explained, 0)) for far in towards)
    return faster, slower


def _widened(ratio: Interval, below: float, above: float) -> Interval:
    value = math.log(ratio["value"])
    low = value - math.hypot(value - math.log(ratio["low"]), below)
    high = value + math.hypot(math.log(ratio["high"]) - value, above)
    return _exponents(value, low, high)


def _exponents(value: float, low: float, high: float) -> Interval:
    return {"value": math.exp(value), "low": math.exp(low), "high": math.exp(high)}


def _verdict(ratio: Interval, allowed: float, certain: float) -> Verdict:
    if ratio["value"] > 1 + allowed:
        return "regressed" if ratio["low"] > 1 + certain else "suspect"
    if ratio["value"] < 1 - allowed and ratio["high"] < 1 - certain:
        return "improved"
    return "ok"


def _ratio(pair: tuple[Entry, Entry], statistic: Latency, level: float) -> Interval:
    return paired_ratio(_rounds(pair), statistic, level=level, resamples=_RESAMPLES)


def _rounds(pair: tuple[Entry, Entry]) -> Pair:
    """Rounds that both have; round i is the same list, so the first ones are pairs.

    Where both runs know the machine's pace, ``after`` is brought to the pace of ``before``.
    """
    count = min(len(entry["samples_ms"]) for entry in pair)
    before, after = (np.asarray(entry["samples_ms"][:count], dtype=np.float64) for entry in pair)
    if min(before.min(), after.min()) <= 0:
        raise ValueError(f"entry {pair[0]['name']!r} has a time of 0 ms; measure again")
    if _paced(pair):
        slow, now = (np.asarray(e["pace_ms"][:count], dtype=np.float64) for e in pair)
        after = after * slow / now
    return before, after


def _paced(pair: tuple[Entry, Entry]) -> bool:
    return all("pace_ms" in entry for entry in pair)


def _statistic(samples: Floats, statistic: Latency) -> float:
    if statistic == "mean":
        return float(np.mean(samples))
    return float(np.quantile(samples, int(statistic[1:]) / 100))


def _by_key(evidence: Evidence, which: str) -> dict[tuple[str, str], Entry]:
    found: dict[tuple[str, str], Entry] = {}
    for entry in evidence["entries"]:
        key = entry_key(entry)
        if key in found:
            raise ValueError(f"{which} has {' '.join(key)} twice; give every entry its own name")
        found[key] = entry
    return found
