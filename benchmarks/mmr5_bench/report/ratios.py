"""How much slower: of one entry by its pairs of rounds, and of all entries together.

A round and the same round of the other run are the same list, so a pair has a ratio in which the
list cancels. The ratio of an entry is the median of those, over all rounds for p50 and over the
slowest quarter for percentiles of the tail: slowest by both runs together, so an outlier of one run
moves it little, and what makes long requests longer moves it fully. The ratio of two medians (or of
two p95) would be that of whichever lists happen to lie there: with lists that differ fourfold in
length it scatters three times as much. All entries together are the midmean (the mean of the middle
half) of their log ratios.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mmr5_bench.evidence.statistics import Interval
from mmr5_bench.report.rules import Latency

Floats = npt.NDArray[np.float64]
Pair = tuple[Floats, Floats]
# From so many entries on their scatter can be measured; below, only that of their rounds.
MIN_ENTRIES = 5
POOLED_LEVEL = 0.9


def paired_ratio(
    pair: Pair, statistic: Latency, *, level: float, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """After over before of one entry, with its percentile bootstrap interval over rounds.

    ``pair`` is two arrays [rounds] of ms above zero, round i of the same list.
    """
    before, after = pair
    rows = np.random.default_rng(seed).integers(0, before.size, (resamples, before.size))
    drawn = _log_ratio(before[rows], after[rows], statistic)
    return _interval(float(_log_ratio(before, after, statistic)), drawn, level)


def pooled_ratio(
    pairs: Sequence[Pair], statistic: Latency, *, resamples: int = 4000, seed: int = 0
) -> Interval:
    """After over before of all ``pairs`` together.

    The interval has level 0.9, so either end alone errs once in 20. Entries are redrawn; of fewer
    than five the rounds are.
    """
    generator = np.random.default_rng(seed)
    logs = np.array([_log_ratio(before, after, statistic) for before, after in pairs])
    if logs.size >= MIN_ENTRIES:
        drawn = _midmean(logs[generator.integers(0, logs.size, (resamples, logs.size))])
    else:
        drawn = np.zeros(resamples)
        for before, after in pairs:
            rows = generator.integers(0, before.size, (resamples, before.size))
            drawn += _log_ratio(before[rows], after[rows], statistic) / logs.size
    return _interval(float(_midmean(logs)), drawn, POOLED_LEVEL)


def _log_ratio(before: Floats, after: Floats, statistic: Latency) -> Any:
    """Along the last axis, the rounds."""
    if statistic == "mean":
        return np.log(after.mean(axis=-1) / before.mean(axis=-1))
    ratios = np.log(after / before)
    if statistic != "p50":
        tail = math.ceil(before.shape[-1] / 4)
        slowest = np.argsort(before * after, axis=-1)[..., -tail:]
        ratios = np.take_along_axis(ratios, slowest, axis=-1)
    return np.median(ratios, axis=-1)


def _midmean(logs: Floats) -> Any:
    """Mean of the middle half along the last axis; of fewer than four all."""
    cut = logs.shape[-1] // 4
    return np.sort(logs, axis=-1)[..., cut : logs.shape[-1] - cut].mean(axis=-1)


def _interval(value: float, drawn: Floats, level: float) -> Interval:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return {"value": math.exp(value), "low": math.exp(low), "high": math.exp(high)}
