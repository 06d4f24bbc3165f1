"""What a TensorRT-LLM runner is asked for, and what it gives back; no TensorRT-LLM in sight.

A :class:`Runner` takes a prompt once and writes tokens behind it, as often as it is asked, until it
may write no more, a stop word or an end token comes. Whatever a request asks for beyond that (a
budget of reasoning, another sample, what to do with the text) is made of such calls by
:mod:`mmr5_runtime.trtllm.answering`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from mmr5_runtime.image import PixelBudget
from mmr5_runtime.rope import Grid
from mmr5_runtime.sampler import SamplingParams
from mmr5_runtime.trtllm.stops import StopWords
from mmr5_runtime.types import EngineError


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
    """``token_ids`` of our tokenizer, with one image token per embedding."""

    token_ids: Sequence[int]
    pages: Sequence[ShownPage]
    pixels: PixelBudget


class Written(NamedTuple):
    """Tokens that follow a prompt, the end token not among them; ``ended``: whether it came."""

    tokens: list[int]
    ended: bool


class OpenPrompt(Protocol):
    """A prompt whose inputs have been made."""

    def generate(
        self, behind: Sequence[int], limit: int, params: SamplingParams, stops: StopWords | None
    ) -> Written:
        """At most ``limit`` tokens that follow the prompt and what is ``behind`` it already.

        They are ended by an end token or, if there are any, a stop word. Raises EngineError for
        what is behind the prompt if the runner cannot go on from there.
        """
        ...


class Runner(Protocol):
    """Reads prompts and writes what follows; for one thread at a time."""

    @property
    def limits(self) -> Limits: ...

    @property
    def dtype(self) -> torch.dtype:
        """That of page embeddings."""
        ...

    @property
    def ignores(self) -> frozenset[str]:
        """Sampling options that this version takes and does nothing with."""
        ...

    @property
    def encodes_pages(self) -> bool:
        """Whether pages are handed over as images and encoded by TensorRT-LLM itself."""
        ...

    def encode_page(self, pixel_values: Tensor, grid: Grid) -> Tensor:
        """[tokens, hidden] of patches [P, patch_dim] float32; EngineError if it encodes itself."""
        ...

    def open(self, prompt: RunnerPrompt) -> OpenPrompt:
        """Makes the inputs of ``prompt``, its pages encoded or resized."""
        ...

    def close(self) -> None:
        """Lets go of the device; nothing may be asked afterwards."""
        ...


def written(
    tokens: Sequence[int], end_ids: frozenset[int], limit: int, stops: StopWords | None
) -> Written:
    """``tokens`` of an interface that does not say why it stopped, up to the end token.

    Where that is left out, fewer tokens than were allowed and no stop word at their end say as
    much.
    """
    found = _up_to_end(tokens, end_ids)
    short = len(found.tokens) < limit and not _stopped(found.tokens, stops)
    return found if found.ended else Written(found.tokens, short)


def finished(
    tokens: Sequence[int], reason: str | None, end_ids: frozenset[int], stops: StopWords | None
) -> Written:
    """``tokens`` of an interface that says why it stopped: ``stop``, ``length`` or otherwise.

    Raises EngineError for any other reason: there is no answer then.
    """
    if reason not in ("stop", "length"):
        raise EngineError(
            f"TensorRT-LLM gave up on an answer (finish_reason is {reason!r}); ask again."
        )
    found = _up_to_end(tokens, end_ids)
    if found.ended or reason == "length":
        return found
    return Written(found.tokens, not _stopped(found.tokens, stops))


def _up_to_end(tokens: Sequence[int], end_ids: frozenset[int]) -> Written:
    kept = list(tokens)
    for place, token in enumerate(kept):
        if token in end_ids:
            return Written(kept[:place], True)
    return Written(kept, False)


def _stopped(tokens: Sequence[int], stops: StopWords | None) -> bool:
    return stops is not None and stops.at_end(tokens)
