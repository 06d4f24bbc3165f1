"""What a TensorRT-LLM runner is asked for, and what it gives back; no TensorRT-LLM in sight.

A :class:`Runner` reads a prompt and writes tokens until it may write no more, a stop word or an end
token comes. Whatever a request asks for beyond that (a budget of reasoning, another sample, what to
do with the text) is made of such calls by :mod:`mmr5_runtime.trtllm.answering`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from PIL import Image
from torch import Tensor

from mmr5_runtime.image import PixelBudget
from mmr5_runtime.rope import Grid
from mmr5_runtime.sampler import SamplingParams
from mmr5_runtime.trtllm.stops import StopWords


@dataclass(frozen=True)
class Limits:
    """What an engine was built for, in tokens: whole sequences, prompts, image tokens of one."""

    sequence: int
    prompt: int
    images: int


@dataclass(frozen=True, eq=False)
class ShownPage:
    """One page of a prompt, in the two forms that runners take.

    ``key`` (32 bytes) names its embeddings. ``embeddings()`` gives [tokens, hidden] on the runner's
    device, ``image()`` the RGB page at the size at which it is cut into patches.
    """

    key: bytes
    grid: Grid
    embeddings: Callable[[], Tensor]
    image: Callable[[], Image.Image]

    @property
    def patches(self) -> int:
        """Patches before merging."""
        frames, rows, columns = self.grid
        return frames * rows * columns


@dataclass(frozen=True, eq=False)
class RunnerPrompt:
    """``token_ids`` of our tokenizer, one image token per embedding, what was written included."""

    token_ids: Sequence[int]
    pages: Sequence[ShownPage]
    pixels: PixelBudget


class Written(NamedTuple):
    """Tokens that follow a prompt, the end token not among them; ``ended``: whether it came."""

    tokens: list[int]
    ended: bool


class Runner(Protocol):
    """Reads prompts and writes what follows; for one thread at a time."""

    @property
    def limits(self) -> Limits: ...

    @property
    def encodes_pages(self) -> bool:
        """Whether pages are handed over as images and encoded by TensorRT-LLM itself."""
        ...

    def encode_page(self, pixel_values: Tensor, grid: Grid) -> Tensor:
        """[tokens, hidden] of patches [P, patch_dim] float32; EngineError if it encodes itself."""
        ...

    def generate(
        self, prompt: RunnerPrompt, limit: int, params: SamplingParams, stops: StopWords | None
    ) -> Written:
        """At most ``limit`` tokens, ended by an end token or, if there are any, a stop word."""
        ...


def written(
    tokens: Sequence[int], end_ids: frozenset[int], limit: int, stops: StopWords | None
) -> Written:
    """``tokens`` as a runner gave them, up to the end token.

    Not every interface returns the end token; where it does not, fewer tokens than were allowed
    and no stop word at their end say as much.
    """
    kept = list(tokens)
    for place, token in enumerate(kept):
        if token in end_ids:
            return Written(kept[:place], True)
    stopped = stops is not None and stops.at_end(kept)
    return Written(kept, len(kept) < limit and not stopped)
