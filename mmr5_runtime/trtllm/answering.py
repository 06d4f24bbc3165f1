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
from mmr5_runtime.decoding import ANSWER_OPEN, EMPTY_REASONING, REASONING_CLOSE
from mmr5_runtime.request import Request
from mmr5_runtime.sampler import SamplingParams
from mmr5_runtime.trtllm.model import BundleModel
from mmr5_runtime.trtllm.prompt import Limits, RunnerPrompt, ShownPage, Written
from mmr5_runtime.trtllm.writing import Room, Writing
from mmr5_runtime.types import ContextOverflowError, ReasoningDelta
from mmr5_runtime.window import Outcome, outcome_of

_LONGEST_FORCED = EMPTY_REASONING + REASONING_CLOSE + ANSWER_OPEN


class BundleRun:
    """One prompt that is answered once or several times."""

    def __init__(self, request: Request, pages: Sequence[int], top: int | None) -> None:
        """``pages``: candidates in the order shown; ``top``: best places that matter, None all.

        Raises ContextOverflowError for a prompt that the engine was not built for.
        """
        model = request.loaded.engine.model
        assert isinstance(model, BundleModel)
        self._request, self._model, self._count = request, model, len(pages)
        self._options = replace(request.options, top_k=top)
        self._plan = request.plan_prompt(pages)
        forced = len(request.loaded.language.encode(_LONGEST_FORCED))
        images = sum(request.bank.planned[index].tokens for index in pages)
        again = 0 if self._options.think == "full" else (self._options.think_budget or 0) + forced
        _check_limits(model.runner.limits, len(self.token_ids), images, again)
        prompt = request.prompt(self._plan, pages)
        self._pages = tuple(
            ShownPage(page.key, page.grid, page.embeddings, partial(self._image, index))
            for index, page in zip(pages, prompt.pages, strict=True)
        )

    @property
    def token_ids(self) -> list[int]:
        return self._plan.token_ids

    def read(self) -> bool:
        """Encode the pages, which is all there is to do before the answer; always True."""
        if not self._model.runner.encodes_pages:
            for page in self._pages:
                page.embeddings()
        self._request.counts.page_prefills += len(self._pages)
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
        request = self._request
        prompt = RunnerPrompt([*self.token_ids, *behind], self._pages, request.budget)
        stops = None if self._options.stop == "eos" else self._model.stops
        with request.timings.span("generate"):
            found = self._model.runner.generate(prompt, limit, params, stops)
        request.timings.mark_token()
        return found

    def _params(self, seed_offset: int) -> SamplingParams:
        params = self._request.params
        if params.temperature == 0.0:
            return params
        # Without a seed TensorRT-LLM draws with seed 0, and so the same every time.
        seed = secrets.randbits(64) if params.seed is None else params.seed
        return replace(params, seed=(seed + seed_offset) % (1 << 64))

    def _image(self, index: int) -> Image.Image:
        """The page at its final size, resized as ``image.preprocess`` does it."""
        source = self._request.sources[index]
        image = source.image()
        for size in self._request.bank.planned[index].sizes:
            if image.size != size:
                image = image.resize(size, Image.Resampling.BICUBIC)
        source.let_go()
        return image


def _check_limits(limits: Limits, prompt: int, images: int, again: int) -> None:
    """``again``: tokens of the answer that a second call may have to read as its prompt."""
    if prompt + again > limits.prompt:
        behind = f" and {again} of reasoning behind it" if again else ""
        raise ContextOverflowError(
            f"the prompt has {prompt} tokens{behind}, but this engine was built for prompts of "
            f"{limits.prompt}; pass fewer pages or a smaller max_pixels, or build it with a larger "
            "max_input_len."
        )
    if images > limits.images:
        raise ContextOverflowError(
            f"the pages have {images} tokens together, but this engine was built for "
            f"{limits.images}; pass fewer pages or a smaller max_pixels, or build it with a larger "
            "max_multimodal_len."
        )
