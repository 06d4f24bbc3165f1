"""Ranking metrics and their uncertainty; pure functions of orders and gold sets."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np


def recall_at(order: Sequence[int], gold: Collection[int], k: int) -> float:
    """Share of ``gold`` among the first ``k`` of ``order`` (the MMDocIR definition).

    With several gold pages Recall@1 cannot reach 1. Raises ValueError without gold.
    """
    if not gold:
        raise ValueError("recall needs at least one gold page")
    return len(set(order[:k]) & set(gold)) / len(set(gold))


def hit_at(order: Sequence[int], gold: Collection[int], k: int) -> float:
    """1.0 when any gold page is among the first ``k`` of ``order``, else 0.0."""
    return float(bool(set(order[:k]) & set(gold)))


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values``; seeded, so it is repeatable."""
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        raise ValueError("a bootstrap needs at least one value")
    rng = np.random.default_rng(seed)
    means = sample[rng.integers(0, sample.size, (resamples, sample.size))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson_interval(successes: int, trials: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion; unlike the bootstrap it is honest at 0 and at 1."""
    if trials < 1:
        raise ValueError("a proportion needs at least one trial")
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * np.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return float(max(0.0, (centre - spread) / scale)), float(min(1.0, (centre + spread) / scale))
