"""Statistics of orders and their uncertainty: pure functions, shared by runtime, export and bench.

An order is a sequence of 0-based pages, best first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np


def kendall_tau(first: Sequence[int], second: Sequence[int]) -> float:
    """Rank correlation of two orders of the same pages: 1 equal, -1 reversed; 1 for one page."""
    place = {page: index for index, page in enumerate(second)}
    places = [place[page] for page in first]
    pairs = len(places) * (len(places) - 1) // 2
    swapped = sum(b < a for i, a in enumerate(places) for b in places[i + 1 :])
    return 1.0 - 2.0 * swapped / pairs if pairs else 1.0


def top1(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two orders begin with the same page; ValueError for an empty one."""
    if not first or not second:
        raise ValueError("an order of no pages has no first one")
    return first[0] == second[0]


def overlap_at(first: Sequence[int], second: Sequence[int], k: int) -> float:
    """Share of the first ``k`` of one order that are among the first ``k`` of the other.

    Of orders of the same pages; 1.0 when ``k`` reaches their end. ValueError for ``k`` below 1 and
    for an empty order.
    """
    size = min(k, len(first))
    if size < 1:
        raise ValueError(f"the first {k} of {len(first)} pages are none; compare one at the least")
    return len(set(first[:k]) & set(second[:k])) / size


def recall_at(order: Sequence[int], relevant: Collection[int], k: int) -> float:
    """Share of ``relevant`` among the first ``k`` of ``order``; ValueError without any."""
    if not relevant:
        raise ValueError("recall needs at least one relevant (gold) page")
    return len(set(order[:k]) & set(relevant)) / len(set(relevant))


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


def paired_interval(
    before: Sequence[float],
    after: Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap interval of the mean of ``after - before``, value by value of the same case.

    Much narrower than two intervals side by side, because hard cases are hard for both. ValueError
    for lengths that differ or no values.
    """
    differences = [b - a for a, b in zip(before, after, strict=True)]
    return bootstrap_interval(differences, level=level, resamples=resamples, seed=seed)


def wilson_interval(successes: int, trials: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion; unlike the bootstrap it is honest at 0 and at 1."""
    if trials < 1:
        raise ValueError("a proportion needs at least one trial")
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * np.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return float(max(0.0, (centre - spread) / scale)), float(min(1.0, (centre + spread) / scale))
