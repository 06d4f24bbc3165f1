"""Page metrics of MMDocIR: orders and gold pages in, micro and macro figures out.

An order has 0-based pages of the question's document, best first; gold is ``page_id`` as the
annotations have it. Restated from ``metric_eval.py`` of github.com/MMDocRAG/MMDocIR:

* recall@k of a question is the share of its *list* of gold pages that is among the first k; 0
  without gold pages. ``mmr5_runtime.agreement.recall_at`` differs: it counts a gold page once and
  refuses a question without any.
* ndcg@5 and mrr are those of ``mmr5_bench.evidence.quality``; 0 without gold pages. The official
  nDCG takes the ideal of as many pages as were ranked, so that a gold page that the first stage
  lost would cost nothing; here it costs.
* micro is the mean over questions; macro the mean over the *ten* domains of the mean over each
  one's questions, where a domain without a question counts 0.

Values are computed question by question; every average is of such a list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mmr5_bench.evidence.quality import ndcg_at, reciprocal_rank
from mmr5_bench.mmdocir.annotations import DOMAINS

KS = (1, 3, 5)
SINGLE_DOCUMENT_DOMAIN = "News"  # one document, and a tenth of the macro average


@dataclass(frozen=True)
class Ranked:
    """What was made of one question: its document and domain, the order, the gold pages."""

    document: int
    domain: str
    order: tuple[int, ...]
    gold: tuple[int, ...]


def recall_at(order: Sequence[int], gold: Sequence[int], k: int) -> float:
    """Share of ``gold`` among the first ``k`` of ``order``; its denominator is ``len(gold)``.

    0.0 without gold pages. A ``k`` beyond the order takes all of it. ValueError for ``k`` below 1.
    """
    _check(k)
    return len(set(order[:k]) & set(gold)) / len(gold) if gold else 0.0


def ceiling_at(gold: Sequence[int], k: int, candidates: Iterable[int] | None = None) -> float:
    """recall@k of a perfect ranker; of ``candidates`` alone where they are given."""
    _check(k)
    within = set(gold) if candidates is None else set(gold) & set(candidates)
    return min(k, len(within)) / len(gold) if gold else 0.0


METRICS: dict[str, Callable[[Ranked], float]] = {
    "recall@1": lambda ranked: recall_at(ranked.order, ranked.gold, 1),
    "recall@3": lambda ranked: recall_at(ranked.order, ranked.gold, 3),
    "recall@5": lambda ranked: recall_at(ranked.order, ranked.gold, 5),
    "ndcg@5": lambda ranked: ndcg_at(ranked.order, ranked.gold, 5) if ranked.gold else 0.0,
    "mrr": lambda ranked: reciprocal_rank(ranked.order, ranked.gold),
}
RECALLS = tuple(f"recall@{k}" for k in KS)
_PLACES = {**{f"recall@{k}": k for k in KS}, "ndcg@5": 5}  # the first so many; mrr looks at all


def needs_more(metric: str, places: int | None) -> bool:
    """Whether ``metric`` looks beyond the first ``places`` of an order; None stands for all."""
    return places is not None and _PLACES.get(metric, places + 1) > places


def micro(values: Sequence[float]) -> float:
    """Mean over questions; ValueError for none."""
    if not values:
        raise ValueError("an average needs at least one question")
    return math.fsum(values) / len(values)


def by_domain(values: Sequence[float], domains: Sequence[str]) -> dict[str, float]:
    """Mean over the questions of each of the ten domains, 0.0 where there is none.

    ``domains`` has the domain of every value. ValueError for one that is none of the ten, and for
    sequences of different lengths.
    """
    held: dict[str, list[float]] = {domain: [] for domain in DOMAINS}
    for value, domain in zip(values, domains, strict=True):
        if domain not in held:
            raise ValueError(f"{domain!r} is no domain of MMDocIR; the ten are in DOMAINS")
        held[domain].append(value)
    return {name: math.fsum(found) / len(found) if found else 0.0 for name, found in held.items()}


def macro(values: Sequence[float], domains: Sequence[str], *, without: Sequence[str] = ()) -> float:
    """Mean of :func:`by_domain` over the ten domains, whether or not they have questions.

    Domains ``without`` are left out of sum and count.
    """
    found = by_domain(values, domains)
    kept = [value for name, value in found.items() if name not in without]
    return math.fsum(kept) / len(kept)


def _check(k: int) -> None:
    if k < 1:
        raise ValueError(f"k={k} looks at no page; ask for 1 or more")
