"""The facade: an engine folder in, listwise rerankings of page images out.

Data flow of one request: options are checked and pages opened (``request``), the list is cut into
prompts (``lists``), each prompt is read and answered (``window``), and the orders are put together
(``serving``). What outlives a request is in ``memory``.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

import torch

from mmr5_runtime.consistency import ConsistencyReport
from mmr5_runtime.consistency_check import Query, check
from mmr5_runtime.document import Document
from mmr5_runtime.loading import EngineInfo, LoadedEngine, load_engine
from mmr5_runtime.memory import Memory
from mmr5_runtime.options import RerankKeywords, RerankOptions
from mmr5_runtime.pages import DEFAULT_MAX_IMAGE_PIXELS, Page
from mmr5_runtime.request import open_bank, open_request, open_sources
from mmr5_runtime.reuse.config import CacheConfig
from mmr5_runtime.reuse.page_source import PageSource
from mmr5_runtime.serving import serve
from mmr5_runtime.types import EngineError, RerankResult, StreamEvent


class Reranker:
    """Reranks page images for a question; made by :meth:`load`.

    The model does one thing at a time: :meth:`rerank` calls from several threads wait for each
    other, and open streams take turns event by event, so an idle one holds nobody up. Usable as a
    context manager.
    """

    def __init__(self, loaded: LoadedEngine, memory: Memory) -> None:
        self._loaded: LoadedEngine | None = loaded
        self._memory = memory
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "auto",
        *,
        dtype: str = "auto",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
        verify_hashes: bool = False,
        cache: CacheConfig | None = None,
        profile: str | None = None,
    ) -> Reranker:
        """Load the engine folder that ``mmr5-export`` wrote.

        ``device`` is ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. ``dtype`` is the compute type:
        ``bfloat16`` or ``float32``; ``auto`` takes bfloat16 on a GPU and float32 on a CPU.
        ``min_pixels`` and ``max_pixels`` replace the engine's pixel budget per page;
        ``max_image_pixels`` refuses larger inputs before they are decoded. ``verify_hashes``
        reads every file and compares its SHA-256 (sizes are always compared). ``cache`` bounds
        what is kept from one request to the next; ``profile`` replaces the engine's prompts.

        Raises EngineError for a folder that is missing, incomplete, altered or too new, and for an
        unusable disk cache; RequestError for an option.
        """
        loaded = load_engine(
            Path(path),
            device=device,
            dtype=dtype,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            check_hashes=verify_hashes,
            profile=profile,
        )
        return cls(loaded, Memory(cache or CacheConfig(), loaded, max_image_pixels))

    @property
    def info(self) -> EngineInfo:
        """What was loaded: identity, prompts, compute type, pixel limits, bytes per decode step."""
        return self._require_loaded().info

    @property
    def cache(self) -> Memory:
        """What is kept between requests: ``cache.stats()``, ``cache.clear()``."""
        return self._memory

    def rerank(
        self,
        query: str,
        pages: Sequence[Page],
        top_k: int | None = None,
        **options: Unpack[RerankKeywords],
    ) -> RerankResult:
        """Rank ``pages`` for ``query``, best first; :class:`RerankOptions` explains the options.

        Greedy by default; ``temperature=0.3`` samples as the reference does, repeatably with a
        ``seed``. With ``top_k`` only the first entries of ``result.order`` are the model's.

        Raises RequestError (PageError, ContextOverflowError) naming the input and the remedy.
        """
        events = self._start(query, pages, top_k, options)
        with self._lock, contextlib.closing(events):
            self._require_loaded()
            for event in events:
                if isinstance(event, RerankResult):
                    return event
        raise AssertionError("a stream ends with its result")

    async def arerank(
        self,
        query: str,
        pages: Sequence[Page],
        top_k: int | None = None,
        **options: Unpack[RerankKeywords],
    ) -> RerankResult:
        """:meth:`rerank` in a worker thread; takes the same options."""
        return await asyncio.to_thread(self.rerank, query, pages, top_k, **options)

    def rank(
        self,
        query: str,
        pages: Sequence[Page],
        top_k: int | None = None,
        **options: Unpack[RerankKeywords],
    ) -> list[dict[str, Any]]:
        """The list that sentence-transformers' ``CrossEncoder.rank`` gives.

        Each entry has ``corpus_id`` (0-based) and ``score`` (by rank, strictly decreasing).
        """
        result = self.rerank(query, pages, top_k, **options)
        return [
            {"corpus_id": index, "score": score}
            for index, score in zip(result.top, result.scores, strict=False)
        ]

    def stream(
        self,
        query: str,
        pages: Sequence[Page],
        top_k: int | None = None,
        **options: Unpack[RerankKeywords],
    ) -> Generator[StreamEvent, None, None]:
        """Yield :class:`ReasoningDelta` as the model reasons, then the :class:`RerankResult`.

        Bad input raises here, before the first event is asked for. Closing the generator stops
        decoding.
        """
        return self._take_turns(self._start(query, pages, top_k, options))

    def open_document(self, pages: Sequence[Page]) -> Document:
        """Open and encode ``pages`` now and keep them in memory until the document is closed.

        Raises RequestError when they do not fit the cache together; nothing is pinned then.
        """
        loaded = self._require_loaded()
        sources = open_sources(self._memory, pages)
        bank = open_bank(loaded, self._memory, sources, loaded.budget)
        document = Document(self.rerank, self._memory, sources, bank.keys)
        try:
            for index in range(len(bank)):
                with self._lock:
                    self._require_loaded()
                    bank.encode(index)
        except BaseException:
            document.close()
            raise
        return document

    def check(
        self, queries: Sequence[Query], a: RerankKeywords, b: RerankKeywords
    ) -> ConsistencyReport:
        """How far the orders under options ``b`` agree with those under options ``a``.

        Each of ``queries`` is ``(question, pages)`` or ``(question, pages, relevant)``, the last
        the 0-based indices of the pages that answer it; recall is reported where all have them.
        """
        return check(self.rerank, queries, a, b)

    def _take_turns(
        self, events: Generator[StreamEvent, None, None]
    ) -> Generator[StreamEvent, None, None]:
        with contextlib.closing(events):
            while True:
                with self._lock:
                    self._require_loaded()
                    event = next(events, None)
                if event is None:
                    return
                yield event

    def _start(
        self,
        query: str,
        pages: Sequence[Page] | Sequence[PageSource],
        top_k: int | None,
        options: RerankKeywords,
    ) -> Generator[StreamEvent, None, None]:
        """Check and open everything now; the model runs when the events are asked for."""
        loaded = self._require_loaded()
        asked = RerankOptions(top_k=top_k, **options)
        return serve(open_request(loaded, self._memory, query, pages, asked))

    def close(self) -> None:
        """Free the model and what was kept; further calls raise EngineError.

        Waits for a running request. A stream that is still open keeps the model until it is closed.
        """
        with self._lock:
            self._loaded = None
            self._memory.clear()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def __enter__(self) -> Reranker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _require_loaded(self) -> LoadedEngine:
        if self._loaded is None:
            raise EngineError("this Reranker is closed; load the engine again.")
        return self._loaded
