"""What ``mmr5-bench reuse`` asks for, and what it keeps of an answer.

A *trial* is one way of asking, a row of a table. Every list is asked in all of them before the next
list begins, so that a busy moment of the machine does not fall upon one option alone.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

from mmr5_bench.minidocs.lists import PageKey, RerankCase, held_out_cases
from mmr5_runtime.options import RerankKeywords
from mmr5_runtime.types import ReasoningEnd, RerankResult, Status, StopReason

Memory = Literal["none", "drafts", "kept"]
"""Nothing is kept; nothing but earlier answers to draft from; everything is kept, as by default."""

# Three times the longest answer of mini to ten pages: what is cut off here would never have ended.
MAX_NEW_TOKENS = 512
PLAIN: RerankKeywords = {"stop": "eos", "constrain": False}
"""No stopping and no mask: what every trial is held against, with nothing kept either."""

FILL: RerankKeywords = {"max_new_tokens": 1}  # reads the prompt and is done
SAMPLES = 4
_SAMPLED: RerankKeywords = {"temperature": 0.3, "seed": 1}
SHARES = (0.0, 0.15, 0.5, 1.0)
# Mini's pages have 20 to 48 tokens: the default of 32 first ones would leave nothing to reuse.
_RELOCATE: RerankKeywords = {"image_kv": "relocate", "recompute_first": 4}


@dataclass(frozen=True)
class Trial:
    """One way of asking; ``separate`` requests with seeds one apart where it is more than one.

    ``untrained``: mini never saw such prompts or answers in training. Lists of fewer than
    ``least_pages`` are not asked.
    """

    name: str
    options: RerankKeywords
    top_k: int | None = None
    separate: int = 1
    untrained: bool = False
    least_pages: int = 2


@dataclass(frozen=True)
class Session:
    """Trials that share a memory, in this order.

    ``before``: how another question about the same pages is asked first, untimed, of an empty
    memory. Only every ``every``-th list is asked.
    """

    memory: Memory
    trials: tuple[Trial, ...]
    before: RerankKeywords | None = None
    every: int = 1


BASELINE = Trial("no reuse, no stopping", PLAIN)
FIRST_COLD = Trial("first token only, nothing seen", {**PLAIN, **FILL})
FIRST_HIT = Trial("first token only, prompt seen", {**PLAIN, **FILL})

LATENCY: tuple[Session, ...] = (
    Session("none", (BASELINE,)),
    Session("none", (FIRST_COLD,)),
    Session("none", (Trial("stop at the tag", {"stop": "tag"}),)),
    Session("none", (Trial("determined (default)", {}),)),
    *(Session("none", (Trial(f"top_k={k}", {}, top_k=k),)) for k in (5, 3, 1)),
    Session("drafts", (Trial("draft", {"draft": True}),)),
    Session("none", (Trial("think=32 tokens", {"think": 32}, untrained=True),)),
    Session("none", (Trial("think=auto", {"think": "auto"}, untrained=True),)),
    Session("none", (Trial("think=off", {"think": "off"}, untrained=True),)),
    Session(
        "kept",
        (
            Trial("pages seen, other question", {}),
            Trial("the same request again", {}),
            # Another way of decoding, so that the answer itself is not remembered.
            FIRST_HIT,
            Trial("prompt seen, answer decoded", {"constrain": False}),
        ),
        before=FILL,
    ),
    Session(
        "kept",
        (Trial("images first, pages seen", {"layout": "images_first"}, untrained=True),),
        before={"layout": "images_first", **FILL},
    ),
    Session(
        "kept",
        tuple(Trial(f"relocate, recompute {s:g}", {**_RELOCATE, "recompute": s}) for s in SHARES),
        before={**_RELOCATE, **FILL},
    ),
    Session(
        "none",
        (
            Trial(f"{SAMPLES} requests, sampled", _SAMPLED, separate=SAMPLES),
            Trial(f"samples={SAMPLES}", {**_SAMPLED, "samples": SAMPLES}),
        ),
        every=4,
    ),
)

DRAFTED = Trial("draft", {**PLAIN, "draft": True})
DETERMINED = Trial("determined (default)", {})
UNMASKED = Trial("determined, no mask", {"constrain": False})
TOP_KS = (1, 3, 5)
# In this order: the first draft must not find the plain answer among those it drafts from, and what
# `DETERMINED` decodes must not be what an earlier trial left, which another mask takes care of.
EXACT: tuple[Trial, ...] = (
    DRAFTED,
    BASELINE,
    UNMASKED,  # decodes as BASELINE does, so it is asked where nothing is remembered
    DETERMINED,
    *(Trial(f"top_k={k}", {}, top_k=k) for k in TOP_KS),
)

_QUICK: RerankKeywords = {"draft": True}  # the same tokens in a third of the time
_WINDOWS: RerankKeywords = {"window": 5, **_QUICK}
APPROXIMATE: tuple[Trial, ...] = (
    BASELINE,
    Trial("think=off", {"think": "off", **_QUICK}, untrained=True),
    Trial("think=auto", {"think": "auto", **_QUICK}, untrained=True),
    Trial("think=32 tokens", {"think": 32, **_QUICK}, untrained=True),
    Trial("images first", {"layout": "images_first", **_QUICK}, untrained=True),
    *(Trial(f"relocate, recompute {s:g}", {**_RELOCATE, "recompute": s, **_QUICK}) for s in SHARES),
    Trial(f"samples={SAMPLES}", {**_SAMPLED, "samples": SAMPLES, **_QUICK}),
    Trial("sliding, window 5", {"plan": "sliding", "stride": 2, **_WINDOWS}, least_pages=6),
    Trial("anchored, window 5", {"plan": "anchored", "anchors": 2, **_WINDOWS}, least_pages=6),
    Trial("tournament, window 5", {"plan": "tournament", **_WINDOWS}, least_pages=6),
    Trial("cascade", {"plan": "cascade", **_QUICK}, untrained=True),
)

DOCUMENT: tuple[Trial, ...] = (
    Trial("sliding", {"plan": "sliding", "window": 20}),
    Trial("anchored", {"plan": "anchored", "window": 20}),
    Trial("tournament", {"plan": "tournament", "window": 20}),
    Trial("cascade", {"plan": "cascade", "window": 20}, untrained=True),
    Trial(
        "images first, sliding",
        {"plan": "sliding", "window": 20, "layout": "images_first"},
        untrained=True,
    ),
)


@dataclass(frozen=True)
class PaperCase:
    """A document: its pages, and questions with the 0-based pages that answer each."""

    pages: tuple[PageKey, ...]
    questions: tuple[tuple[str, tuple[int, ...]], ...]


def make_document(num_pages: int, questions: int, seed: int) -> PaperCase:
    """The pages of held-out lists shuffled into one document, and the questions of the first."""
    lists = held_out_cases(-(-num_pages // 5), 5, seed)
    pages = [page for case in lists for page in case.pages][:num_pages]
    shuffled = tuple(pages[int(i)] for i in np.random.default_rng(seed).permutation(len(pages)))
    asked = tuple((case.question, _answering(case, shuffled)) for case in lists[:questions])
    return PaperCase(shuffled, asked)


def _answering(case: RerankCase, pages: Sequence[PageKey]) -> tuple[int, ...]:
    return tuple(
        number
        for number, page in enumerate(pages)
        if page.topic == case.topic and case.kind in (None, page.kind)
    )


@dataclass(frozen=True)
class Record:
    """What one trial made of one list; counts are sums over its requests.

    ``ms`` is wall time as the caller sees it, ``ttft_ms`` the stages of a request before its first
    token is chosen. ``prefills`` are page segments that were read, ``encodes`` pages that went
    through the vision tower. ``text`` is a hash of everything that was written.
    """

    order: tuple[int, ...]
    status: Status
    stop_reason: StopReason
    reasoning_end: ReasoningEnd
    ms: float
    ttft_ms: float
    tokens: int
    steps: int
    prefills: int
    prefills_remembered: int
    encodes: int
    replayed: int
    saved: int
    drafted: int
    accepted: int
    interventions: int
    rounds: int
    prompts: int
    text: str

    @classmethod
    def of(cls, results: Sequence[RerankResult], ms: float) -> Self:
        """``results`` of one trial, in order."""
        last = results[-1]
        plans, uses = [r.plan for r in results], [r.usage for r in results]
        written = hashlib.sha256("\0".join(r.text for r in results).encode())
        return cls(
            order=last.order,
            status=last.status,
            stop_reason=last.stop_reason,
            reasoning_end=last.reasoning_end,
            ms=round(ms, 3),
            ttft_ms=round(first_token_ms(last.timings_ms), 3),
            tokens=sum(usage.completion_tokens for usage in uses),
            steps=sum(usage.decode_steps for usage in uses),
            prefills=sum(p.page_prefills - p.page_prefills_remembered for p in plans),
            prefills_remembered=sum(plan.page_prefills_remembered for plan in plans),
            encodes=sum(r.cache.pages_encoded for r in results),
            replayed=sum(r.cache.replayed_tokens for r in results),
            saved=sum(r.tokens_saved for r in results),
            drafted=sum(usage.draft_tokens for usage in uses),
            accepted=sum(usage.accepted_tokens for usage in uses),
            interventions=sum(r.interventions for r in results),
            rounds=max(plan.rounds for plan in plans),
            prompts=sum(len(plan.windows) for plan in plans),
            text=written.hexdigest()[:16],
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**{**data, "order": tuple(data["order"])})


def first_token_ms(timings: Mapping[str, float]) -> float:
    """Stages of a request of one prompt up to the choice of its first token.

    Decoding, a probe of ``think="auto"`` and reading the text come after it. What belongs to no
    stage (planning the prompt, starting) is left out.
    """
    later = ("total", "probe", "decode", "parse")
    return sum(ms for stage, ms in timings.items() if stage not in later)


def ask(rerank: Callable[..., RerankResult], trial: Trial) -> Record:
    """Serve ``trial`` by ``rerank``, which is given the options and knows question and pages."""
    options: RerankKeywords = {"max_new_tokens": MAX_NEW_TOKENS, **trial.options}
    results = []
    started = time.perf_counter()
    for number in range(trial.separate):
        seed = options.get("seed")
        seeded: RerankKeywords = {**options, "seed": None if seed is None else seed + number}
        results.append(rerank(top_k=trial.top_k, **seeded))
    return Record.of(results, 1e3 * (time.perf_counter() - started))
