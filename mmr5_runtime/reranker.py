"""The facade: an engine folder in, listwise rerankings of page images out.

Data flow of one request: pages are opened and their token counts planned from their sizes (the
context is checked before any page is resized), resized to patches, encoded by the vision tower,
placed into the prompt, prefilled and decoded; the text is parsed into a permutation.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from PIL import Image

from mmr5_runtime.answer import ReasoningStream, parse_answer
from mmr5_runtime.engine import Generation
from mmr5_runtime.image import PixelBudget, preprocess
from mmr5_runtime.loading import LoadedEngine, load_engine
from mmr5_runtime.pages import DEFAULT_MAX_IMAGE_PIXELS, Page, open_page
from mmr5_runtime.planning import ContextPlan, plan_context
from mmr5_runtime.prompt import PromptTokenizer, check_query
from mmr5_runtime.sampler import Sampler, SamplingParams
from mmr5_runtime.timing import Timings
from mmr5_runtime.types import (
    EngineError,
    ReasoningDelta,
    RequestError,
    RerankResult,
    StreamEvent,
    Usage,
)

DEFAULT_MAX_NEW_TOKENS = 2048


class Reranker:
    """Reranks page images for a question; made by :meth:`load`.

    The model does one thing at a time: :meth:`rerank` calls from several threads wait for each
    other, and open streams take turns event by event, so an idle one holds nobody up. Usable as a
    context manager.
    """

    def __init__(self, loaded: LoadedEngine, *, max_image_pixels: int) -> None:
        self._loaded: LoadedEngine | None = loaded
        self._max_image_pixels = max_image_pixels
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
    ) -> Reranker:
        """Load the engine folder that ``mmr5-export`` wrote.

        ``device`` is ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. ``dtype`` is the compute type:
        ``bfloat16`` or ``float32``; ``auto`` takes bfloat16 on a GPU and float32 on a CPU.
        ``min_pixels`` and ``max_pixels`` replace the engine's pixel budget per page;
        ``max_image_pixels`` refuses larger inputs before they are decoded. ``verify_hashes``
        reads every file and compares its SHA-256 (sizes are always compared).

        Raises EngineError for a folder that is missing, incomplete, altered or too new.
        """
        loaded = load_engine(
            Path(path),
            device=device,
            dtype=dtype,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            check_hashes=verify_hashes,
        )
        return cls(loaded, max_image_pixels=max_image_pixels)

    def rerank(
        self,
        query: str,
        pages: Sequence[Page],
        top_k: int | None = None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        temperature: float = 0.0,
        seed: int | None = None,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> RerankResult:
        """Rank ``pages`` for ``query``, best first.

        Greedy by default; ``temperature=0.3`` samples as the reference does, repeatably with a
        ``seed``. ``top_k`` limits ``result.top``, not ``result.order``. Pixel limits given here
        hold for this call.

        Raises RequestError (PageError, ContextOverflowError) naming the input and the remedy.
        """
        events = self._start(
            query, pages, top_k, max_new_tokens, temperature, seed, min_pixels, max_pixels
        )
        with self._lock, contextlib.closing(events):
            self._require_loaded()
            for event in events:
                if isinstance(event, RerankResult):
                    return event
        raise AssertionError("a stream ends with its result")

    async def arerank(self, query: str, pages: Sequence[Page], **options: Any) -> RerankResult:
        """:meth:`rerank` in a worker thread; takes the same options."""
        return await asyncio.to_thread(self.rerank, query, pages, **options)

    def rank(
        self, query: str, pages: Sequence[Page], top_k: int | None = None, **options: Any
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
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        temperature: float = 0.0,
        seed: int | None = None,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Generator[StreamEvent, None, None]:
        """Yield :class:`ReasoningDelta` as the model reasons, then the :class:`RerankResult`.

        Bad input raises here, before the first event is asked for. Closing the generator stops
        decoding.
        """
        return self._take_turns(
            self._start(
                query, pages, top_k, max_new_tokens, temperature, seed, min_pixels, max_pixels
            )
        )

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
        pages: Sequence[Page],
        top_k: int | None,
        max_new_tokens: int,
        temperature: float,
        seed: int | None,
        min_pixels: int | None,
        max_pixels: int | None,
    ) -> Generator[StreamEvent, None, None]:
        """Check and open everything now; the model runs when the events are asked for."""
        loaded = self._require_loaded()
        check_query(query)
        _check_options(pages, top_k, max_new_tokens)
        budget = loaded.budget.replaced(min_pixels, max_pixels)
        params = SamplingParams.from_generation_config(
            loaded.generation_config, temperature=temperature, seed=seed
        )
        timings = Timings(loaded.engine.device)
        with timings.span("load_pages"):
            images = [
                open_page(page, max_image_pixels=self._max_image_pixels, index=index)
                for index, page in enumerate(pages)
            ]
        plan = plan_context(
            loaded.tokenizer,
            loaded.engine.spec.vision,
            loaded.context,
            query,
            pages,
            [image.size for image in images],
            budget,
            max_new_tokens,
        )
        return self._run(loaded, images, budget, plan, params, top_k, timings)

    def _run(
        self,
        loaded: LoadedEngine,
        images: Sequence[Image.Image],
        budget: PixelBudget,
        plan: ContextPlan,
        params: SamplingParams,
        top_k: int | None,
        timings: Timings,
    ) -> Generator[StreamEvent, None, None]:
        engine = loaded.engine
        embeddings, grids = [], []
        for image in images:
            with timings.span("preprocess"):
                patched = preprocess(image, budget, **loaded.image_settings)
            with timings.span("vision"):
                embeddings.append(engine.encode_page(patched.pixel_values, patched.grid))
            grids.append(patched.grid)
        sampler = Sampler(params, plan.token_ids, engine.spec.text.vocab_size, engine.device)
        generation = Generation(
            engine, plan.token_ids, embeddings, grids, sampler, plan.max_new_tokens, timings
        )
        text = yield from _stream_text(loaded.tokenizer, generation)
        with timings.span("parse"):
            parsed = parse_answer(text, len(images))
        yield RerankResult(
            order=parsed.order,
            status=parsed.status,
            stop_reason=generation.stop_reason,
            text=text,
            reasoning=parsed.reasoning,
            usage=Usage(
                prompt_tokens=len(plan.token_ids),
                image_tokens=sum(len(page) for page in embeddings),
                completion_tokens=generation.num_tokens,
                pages=len(images),
            ),
            top_k=top_k,
            timings_ms=timings.total(),
        )

    def close(self) -> None:
        """Free the model; further calls raise EngineError. Waits for a running request."""
        with self._lock:
            self._loaded = None
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


def _stream_text(
    tokenizer: PromptTokenizer, generation: Generation
) -> Generator[ReasoningDelta, None, str]:
    """Yield the reasoning while it is decoded; returns the whole text."""
    decoder, reasoning, text = tokenizer.stream(), ReasoningStream(), []
    for token in generation:
        text.append(decoder.feed(token))
        if delta := reasoning.feed(text[-1]):
            yield ReasoningDelta(delta)
    text.append(decoder.flush())
    if delta := reasoning.feed(text[-1]) + reasoning.finish():
        yield ReasoningDelta(delta)
    return "".join(text)


def _check_options(pages: Sequence[Page], top_k: int | None, max_new_tokens: int) -> None:
    if isinstance(pages, str | bytes) or not isinstance(pages, Sequence):
        raise RequestError(
            f"pages is a {type(pages).__name__}; pass a list of pages, even for a single one."
        )
    if not pages:
        raise RequestError("no pages were given; pass at least one page to rank.")
    if top_k is not None and top_k < 1:
        raise RequestError(f"top_k={top_k} asks for nothing; pass 1 or more, or None for all.")
    if max_new_tokens < 1:
        raise RequestError(f"max_new_tokens={max_new_tokens} leaves no room; pass 1 or more.")
