"""The same questions under two sets of options, compared order by order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias

from mmr5_runtime.consistency import CaseOrders, ConsistencyReport, compare_orders
from mmr5_runtime.options import RerankKeywords
from mmr5_runtime.pages import Page
from mmr5_runtime.types import RequestError, RerankResult

Query: TypeAlias = tuple[str, Sequence[Page]] | tuple[str, Sequence[Page], Collection[int]]


def check(
    rerank: Callable[..., RerankResult],
    queries: Sequence[Query],
    a: RerankKeywords,
    b: RerankKeywords,
) -> ConsistencyReport:
    """Rerank every query under both sets of options; see :meth:`Reranker.check`.

    Raises RequestError for no queries, and naming a query whose relevant pages are not there.
    """
    if not queries:
        raise RequestError("there are no queries to compare; pass at least one.")
    cases = []
    for number, query in enumerate(queries, start=1):
        if not isinstance(query, tuple) or len(query) not in (2, 3):
            raise RequestError(
                f"query {number} is no (question, pages) or (question, pages, relevant); pass "
                "tuples of two or three."
            )
        question, pages, *rest = query
        relevant = tuple(sorted(set(rest[0]))) if rest else None
        if relevant is not None and not all(0 <= page < len(pages) for page in relevant):
            raise RequestError(
                f"query {number} names relevant pages {relevant} of {len(pages)}; count from 0."
            )
        first, second = (rerank(question, pages, **options).order for options in (a, b))
        cases.append(CaseOrders(first, second, relevant))
    return compare_orders(cases)
