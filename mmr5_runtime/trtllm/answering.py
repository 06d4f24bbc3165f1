"""One prompt of a request, read and answered by TensorRT-LLM.

Takes the place of :class:`~mmr5_runtime.window.WindowRun`: pages become embeddings or images, the
answer is written by :class:`Writing`, and its text becomes an order by the same rules.
"""

from __future__ import annotations

import secrets
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial

from PIL import Image

from mmr5_runtime.answer import ReasoningStream
from mmr5_runtime.planning import PlannedPage
from mmr5_runtime.request import Request
from mmr5_runtime.reuse.page_source import PageSource
from mmr5_runtime.sampler import SamplingParams
from mmr5_runtime.trtllm.model import BundleModel
from mmr5_runtime.trtllm.prompt import OpenPrompt, RunnerPrompt, ShownPage, Written
from mmr5_runtime.trtllm.writing import Room, Writing
from mmr5_runtime.types import ReasoningDelta
from mmr5_runtime.window import Outcome, outcome_of


class BundleRun:
    """One prompt that is answered once or several times."""

    def __init__(self, request: Request, pages: Sequence[int], top: int | None) -> None:
        """``pages``: candidates in the order shown; ``top``: best places that matter, None all."""
        model = request.loaded.engine.model
        assert isinstance(model, BundleModel)
        self._request, self._model, self._count = request, model, len(pages)
        self._options = replace(request.options, top_k=top)
        self._plan = request.plan_prompt(pages)
        prompt = request.prompt(self._plan, pages)
        shown = [
            ShownPage(
                page.key,
                page.grid,
                page.embeddings,
                partial(_image, request.sources[index], request.bank.planned[index]),
            )
            for index, page in zip(pages, prompt.pages, strict=True)
        ]
        self._prompt = RunnerPrompt(self.token_ids, shown, request.budget)
        self._open: OpenPrompt | None = None

    @property
    def token_ids(self) -> list[int]:
        return self._plan.token_ids

    def read(self) -> bool:
        """Encode or resize the pages, all there is to do before the answer; always True."""
        self._open = self._model.runner.open(self._prompt)
        self._request.counts.page_prefills += self._count
        return True

    def answer(self, seed_offset: int = 0) -> Generator[ReasoningDelta, None, Outcome]:
        """One answer; its reasoning comes as a whole when all has been written."""
        request, limits = self._request, self._model.runner.limits
        prompt = len(self.token_ids)
        room = Room(self._plan.max_new_tokens, limits.prompt - prompt, limits.sequence - prompt)
        write = partial(self._write, self._params(seed_offset))
        writing = Writing(write, request.loaded.language, self._count, self._options, room)
        writing.run()
        with request.timings.span("parse"):
            text = request.tokenizer.decode(writing.tokens)
            outcome = outcome_of(writing.answer, text, self._count, self._options)
        if self._options.constrain and not writing.masked and outcome.status == "ok":
            outcome.status = "repaired"
        # Kernels of another library, and cached blocks of other requests: none of it was measured.
        outcome.exactness.append("approximate")
        outcome.decode_steps = writing.decoded
        stream = ReasoningStream()
        if delta := stream.feed(text) + stream.finish():
            yield ReasoningDelta(delta)
        return outcome

    def _write(self, params: SamplingParams, behind: Sequence[int], limit: int) -> Written:
        """One call. When its first token came is known to nobody but TensorRT-LLM."""
        assert self._open is not None
        stops = None if self._options.stop == "eos" else self._model.stops
        with self._request.timings.span("generate"):
            return self._open.generate(behind, limit, params, stops)

    def _params(self, seed_offset: int) -> SamplingParams:
        params = self._request.params
        if params.temperature == 0.0:
            return params
        # Without a seed TensorRT-LLM draws with seed 0, and so the same every time.
        seed = secrets.randbits(64) if params.seed is None else params.seed
        return replace(params, seed=(seed + seed_offset) % (1 << 64))


def _image(source: PageSource, planned: PlannedPage) -> Image.Image:
    """The page at its final size, resized as ``image.preprocess`` does it.

    It knows nothing of the run, which would otherwise hold itself, the request and the engine.
    """
    image = source.image()
    for size in planned.sizes:
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
    source.let_go()
    return image
