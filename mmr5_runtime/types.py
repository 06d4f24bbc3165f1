"""Vocabulary shared by every module: results, events and errors.

Every error derives from :class:`Mmr5Error` and carries one sentence that names the input and the
remedy, so that a command line can print it as it is and a service can pass it on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Status = Literal["ok", "repaired", "fallback"]
StopReason = Literal["eos", "tag", "determined", "top_k", "max_tokens", "deadline", "single_page"]
ReasoningEnd = Literal["closed", "skipped", "budget", "deadline", "open"]
Exactness = Literal[
    "bit_identical",
    "permutation_identical",
    "topk_identical",
    "token_identical",
    "replanned",
    "approximate",
]
EXACTNESS_LADDER: tuple[Exactness, ...] = get_args(Exactness)
MissReason = Literal["query", "count", "order", "page", "parameters", "evicted"]
PlanName = Literal["single", "sliding", "anchored", "tournament", "cascade"]


class Mmr5Error(Exception):
    """Base of every error this project raises on purpose."""


class RequestError(Mmr5Error, ValueError):
    """The request cannot be served as asked: blank query, no pages, bad option."""


class PageError(RequestError):
    """A candidate page cannot be read or resized; the message names its position and origin."""


class ContextOverflowError(RequestError):
    """The prompt does not fit the context; the message gives tokens per page and a remedy."""


class OutOfMemoryError(Mmr5Error, MemoryError):
    """Memory does not hold the request or the weights; the message says what would fit."""


class EngineError(Mmr5Error):
    """An engine folder is missing, altered, incomplete or of an unknown version."""


class CheckpointError(Mmr5Error):
    """A source checkpoint is not Qwen2.5-VL, or its tensors are missing, left over or misshapen."""


class ExportError(Mmr5Error):
    """An export cannot start or finish: output exists, disk too small, no network."""


@dataclass(frozen=True)
class Usage:
    """Token counts of one rerank, all of its prompts together.

    ``decode_steps`` counts forward passes after the prompt; fewer than ``completion_tokens`` when
    drafts were accepted or text was forced. A pass that a GPU began before it was known that the
    answer ends there (at most one per answer) is not counted.
    """

    prompt_tokens: int
    image_tokens: int
    completion_tokens: int
    pages: int
    decode_steps: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


def weakest(levels: Iterable[Exactness]) -> Exactness:
    """The level furthest down the ladder; ``bit_identical`` of none."""
    return max(levels, key=EXACTNESS_LADDER.index, default="bit_identical")


@dataclass(frozen=True)
class CacheUse:
    """What one request computed and what it found remembered.

    Segments are the text before the pages and each page of a prompt; ``misses`` counts those that
    had to be read by the reason why they were not there, ``page_misses`` the same for pages that
    had to be encoded. ``pages_decoded`` leaves out those known by the bytes of their file, and
    counts images and arrays, whose pixels are compared as they are.
    """

    pages_encoded: int = 0
    pages_remembered: int = 0
    pages_decoded: int = 0
    segments_read: int = 0
    segments_remembered: int = 0
    tokens_read: int = 0
    tokens_remembered: int = 0
    tokens_relocated: int = 0
    replayed_tokens: int = 0
    misses: Mapping[MissReason, int] = field(default_factory=dict)
    page_misses: Mapping[MissReason, int] = field(default_factory=dict)


@dataclass(frozen=True)
class WindowResult:
    """One prompt of a plan: candidates in the order shown, and the order that came back."""

    pages: tuple[int, ...]
    order: tuple[int, ...]
    round: int
    status: Status
    stop_reason: StopReason
    completion_tokens: int


@dataclass(frozen=True)
class PlanUse:
    """How a list was cut into prompts.

    ``page_prefills`` counts the page segments of all prompts, ``page_prefills_remembered`` those
    whose keys and values were there already. ``relevance`` has the cascade's first judgement of
    every candidate, None where time ran out before it.
    """

    name: PlanName = "single"
    rounds: int = 1
    page_prefills: int = 0
    page_prefills_remembered: int = 0
    windows: tuple[WindowResult, ...] = ()
    relevance: tuple[float | None, ...] | None = None


@dataclass(frozen=True)
class Stability:
    """How far seeded samples of one prompt agree; ``orders`` has one permutation per sample.

    ``first`` is the share of samples that put the result's first candidate first, ``kendall_tau``
    the mean over samples of their agreement with the result, ``mean_place`` the mean 1-based place
    of every candidate, by candidate.
    """

    orders: tuple[tuple[int, ...], ...]
    first: float
    kendall_tau: float
    mean_place: tuple[float, ...]


@dataclass(frozen=True)
class RerankResult:
    """What one listwise rerank gives back.

    ``order`` holds 0-based candidate indices, best first, and is always a permutation of
    ``range(pages)``. ``status`` says how it was obtained: ``ok`` (every id the model named was new
    and valid, and it named all that matter), ``repaired`` (duplicates, unknown or missing ids were
    mended, or kept from being written) or ``fallback`` (no answer could be read, ``order`` is the
    input order); of several prompts the worst.

    ``timings_ms`` has the wall time by stage and ``total``; ``first_token_ms`` is the time from the
    request to the first token of its answer, None when the model wrote none, or all at once, as
    TensorRT-LLM does.

    ``exactness`` is the weakest guarantee of anything that took effect, against decoding the same
    request to its end without any reuse: ``bit_identical`` (same bits), ``permutation_identical``
    (same order), ``topk_identical`` (same first ``top_k``), ``token_identical`` (same tokens unless
    two tie to the last bits), ``replanned`` (other prompts than one over all pages),
    ``approximate``. ``tokens_saved`` *estimates* what stopping early saved: the tokens of the
    canonical rest of the list. ``list_logprob`` belongs to the first entries of ``order``: the
    log-probability of each under the model, among the candidates not yet named; it compares
    choices within one list, not relevance between lists.
    """

    order: tuple[int, ...]
    status: Status
    stop_reason: StopReason
    text: str
    reasoning: str
    usage: Usage
    top_k: int | None = None
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    first_token_ms: float | None = None
    exactness: Exactness = "bit_identical"
    reasoning_end: ReasoningEnd = "closed"
    tokens_saved: int = 0
    interventions: int = 0
    list_logprob: tuple[float, ...] = ()
    cache: CacheUse = CacheUse()
    plan: PlanUse = PlanUse()
    stability: Stability | None = None
    answer: str | None = None
    candidates: tuple[int, ...] | None = None

    @property
    def top(self) -> tuple[int, ...]:
        """The first ``top_k`` candidates of ``order`` (all of them when ``top_k`` is None)."""
        return self.order if self.top_k is None else self.order[: self.top_k]

    @property
    def ranking(self) -> tuple[int, ...]:
        """``top`` as pages of the open document a candidate list came from; else ``top``."""
        return self.top if self.candidates is None else tuple(self.candidates[i] for i in self.top)

    @property
    def scores(self) -> tuple[float, ...]:
        """One score per entry of ``order``, strictly decreasing in (0, 1], derived from rank only.

        The model emits an order, not relevance: scores of different lists cannot be compared.
        """
        count = len(self.order)
        return tuple((count - rank) / count for rank in range(count))

    @property
    def score_type(self) -> str:
        """What ``scores`` are made of: always the rank."""
        return "rank"


@dataclass(frozen=True)
class ReasoningDelta:
    """A piece of the reasoning as it is decoded; joined deltas equal ``RerankResult.reasoning``."""

    text: str


StreamEvent = ReasoningDelta | RerankResult
