"""How good orders are: recall, nDCG, MRR, agreement with a reference, and how they were read."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmr5_bench.evidence.statistics import Interval, mean_interval, share_interval
from mmr5_runtime.agreement import kendall_tau, recall_at, top1
from mmr5_runtime.types import Status

KS = (1, 3, 5)


@dataclass(frozen=True)
class Judged:
    """One answered list: its order, the pages that answer the question, and how it was read.

    ``domain`` is what macro averages go over; ``reference`` the order of the engine it is held
    against, None without one.
    """

    order: tuple[int, ...]
    gold: tuple[int, ...]
    status: Status
    domain: str
    reference: tuple[int, ...] | None = None


def quality_of(judged: Sequence[Judged], domains: Sequence[str] | None = None) -> dict[str, Any]:
    """Every metric as an :class:`Interval`, and ``cases``.

    ``recall@k`` is the mean over lists (micro), ``macro_recall@k`` the mean over ``domains`` of
    each one's mean, 0 for a domain without a list; without ``domains`` those that are there.
    ``kendall_tau`` and ``top1_agreement`` are there when every list has a reference. ``ok``,
    ``repaired`` and ``fallback`` are shares. ValueError for no lists.
    """
    if not judged:
        raise ValueError("no list was answered, so there is no quality to report")
    found: dict[str, Any] = {"cases": len(judged)}
    for k in KS:
        values = [recall_at(one.order, one.gold, k) for one in judged]
        found[f"recall@{k}"] = mean_interval(values)
        found[f"macro_recall@{k}"] = _macro(values, [one.domain for one in judged], domains)
    found["ndcg@5"] = mean_interval([ndcg_at(one.order, one.gold, 5) for one in judged])
    found["mrr"] = mean_interval([reciprocal_rank(one.order, one.gold) for one in judged])
    references = [one.reference for one in judged]
    if all(reference is not None for reference in references):
        pairs = [(one.order, one.reference or ()) for one in judged]
        found["kendall_tau"] = mean_interval([kendall_tau(a, b) for a, b in pairs])
        found["top1_agreement"] = share_interval([top1(a, b) for a, b in pairs])
        found["order_agreement"] = share_interval([a == b for a, b in pairs])
    for status in ("ok", "repaired", "fallback"):
        found[status] = share_interval([one.status == status for one in judged])
    return found


def ndcg_at(order: Sequence[int], gold: Collection[int], k: int) -> float:
    """nDCG of the first ``k`` with relevance 0 or 1 (Järvelin and Kekäläinen, 2002).

    The ideal has min(k, number of gold pages) of them in front; ValueError without any.
    """
    if not gold:
        raise ValueError("nDCG needs at least one relevant (gold) page")
    wanted = set(gold)
    gain = sum(1 / math.log2(place + 2) for place, page in enumerate(order[:k]) if page in wanted)
    ideal = sum(1 / math.log2(place + 2) for place in range(min(k, len(wanted))))
    return gain / ideal


def reciprocal_rank(order: Sequence[int], gold: Collection[int]) -> float:
    """1 / place of the first gold page, counted from 1; 0 when there is none."""
    wanted = set(gold)
    return next((1 / place for place, page in enumerate(order, 1) if page in wanted), 0.0)


def _macro(
    values: Sequence[float], drawn_from: Sequence[str], domains: Sequence[str] | None
) -> Interval:
    """Mean over domains of each one's mean; lists are redrawn inside their domain."""
    by_domain: dict[str, list[float]] = {name: [] for name in domains or ()}
    for name, value in zip(drawn_from, values, strict=True):
        if domains is not None and name not in by_domain:
            raise ValueError(f"domain {name!r} is none of {', '.join(by_domain)}")
        by_domain.setdefault(name, []).append(value)
    rng = np.random.default_rng(0)
    means = np.zeros(2000)
    for found in by_domain.values():
        if found:
            sample = np.asarray(found)
            means += sample[rng.integers(0, len(found), (2000, len(found)))].mean(axis=1)
    count = len(by_domain)
    value = sum(sum(found) / len(found) for found in by_domain.values() if found) / count
    low, high = np.quantile(means / count, [0.025, 0.975])
    return {"value": value, "low": float(low), "high": float(high)}
