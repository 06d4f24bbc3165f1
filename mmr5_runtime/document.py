"""An open document: pages that are encoded once and kept while questions come."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Unpack

from mmr5_runtime.memory import Memory
from mmr5_runtime.options import RerankKeywords
from mmr5_runtime.reuse.page_source import PageSource
from mmr5_runtime.types import RequestError, RerankResult

Rerank = Callable[..., RerankResult]


class Document:
    """Made by :meth:`Reranker.open_document`; close it, or use it as a context manager.

    The embeddings of its pages stay in memory until then, whatever else is asked meanwhile.
    """

    def __init__(
        self, rerank: Rerank, memory: Memory, sources: Sequence[PageSource], keys: Sequence[bytes]
    ) -> None:
        self._rerank, self._memory = rerank, memory
        self._sources, self._keys = tuple(sources), tuple(dict.fromkeys(keys))
        # First pinned, then encoded: nothing can be evicted in between.
        memory.encoder.pin(self._keys)
        self._open = True

    def __len__(self) -> int:
        return len(self._sources)

    def rerank(
        self,
        query: str,
        candidates: Sequence[int] | None = None,
        top_k: int | None = None,
        **options: Unpack[RerankKeywords],
    ) -> RerankResult:
        """Rank the document's pages, or those of the 0-based page numbers ``candidates``.

        ``result.order`` counts candidates; ``result.ranking`` gives page numbers of the document.
        Raises RequestError for a closed document and for page numbers it does not have.
        """
        if not self._open:
            raise RequestError("this document is closed; open it again.")
        chosen = _page_numbers(range(len(self)) if candidates is None else candidates)
        if not chosen:
            raise RequestError("candidates is empty; pass page numbers, or None for all pages.")
        strangers = [page for page in chosen if not 0 <= page < len(self)]
        if strangers:
            raise RequestError(
                f"candidates names page {strangers[0]}, but the document has pages 0 to "
                f"{len(self) - 1}; count pages from 0."
            )
        if len(set(chosen)) < len(chosen):
            raise RequestError("candidates names a page twice; name each page once.")
        sources = [self._sources[page].at(place) for place, page in enumerate(chosen)]
        result = self._rerank(query, sources, top_k, **options)
        return replace(result, candidates=chosen)

    def close(self) -> None:
        """Let the pages go; they stay remembered as long as there is room."""
        if self._open:
            self._memory.encoder.unpin(self._keys)
            self._open = False

    def __enter__(self) -> Document:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _page_numbers(candidates: Sequence[int]) -> tuple[int, ...]:
    try:
        return tuple(map(operator.index, candidates))
    except TypeError:
        raise RequestError(
            f"candidates={candidates!r} is no list of page numbers; pass whole numbers from 0."
        ) from None
