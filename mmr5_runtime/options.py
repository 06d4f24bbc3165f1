"""What one request can ask for, checked as a whole before any page is opened."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

from mmr5_runtime.types import PlanName, RequestError

Stop = Literal["eos", "tag", "determined"]
ThinkMode = Literal["full", "off", "auto"]
Plan = PlanName | Literal["auto"]
Layout = Literal["reference", "images_first"]
ImageKV = Literal["exact", "relocate"]

DEFAULT_MAX_NEW_TOKENS = 2048

_WHOLE = ("top_k", "max_new_tokens", "samples", "window", "stride", "anchors", "recompute_first")
_REAL = ("temperature", "think_margin", "deadline_ms", "recompute")
_SWITCHES = ("constrain", "draft", "answer")


class RerankKeywords(TypedDict, total=False):
    """The fields of :class:`RerankOptions` but ``top_k``; a test holds the two together."""

    max_new_tokens: int
    temperature: float
    seed: int | None
    min_pixels: int | None
    max_pixels: int | None
    stop: Stop
    think: ThinkMode | int
    think_margin: float
    deadline_ms: float | None
    constrain: bool
    draft: bool
    samples: int | None
    plan: Plan
    window: int | None
    stride: int | None
    anchors: int | None
    layout: Layout
    image_kv: ImageKV
    recompute: float
    recompute_first: int
    answer: bool


@dataclass(frozen=True)
class RerankOptions:
    """How one request is served.

    top_k: candidates wanted. With ``stop="determined"`` decoding stops once they are known, and the
        rest of ``order`` is the input order; otherwise it only limits ``result.top``.
    max_new_tokens: most tokens the model writes per prompt; text that closes a reasoning for it
        comes on top.
    temperature, seed: 0 is greedy; 0.3 is how the reference samples.
    min_pixels, max_pixels: the pixel budget of this request.
    stop: ``determined`` ends when nothing that may follow can change the order, ``tag`` at
        ``</answer>``, ``eos`` at the end token.
    think: ``full``; ``off`` answers without reasoning; ``auto`` does so where the first choice is
        clear by ``think_margin``; a number closes the reasoning after that many tokens.
    think_margin: probability by which the first choice has to lead the second for ``auto``.
    deadline_ms: time after which the answer is closed with what is known.
    constrain: inside the list only unused ids, separators and the closing bracket can be written.
    draft: guess the next tokens and verify up to 8 in one step.
    samples: answers drawn with seeds ``seed``, ``seed + 1``, ...; ``order`` is by mean place.
    plan: one prompt (``single``), or several: ``sliding``, ``anchored``, ``tournament``,
        ``cascade``; ``auto`` is ``single`` where the context holds all pages, else ``sliding``.
    window, stride, anchors: pages per prompt (None: 20, or what fits), how far a sliding window
        moves, how many pages head every anchored window.
    layout: ``images_first`` puts the question behind the pages, so that their keys and values are
        the same for every question.
    image_kv, recompute, recompute_first: ``relocate`` reuses the keys and values of pages in other
        prompts than they were computed in; of each page the first ``recompute_first`` tokens and
        the share ``recompute`` of the others that the question attends to most are computed again.
    answer: with ``plan="cascade"``, also answer the question from the best pages.

    Raises:
        RequestError: a value out of range, or two that contradict each other.
    """

    top_k: int | None = None
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    temperature: float = 0.0
    seed: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    stop: Stop = "determined"
    think: ThinkMode | int = "full"
    think_margin: float = 0.5
    deadline_ms: float | None = None
    constrain: bool = True
    draft: bool = False
    samples: int | None = None
    plan: Plan = "auto"
    window: int | None = None
    stride: int | None = None
    anchors: int | None = None
    layout: Layout = "reference"
    image_kv: ImageKV = "exact"
    recompute: float = 0.15
    recompute_first: int = 32
    answer: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        if self.top_k is not None and self.top_k < 1:
            raise RequestError(
                f"top_k={self.top_k} asks for nothing; pass 1 or more, or None for all."
            )
        if self.max_new_tokens < 1:
            raise RequestError(
                f"max_new_tokens={self.max_new_tokens} leaves no room; pass 1 or more."
            )
        self._check_choices()
        self._check_numbers()
        self._check_contradictions()

    @property
    def think_budget(self) -> int | None:
        """Most tokens of reasoning, if there is a limit."""
        return None if isinstance(self.think, str) else self.think

    def _check_types(self) -> None:
        for names, kinds, known in (
            (_WHOLE, (int,), "a whole number"),
            (_REAL, (int, float), "a number"),
            (_SWITCHES, (bool,), "True or False"),
        ):
            for field in names:
                value = getattr(self, field)
                if value is None and getattr(type(self), field) is None:
                    continue
                if not isinstance(value, kinds) or (isinstance(value, bool) != (bool in kinds)):
                    raise RequestError(f"{field}={value!r} is not {known}; pass one.")

    def _check_choices(self) -> None:
        plans = ("auto", *get_args(PlanName))
        for name, known in (
            ("stop", get_args(Stop)),
            ("plan", plans),
            ("layout", get_args(Layout)),
            ("image_kv", get_args(ImageKV)),
        ):
            if getattr(self, name) not in known:
                raise RequestError(
                    f"{name}={getattr(self, name)!r} is unknown; pass one of {', '.join(known)}."
                )
        budget = isinstance(self.think, int) and not isinstance(self.think, bool)
        if not (self.think in get_args(ThinkMode) or (budget and int(self.think) > 0)):
            raise RequestError(
                f"think={self.think!r} is neither full, off, auto nor a number of tokens above 0."
            )

    def _check_numbers(self) -> None:
        if not 0.0 <= self.think_margin <= 1.0:
            raise RequestError(f"think_margin={self.think_margin} is no probability; pass 0 to 1.")
        if not 0.0 <= self.recompute <= 1.0:
            raise RequestError(f"recompute={self.recompute} is no share; pass 0 to 1.")
        if self.recompute_first < 0:
            raise RequestError(
                f"recompute_first={self.recompute_first} is no number of tokens; pass 0 or more."
            )
        if self.deadline_ms is not None and not 0 < self.deadline_ms < math.inf:
            raise RequestError(
                f"deadline_ms={self.deadline_ms} is no time; pass milliseconds above 0, or None."
            )
        if self.samples is not None and self.samples < 2:
            raise RequestError(
                f"samples={self.samples} cannot agree or differ; pass 2 or more, or None."
            )

    def _check_contradictions(self) -> None:
        if self.samples is not None and self.temperature == 0.0:
            raise RequestError(
                f"samples={self.samples} at temperature 0 would all be equal; pass "
                "temperature=0.3, as the reference samples."
            )
        if self.samples is not None and self.plan not in ("auto", "single"):
            raise RequestError(
                f"samples={self.samples} draws from one prompt, but plan={self.plan!r} has "
                "several; pass plan='single'."
            )
        if self.image_kv == "relocate":
            if self.think in ("off", "auto"):
                raise RequestError(
                    f"image_kv='relocate' cannot be combined with think={self.think!r}: pages were "
                    "not read with the question, so it is the reasoning that matches the two; "
                    "pass think='full'."
                )
            if self.layout != "reference":
                raise RequestError(
                    f"layout={self.layout!r} reuses pages exactly, so image_kv='relocate' would "
                    "only add errors; pass one of the two."
                )
        if self.answer and self.plan != "cascade":
            raise RequestError(
                f"answer=True is the last stage of plan='cascade', not of {self.plan!r}; pass both."
            )
