"""The backbone of an engine folder whose prompts are read and answered by TensorRT-LLM.

It stands where the other backbones stand so that pages, plans, caches and results need not know the
difference: it has the architecture, encodes pages if TensorRT does, and holds the runner. It has no
steps. Prompts never reach the methods that would make them, since
:class:`~mmr5_runtime.trtllm.answering.BundleRun` takes a window instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NoReturn

import torch
from torch import Tensor

from mmr5_runtime.backbone import Backbone
from mmr5_runtime.capacity import KVFormat
from mmr5_runtime.decoder import here
from mmr5_runtime.decoding import ANSWER_OPEN, EMPTY_REASONING, REASONING_CLOSE
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.options import RerankOptions
from mmr5_runtime.planning import PromptLimits
from mmr5_runtime.rope import Grid
from mmr5_runtime.spec import ModelSpec
from mmr5_runtime.trtllm.prompt import Runner
from mmr5_runtime.trtllm.stops import StopWords
from mmr5_runtime.types import EngineError

_LONGEST_FORCED = EMPTY_REASONING + REASONING_CLOSE + ANSWER_OPEN


class BundleModel:
    """A :class:`~mmr5_runtime.backbone.Backbone` over a :class:`Runner`."""

    kv: KVFormat = "bf16"  # of our own arenas, of which there are none

    def __init__(
        self,
        spec: ModelSpec,
        runner: Runner,
        stops: StopWords,
        device: torch.device,
    ) -> None:
        self.spec, self.runner, self.stops = spec, runner, stops
        self._device = device

    @property
    def dtype(self) -> torch.dtype:
        """That of page embeddings."""
        return self.runner.dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def step_bytes(self) -> int:
        """0: what a compiled engine reads is not known here."""
        return 0

    @property
    def independent_sequences(self) -> bool:
        """One request runs at a time."""
        return True

    def here(self) -> AbstractContextManager[object]:
        return here(self._device)

    def encode_page(self, pixel_values: Tensor, grid: Grid) -> Tensor:
        """Raises EngineError where TensorRT-LLM takes images and encodes them itself."""
        return self.runner.encode_page(pixel_values, grid)

    def new_arena(self, capacity: int) -> KVArena:
        self._no_steps()

    def embed(self, token_ids: Tensor) -> Tensor:
        self._no_steps()

    def read(
        self,
        embeds: Tensor,
        positions: Tensor,
        arenas: Sequence[KVArena],
        lengths: Sequence[int],
    ) -> Tensor:
        self._no_steps()

    def logits(self, hidden: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        self._no_steps()

    def _no_steps(self) -> NoReturn:
        raise EngineError(
            "TensorRT-LLM reads prompts and decodes answers as a whole and has no single steps; "
            "load the engine with backend='native' for what needs them."
        )


def prompt_limits(
    model: Backbone, options: RerankOptions, encode: Callable[[str], list[int]]
) -> PromptLimits:
    """What prompts of a request may have beside the context: nothing is settled elsewhere.

    Where text is forced into an answer, the call behind it reads the answer so far as its prompt.
    """
    if not isinstance(model, BundleModel):
        return PromptLimits()
    again = 0
    if options.think != "full":
        again = (options.think_budget or 0) + len(encode(_LONGEST_FORCED))
    limits = model.runner.limits
    return PromptLimits(limits.prompt, limits.images, again)
