"""What a peer is: something that answers lists of pages, opened once and asked list by list.

``ListWork`` -> ``Session.answer`` (timed) -> ``Answer`` -> ``check``, with ``Session.reading``

A comparison means something only where everybody read the same prompt and the same pixels, so
every session also says what it read, and one check holds that against the work. A difference ends
the peer's part in the run; it is never averaged into a figure.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from mmr5_runtime.image import PixelBudget
from mmr5_runtime.rope import Grid
from mmr5_runtime.types import Mmr5Error, Status

Shape = Literal["7b", "tiny"]


class PeerError(Mmr5Error, RuntimeError):
    """A peer cannot go on; the message names it and the remedy."""


class WorkMismatchError(PeerError):
    """A peer read another prompt, other pixels or wrote another length than it was asked for."""


@dataclass(frozen=True)
class Setting:
    """What all peers of a run are opened with.

    ``checkpoint`` is the unquantized Hugging Face folder and ``engines`` are engine folders made
    from it, by quantization; ``random`` asks for random weights of a shape instead of both.
    ``packed`` is a checkpoint that ``mmr5-export --checkpoint-out`` wrote, for vLLM.
    ``llama_server`` is the address of a running ``llama-server``. ``dtype`` is what is computed in:
    ``float32`` or ``bfloat16``.
    """

    checkpoint: Path | None = None
    engines: Mapping[str, Path] = field(default_factory=dict)
    random: Shape | None = None
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    packed: Path | None = None
    llama_server: str | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a CUDA one."""
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class ListWork:
    """One question over pages, and the prompt that everybody has to read for it.

    ``pages`` are image files as bytes; ``prompt_ids`` is the whole prompt with one id per visual
    token, ``grids`` are (1, rows, columns) in patches of every page under ``budget``. At most
    ``max_new_tokens`` are written, the end token included, and with ``forced`` exactly as many.
    ``gold`` are the 0-based pages that answer the question, empty where nobody knows.
    ``image_tokens`` of the prompt are visual ones.
    """

    question: str
    pages: tuple[bytes, ...]
    prompt_ids: tuple[int, ...]
    grids: tuple[Grid, ...]
    budget: PixelBudget
    max_new_tokens: int
    image_tokens: int
    forced: bool = False
    gold: tuple[int, ...] = ()
    domain: str = ""

    @cached_property
    def digest(self) -> str:
        """Hash of everything that decides what is computed."""
        parts = (
            self.question,
            [hashlib.sha256(page).hexdigest() for page in self.pages],
            self.prompt_ids,
            self.grids,
            (self.budget.min_pixels, self.budget.max_pixels),
            (self.max_new_tokens, self.forced),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Answer:
    """What a peer made of a list.

    ``order`` is a permutation of the pages, best first, read as ``status`` says. ``tokens`` counts
    what was written, the end token included. ``token_ids`` are those tokens where the peer shows
    them. ``stages_ms`` has the stages that it can tell apart; ``ttft_ms`` is the time from the
    request to the first token.
    """

    text: str
    order: tuple[int, ...]
    status: Status
    tokens: int
    token_ids: tuple[int, ...] | None = None
    ttft_ms: float | None = None
    stages_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """What a session read for its last answer, as far as it can be seen from outside.

    ``pixels`` is the SHA-256 of the float32 pixel values of all pages in order.
    """

    prompt_tokens: int
    prompt_ids: tuple[int, ...] | None = None
    grids: tuple[Grid, ...] | None = None
    pixels: str | None = None


class Session(Protocol):
    """An opened peer. ``answer`` is what is timed; the others are called outside the clock."""

    def forget(self) -> None:
        """Drop everything that was kept from earlier lists."""

    def answer(self, work: ListWork) -> Answer:
        """Answers ``work`` from its bytes on; returns when the device has finished."""

    def reading(self, work: ListWork, *, pixels: bool) -> Reading:
        """What was read for ``work``, the list answered last; hashes pixels where asked to."""


class Peer(ABC):
    """A way to run the model. ``name`` selects it on the command line."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def subject(self, setting: Setting) -> str:
        """What is measured, as it stands in results."""

    @abstractmethod
    def axes(self, setting: Setting) -> dict[str, Any]:
        """``quant`` and ``stop`` of its entries, and ``dtype`` where it is not the setting's."""

    @abstractmethod
    def why_not(self, setting: Setting) -> str | None:
        """Why it cannot run here, with the remedy; None when it can."""

    @abstractmethod
    def open(self, setting: Setting) -> AbstractContextManager[Session]:
        """Loads what it needs; leaving the context frees it."""


def check(work: ListWork, answer: Answer, reading: Reading, pixels: str | None) -> None:
    """Raises :class:`WorkMismatchError` unless ``reading`` and ``answer`` are of ``work``.

    ``pixels`` is the hash that the pages have to have; None leaves it out.
    """
    wanted = work.prompt_ids
    if reading.grids is not None and reading.grids != work.grids:
        raise WorkMismatchError(
            f"pages became patch grids {_shown(reading.grids)} instead of {_shown(work.grids)}; "
            "give every contender the same min_pixels and max_pixels."
        )
    if reading.prompt_ids is not None and reading.prompt_ids != wanted:
        both = zip(reading.prompt_ids, wanted, strict=False)
        length = min(len(reading.prompt_ids), len(wanted))
        at = next((i for i, (a, b) in enumerate(both) if a != b), length)
        raise WorkMismatchError(
            f"read a prompt of {len(reading.prompt_ids)} tokens that leaves the common one of "
            f"{len(wanted)} at token {at}; use one tokenizer and one prompt profile for all."
        )
    if reading.prompt_tokens != len(wanted):
        raise WorkMismatchError(
            f"read {reading.prompt_tokens} prompt tokens instead of {len(wanted)}; use the same "
            "prompt and pixel budget for all."
        )
    if pixels is not None and reading.pixels is not None and reading.pixels != pixels:
        raise WorkMismatchError(
            "read other pixel values of pages of the same size; use the Pillow image processor "
            "and the same normalisation for all."
        )
    if work.forced and answer.tokens != work.max_new_tokens:
        raise WorkMismatchError(
            f"wrote {answer.tokens} tokens where {work.max_new_tokens} are forced; let it ignore "
            "the end token."
        )
    if sorted(answer.order) != list(range(len(work.pages))):
        raise WorkMismatchError(f"gave {answer.order}, no order of {len(work.pages)} pages.")


def _shown(grids: tuple[Grid, ...]) -> str:
    sizes = [f"{rows}x{columns}" for _, rows, columns in grids]
    return ", ".join(sizes[:6]) + (", …" if len(sizes) > 6 else "")
