"""The facade: an engine folder in, listwise rerankings of page images out.

Data flow of one request: options are checked and pages opened (``request``), the list is cut into
prompts (``lists``), each prompt is read and answered (``window``), and the orders are put together
(``serving``). What outlives a request is in ``memory``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

import torch

from mmr5_runtime.backends import BackendName
from mmr5_runtime.batching import Seat, StepBatcher
from mmr5_runtime.capacity import KVFormat
from mmr5_runtime.compute import Kernels, Prefill
from mmr5_runtime.consistency import ConsistencyReport
from mmr5_runtime.consistency_check import Query, check
from mmr5_runtime.document import Document
from mmr5_runtime.loading import EngineInfo, LoadedEngine, load_engine
from mmr5_runtime.memory import Memory
from mmr5_runtime.model import MAX_DECODE_SEQUENCES
from mmr5_runtime.options import RerankKeywords, RerankOptions
from mmr5_runtime.pages import DEFAULT_MAX_IMAGE_PIXELS, Page
from mmr5_runtime.request import open_bank, open_request, open_sources
from mmr5_runtime.reuse.config import CacheConfig
from mmr5_runtime.reuse.page_source import PageSource
from mmr5_runtime.serving import serve
from mmr5_runtime.trtllm.loading import BACKEND as TENSORRT_LLM
from mmr5_runtime.trtllm.model import BundleModel
from mmr5_runtime.trtllm.options import check_document, check_options
from mmr5_runtime.turns import Turns
from mmr5_runtime.types import EngineError, RequestError, RerankResult, StreamEvent
from mmr5_runtime.warming import warm_up


class Reranker:
    """Reranks page images for a question; made by :meth:`load`.

    One request runs at a time, or up to ``concurrency`` of them: further :meth:`rerank` calls wait
    in the order of their coming, and open streams take turns event by event, so an idle one holds
    nobody up. Usable as a context manager.
    """

    def __init__(self, loaded: LoadedEngine, memory: Memory, concurrency: int = 1) -> None:
        """Raises RequestError for a ``concurrency`` that is not 1 to 8."""
        _check_concurrency(concurrency, loaded.backend)
        self._loaded: LoadedEngine | None = loaded
        self._memory = memory
        self._running = Turns(concurrency)
        self._batcher = StepBatcher(loaded.engine, Turns()) if concurrency > 1 else None

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
        kernels: Kernels = "auto",
        prefill: Prefill = "exact",
        kv: KVFormat = "bf16",
        graphs: bool | None = None,
        concurrency: int = 1,
        backend: BackendName = "auto",
    ) -> Reranker:
        """Load the engine folder that ``mmr5-export`` wrote.

        ``device`` is ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. ``dtype`` is the compute type:
        ``bfloat16`` or ``float32``; ``auto`` takes bfloat16 on a GPU and float32 on a CPU.
        ``min_pixels`` and ``max_pixels`` replace the engine's pixel budget per page;
        ``max_image_pixels`` refuses larger inputs before they are decoded. ``verify_hashes``
        reads every file and compares its SHA-256 (sizes are always compared). ``cache`` bounds
        what is kept from one request to the next; ``profile`` replaces the engine's prompts.

        ``kernels``: ``portable`` computes with torch alone; ``triton`` also with the Triton kernels
        of this package (on a GPU, in bfloat16), ``cuda`` with its CUDA C++ kernels too; ``auto``
        with those of them that were proven on this GPU. ``prefill``: ``int8`` and ``fp8`` read
        prompts with a second, 8-bit copy of int4 weights: approximate, meant for speed, not timed
        on a GPU yet. ``kv``: ``int8`` keeps keys and values in 8 bits, half the memory and
        approximate; ``bf16`` in the compute type. ``graphs`` records decode steps as CUDA graphs,
        by default wherever the Triton kernels run them; see also :meth:`warm_up`.

        ``concurrency`` requests (1 to 8) run at once when they come from several threads: prompts
        are read one at a time, page by page, and answers decoded together, which reads the weights
        once for all of them. Each holds keys and values of its own. Where decode steps are plain
        torch, as on a CPU, the last bits of logits then depend on what else is being decoded, so
        that a tie may be decided otherwise from run to run; those of the Triton kernels do not.
        In ONNX Runtime a pass decodes one sequence after the other: the weights are read for each,
        and no bit depends on the others.

        ``backend``: ``native`` runs the weights in PyTorch with the kernels above;
        ``onnxruntime`` the graphs of a folder that was exported with ``--backend onnxruntime``,
        which round the inputs of quantized linears to 8 bits; ``auto`` takes those for a quantized
        engine on a CPU when the folder has them, onnxruntime is installed and no option asks for
        the native engine. ``tensorrt-llm`` runs a bundle that ``--backend tensorrt-llm`` wrote,
        where TensorRT-LLM is installed; some options mean something else there, see
        :mod:`mmr5_runtime.trtllm`. That has never been executed.

        Raises EngineError for a folder that is missing, incomplete, altered or too new, for an
        unusable disk cache, and for a GPU, driver or Triton that does not serve what was asked;
        OutOfMemoryError when the weights do not fit; RequestError for an option.
        """
        _check_concurrency(concurrency, backend)
        loaded = load_engine(
            Path(path),
            device=device,
            dtype=dtype,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            check_hashes=verify_hashes,
            profile=profile,
            kernels=kernels,
            prefill=prefill,
            kv=kv,
            graphs=graphs,
            backend=backend,
        )
        memory = Memory(cache or CacheConfig(), loaded, max_image_pixels)
        return cls(loaded, memory, concurrency)

    def warm_up(self) -> int:
        """Run everything once, so that the first request does not pay for it.

        Kernels are compiled and the usual decode steps recorded; seconds on a GPU. Returns how many
        steps are recorded: 0 where they run in plain torch.
        """
        with self._running.take(self._running.count):
            return warm_up(self._require_loaded(), self._running.count)

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
        events = self._start(query, pages, top_k, options, self._seat())
        with self._running.take(), contextlib.closing(events):
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
        seat = self._seat()
        return self._take_turns(self._start(query, pages, top_k, options, seat), seat)

    def open_document(self, pages: Sequence[Page]) -> Document:
        """Open and encode ``pages`` now and keep them in memory until the document is closed.

        Raises RequestError when they do not fit the cache together, and on TensorRT-LLM's LLM API;
        nothing is pinned then.
        """
        loaded = self._require_loaded()
        if isinstance(loaded.engine.model, BundleModel):
            check_document(loaded.engine.model.runner)
        sources = open_sources(self._memory, pages)
        bank = open_bank(loaded, self._memory, sources, loaded.budget)
        document = Document(self.rerank, self._memory, sources, bank.keys)
        try:
            with contextlib.closing(bank):
                for index in range(len(bank)):
                    with self._running.take(), self._model():
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
        self, events: Generator[StreamEvent, None, None], seat: Seat | None
    ) -> Generator[StreamEvent, None, None]:
        with contextlib.closing(events):
            while True:
                back = contextlib.nullcontext() if seat is None else seat.back()
                with self._running.take(), back:
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
        seat: Seat | None,
    ) -> Generator[StreamEvent, None, None]:
        """Check and open everything now; the model runs when the events are asked for."""
        loaded = self._require_loaded()
        asked = RerankOptions(top_k=top_k, **options)
        if isinstance(loaded.engine.model, BundleModel):
            check_options(asked, loaded.engine.model.runner.ignores)
        return serve(open_request(loaded, self._memory, query, pages, asked, seat))

    def _seat(self) -> Seat | None:
        return None if self._batcher is None else self._batcher.seat()

    def _model(self) -> contextlib.AbstractContextManager[None]:
        """The model alone; whoever runs has it anyway where only one may run."""
        return contextlib.nullcontext() if self._batcher is None else self._batcher.model.take()

    def close(self) -> None:
        """Free the model and what was kept; further calls raise EngineError.

        Waits for running requests. A stream that is still open keeps the model until it is closed.
        """
        with self._running.take(self._running.count):
            if self._loaded is not None and isinstance(self._loaded.engine.model, BundleModel):
                self._loaded.engine.model.runner.close()
            self._loaded = None
            self._batcher = None
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


def _check_concurrency(concurrency: int, backend: str) -> None:
    """Raises RequestError for a number that is not served, or not by ``backend``."""
    whole = isinstance(concurrency, int) and not isinstance(concurrency, bool)
    if not (whole and 1 <= concurrency <= MAX_DECODE_SEQUENCES):
        raise RequestError(
            f"concurrency={concurrency!r} is not a whole number from 1 to {MAX_DECODE_SEQUENCES}; "
            "pass 1 to serve one request at a time."
        )
    if concurrency > 1 and backend == TENSORRT_LLM:
        raise RequestError(
            f"concurrency={concurrency} decodes answers together on our own engines; leave it out "
            "on the TensorRT-LLM backend."
        )
