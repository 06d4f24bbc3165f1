"""Vocabulary shared by every module: results, events and errors.

Every error derives from :class:`Mmr5Error` and carries one sentence that names the input and the
remedy, so that a command line can print it as it is and a service can pass it on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["ok", "repaired", "fallback"]
StopReason = Literal["eos", "max_tokens"]


class Mmr5Error(Exception):
    """Base of every error this project raises on purpose."""


class RequestError(Mmr5Error, ValueError):
    """The request cannot be served as asked: blank query, no pages, bad option."""


class PageError(RequestError):
    """A candidate page cannot be read or resized; the message names its position and origin."""


class ContextOverflowError(RequestError):
    """The prompt does not fit the context; the message gives tokens per page and a remedy."""


class EngineError(Mmr5Error):
    """An engine folder is missing, altered, incomplete or of an unknown version."""


class CheckpointError(Mmr5Error):
    """A source checkpoint is not Qwen2.5-VL, or its tensors are missing, left over or misshapen."""


class ExportError(Mmr5Error):
    """An export cannot start or finish: output exists, disk too small, no network."""


@dataclass(frozen=True)
class Usage:
    """Token counts of one rerank."""

    prompt_tokens: int
    image_tokens: int
    completion_tokens: int
    pages: int


@dataclass(frozen=True)
class RerankResult:
    """What one listwise rerank gives back.

    ``order`` holds 0-based candidate indices, best first, and is always a permutation of
    ``range(pages)``. ``status`` says how it was obtained: ``ok`` (the answer was a permutation),
    ``repaired`` (duplicates, unknown or missing ids were mended) or ``fallback`` (no answer could
    be read, ``order`` is the input order).
    """

    order: tuple[int, ...]
    status: Status
    stop_reason: StopReason
    text: str
    reasoning: str
    usage: Usage
    top_k: int | None = None
    timings_ms: Mapping[str, float] = field(default_factory=dict)

    @property
    def top(self) -> tuple[int, ...]:
        """The first ``top_k`` candidates of ``order`` (all of them when ``top_k`` is None)."""
        return self.order if self.top_k is None else self.order[: self.top_k]

    @property
    def scores(self) -> tuple[float, ...]:
        """One score per entry of ``order``, strictly decreasing in (0, 1], derived from rank only.

        The model emits an order, not relevance: scores of different lists cannot be compared.
        """
        count = len(self.order)
        return tuple((count - rank) / count for rank in range(count))


@dataclass(frozen=True)
class ReasoningDelta:
    """A piece of the reasoning as it is decoded; joined deltas equal ``RerankResult.reasoning``."""

    text: str


StreamEvent = ReasoningDelta | RerankResult
