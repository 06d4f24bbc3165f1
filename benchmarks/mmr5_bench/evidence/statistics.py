"""Percentiles of latencies and their uncertainty; pure functions of samples.

A sample is the wall time of one request in milliseconds. Which requests were drawn and how the
machine behaved meanwhile both vary, so every percentile comes with a bootstrap interval (Efron,
"Bootstrap methods: another look at the jackknife", 1979). Far out in the tail the interval ends at
the largest sample: of 12 requests nobody knows a p99, and the interval does not pretend to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

import numpy as np
import numpy.typing as npt

from mmr5_runtime.agreement import bootstrap_interval, wilson_interval

Samples = npt.NDArray[np.float64]
Statistic = Literal["p50", "p90", "p95", "p99", "mean"]
QUANTILES: dict[Statistic, float] = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
STATISTICS: tuple[Statistic, ...] = (*QUANTILES, "mean")


class Interval(TypedDict):
    """A figure and the ends of its confidence interval, as they stand in JSON."""

    value: float
    low: float
    high: float


def latency_summary(
    samples_ms: Sequence[float], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> dict[str, Interval]:
    """Every one of :data:`STATISTICS` of ``samples_ms`` with its percentile bootstrap interval.

    Quantiles interpolate between samples. Seeded, so it is repeatable. ValueError for no samples,
    and for one that is negative or not finite.
    """
    samples = _checked(samples_ms)
    drawn = samples[_draw(samples.size, resamples, seed)]
    return {
        name: _interval(float(_statistic(samples, name)), _statistic(drawn, name), level)
        for name in STATISTICS
    }


def ratio_interval(
    before_ms: Sequence[float],
    after_ms: Sequence[float],
    statistic: Statistic,
    *,
    paired: bool,
    level: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> Interval:
    """``statistic`` of ``after_ms`` over that of ``before_ms``, with its bootstrap interval.

    ``paired`` redraws rounds, which have to be of the same lists: how much one list takes more than
    another then cancels, and the interval is of the machine's noise alone. Otherwise both are
    redrawn by themselves. ValueError for no samples, a ``before`` of zero, or paired samples that
    differ in number.
    """
    before, after = _checked(before_ms), _checked(after_ms)
    if paired and before.size != after.size:
        raise ValueError(
            f"{before.size} rounds cannot be paired with {after.size}; measure the same lists"
        )
    base = float(_statistic(before, statistic))
    if base <= 0:
        raise ValueError("a ratio needs a time above zero to compare with")
    rows = _draw(before.size, resamples, seed)
    others = rows if paired else _draw(after.size, resamples, seed + 1)
    drawn_before = _statistic(before[rows], statistic)
    ratios = _statistic(after[others], statistic) / np.maximum(drawn_before, np.finfo(float).tiny)
    return _interval(float(_statistic(after, statistic)) / base, ratios, level)


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of ``values`` with its bootstrap interval; ValueError for none."""
    low, high = bootstrap_interval(values)
    return {"value": sum(values) / len(values), "low": low, "high": high}


def share_interval(flags: Sequence[bool]) -> Interval:
    """Share of ``flags`` that hold with its Wilson interval; ValueError for none."""
    low, high = wilson_interval(sum(flags), len(flags))
    return {"value": sum(flags) / len(flags), "low": low, "high": high}


def _checked(samples_ms: Sequence[float]) -> Samples:
    samples = np.asarray(samples_ms, dtype=np.float64)
    if samples.ndim != 1 or samples.size == 0:
        raise ValueError("a percentile needs at least one sample")
    if not np.isfinite(samples).all() or (samples < 0).any():
        raise ValueError("samples are milliseconds: finite and not below zero")
    return samples


def _draw(count: int, resamples: int, seed: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, count, (resamples, count))


def _statistic(samples: Samples, name: Statistic) -> Samples:
    """Along the last axis."""
    if name == "mean":
        return np.asarray(samples.mean(axis=-1))
    return np.asarray(np.quantile(samples, QUANTILES[name], axis=-1))


def _interval(value: float, drawn: Samples, level: float) -> Interval:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return {"value": value, "low": float(low), "high": float(high)}
