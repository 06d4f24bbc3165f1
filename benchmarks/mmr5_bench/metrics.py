"""Ranking metrics and their uncertainty; pure functions of orders and gold sets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmr5_runtime.agreement import bootstrap_interval, recall_at, wilson_interval

__all__ = [
    "bootstrap_interval",
    "bootstrap_ratio_interval",
    "recall_at",
    "wilson_interval",
]


def bootstrap_ratio_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of sum(numerators) / sum(denominators) over whole cases.

    For means over tokens: the tokens of one case are not independent, so cases are redrawn.
    """
    over, under = (np.asarray(v, dtype=np.float64) for v in (numerators, denominators))
    if over.size == 0 or over.shape != under.shape or not (under > 0).all():
        raise ValueError("a ratio needs at least one case, and a positive denominator in each")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, over.size, (resamples, over.size))
    ratios = over[drawn].sum(axis=1) / under[drawn].sum(axis=1)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
