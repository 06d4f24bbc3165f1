"""One prompt, from its pages to their order: what every plan is made of.

Data flow: the prompt is read (``reading``, or ``relocation`` for pages moved from elsewhere), the
answer decoded (``decoding``), and what was written becomes an order with a status.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

from torch import Tensor

from mmr5_runtime.answer import ReasoningStream, extract_reasoning, order_of, parse_answer
from mmr5_runtime.cursor import Cursor
from mmr5_runtime.decoding import EMPTY_REASONING, Answer, Decoding
from mmr5_runtime.drafting import Drafter
from mmr5_runtime.language import Language
from mmr5_runtime.loading import LoadedEngine
from mmr5_runtime.model import MAX_DECODE_TOKENS
from mmr5_runtime.options import RerankOptions
from mmr5_runtime.reading import read_prompt
from mmr5_runtime.relocation import read_relocated_prompt
from mmr5_runtime.replies import Replies
from mmr5_runtime.request import Request
from mmr5_runtime.reuse.relocate import Recompute
from mmr5_runtime.sampler import Sampler, SamplingParams
from mmr5_runtime.types import Exactness, ReasoningDelta, ReasoningEnd, Status, StopReason


@dataclass
class Outcome:
    """What one answer gave; ``order`` counts the pages of the prompt from 0."""

    order: tuple[int, ...]
    status: Status
    stop_reason: StopReason
    text: str = ""
    reasoning: str = ""
    reasoning_end: ReasoningEnd = "open"
    exactness: list[Exactness] = field(default_factory=list)
    tokens_saved: int = 0
    interventions: int = 0
    list_logprob: tuple[float, ...] = ()
    completion_tokens: int = 0
    decode_steps: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0

    @classmethod
    def out_of_time(cls, num_pages: int) -> Outcome:
        """The input order: time was over before the model could say anything."""
        order = tuple(range(num_pages))
        return cls(order, "fallback", "deadline", "", "", "deadline", ["approximate"])


class WindowRun:
    """One prompt of a request that is read once and answered once or several times."""

    def __init__(self, request: Request, pages: Sequence[int], top: int | None) -> None:
        """``pages``: candidates in the order shown; ``top``: best places that matter, None all."""
        self._request = request
        self._count = len(pages)
        self._options = replace(request.options, top_k=top)
        self._plan = request.plan_prompt(pages)
        self._prompt = request.prompt(self._plan, pages)
        # Forced text, drafts and probes reach a little beyond what may be generated.
        forced = len(request.loaded.language.encode(EMPTY_REASONING))
        room = self._plan.max_new_tokens + forced + MAX_DECODE_TOKENS
        self._cursor = Cursor(request.loaded.engine, len(self.token_ids) + room, request.seat)
        self._logits: Tensor | None = None
        self._replies: Replies | None = None

    @property
    def token_ids(self) -> list[int]:
        return self._plan.token_ids

    def read(self) -> bool:
        """Read the prompt; False when time was over before its end."""
        request, keys = self._request, self._prompt.keys()
        common = (request.counts, request.timings, request.deadline, request.turn)
        memory = request.memory
        if self._options.image_kv == "relocate":
            again = Recompute(self._options.recompute, self._options.recompute_first)
            with request.turn():
                self._logits = read_relocated_prompt(request, self._prompt, self._cursor, again)
        else:
            self._logits = read_prompt(
                self._prompt, keys, self._cursor, memory.segments, memory.ledger, *common
            )
            if how := _replayable(self._options, request.params):
                last = (keys.head, *keys.segments)[-1]
                self._replies = Replies(memory.segments, self._prompt.key(keys), last, how)
        self._start = self._cursor.mark
        return self._logits is not None

    def answer(self, seed_offset: int = 0) -> Generator[ReasoningDelta, None, Outcome]:
        """Decode one answer, its reasoning as it comes; each call starts behind the prompt."""
        assert self._logits is not None
        request, language = self._request, self._request.loaded.language
        self._cursor.rewind(self._start)
        params = request.params
        if seed_offset and params.seed is not None:
            params = replace(params, seed=(params.seed + seed_offset) % (1 << 64))
        spec, device = request.loaded.engine.spec, request.loaded.engine.device
        sampler = Sampler(params, self.token_ids, spec.text.vocab_size, device)
        drafter = None
        if self._options.draft:
            ends = request.loaded.engine.spec.eos_token_ids
            drafter = Drafter(language.encode, ends, self._count, request.memory.history)
        decoding = Decoding(
            language,
            self._cursor,
            self._logits,
            sampler,
            self._count,
            self._options,
            self._plan.max_new_tokens,
            request.timings,
            request.deadline,
            drafter,
            self._replies.recall() if self._replies else None,
        )
        if request.seat is not None:
            request.seat.shared = False
        began, steps = perf_counter(), self._cursor.steps
        text = yield from self._stream(decoding)
        answer = decoding.answer
        # Bits that depend on who happened to be there are nothing to build an exact answer on.
        company = self._had_company()
        if self._replies and not company:
            cost_ms = 1e3 * (perf_counter() - began)
            self._replies.remember(answer.steps, self._cursor, self._start, cost_ms)
        request.counts.replayed_tokens += answer.replayed
        if answer.replayed < len(answer.steps):
            request.memory.history.add(answer.tokens)
        with request.timings.span("parse"):
            outcome = outcome_of(answer, text, self._count, self._options)
            if company or self._options.draft:
                outcome.exactness.append(_with_other_rows(request.loaded))
        outcome.tokens_saved = _saved(answer, outcome.order, language)
        outcome.interventions = sampler.interventions
        outcome.decode_steps = self._cursor.steps - steps
        return outcome

    def _had_company(self) -> bool:
        """Whether steps of the last answer were run with those of others, and it shows."""
        seat = self._request.seat
        independent = self._request.loaded.engine.independent_sequences
        return seat is not None and seat.shared and not independent

    def _stream(self, decoding: Decoding) -> Generator[ReasoningDelta, None, str]:
        """Yield the reasoning while it is decoded; returns the whole text."""
        decoder, reasoning, text = self._request.tokenizer.stream(), ReasoningStream(), []
        for token in decoding:
            self._request.timings.mark_token()
            text.append(decoder.feed(token))
            if delta := reasoning.feed(text[-1]):
                yield ReasoningDelta(delta)
        text.append(decoder.flush())
        if delta := reasoning.feed(text[-1]) + reasoning.finish():
            yield ReasoningDelta(delta)
        return "".join(text)


def _saved(answer: Answer, order: Sequence[int], language: Language) -> int:
    """Tokens that would have followed, if the model had gone on in canonical form."""
    if answer.stop_reason == "tag":
        return 1  # the end token
    if answer.stop_reason not in ("determined", "top_k"):
        return 0
    named, closed = answer.machine.ids, answer.machine.state == "closed"
    missing = () if closed else tuple(page + 1 for page in order if page + 1 not in named)
    # The bracket that closed the list has been written.
    return language.list_rest(named, missing) - closed


def _replayable(options: RerankOptions, params: SamplingParams) -> str | None:
    """What spells out how a greedy answer is decoded, if one may be remembered."""
    if options.temperature or options.think != "full" or options.deadline_ms is not None:
        return None
    penalty = params.repetition_penalty
    return f"constrain={options.constrain} draft={options.draft} penalty={penalty}"


def outcome_of(answer: Answer, text: str, count: int, options: RerankOptions) -> Outcome:
    """What ``answer``, decoded as ``text``, says about ``count`` pages."""
    order, status = _order(answer, text, count, options.top_k)
    return Outcome(
        order=order,
        status=status,
        stop_reason=answer.stop_reason,
        text=text,
        reasoning=extract_reasoning(text),
        reasoning_end=answer.reasoning_end,
        exactness=_exactness(answer, options),
        list_logprob=_logprobs(answer),
        completion_tokens=len(answer.steps),
        draft_tokens=answer.drafted,
        accepted_tokens=answer.accepted,
    )


def _order(
    answer: Answer, text: str, count: int, top_k: int | None = None
) -> tuple[tuple[int, ...], Status]:
    """The machine's list where it read one, else what can be read from the whole text."""
    machine, stop = answer.machine, answer.stop_reason
    if answer.known is not None:
        return order_of(answer.known, count), "repaired"
    if not machine.ids:
        parsed = parse_answer(text, count)
        return parsed.order, parsed.status
    wanted = min(top_k or count - 1, count - 1)
    complete = stop in ("determined", "top_k") and len(machine.ids) >= wanted
    if not complete:
        complete = parse_answer(text, count).status == "ok"
    mended = machine.repaired or any(step.intervened for step in answer.steps)
    status: Status = "ok" if complete and not mended else "repaired"
    return order_of(machine.ids, count), status


def _logprobs(answer: Answer) -> tuple[float, ...]:
    """One per id of the list, if all of them were drawn one by one."""
    logprobs = answer.scores.logprobs
    drawn = answer.known is None and not any(map(math.isnan, logprobs))
    return logprobs if drawn else ()


def _with_other_rows(loaded: LoadedEngine) -> Exactness:
    """What steps are worth that ran together with other rows, of a draft or of other requests.

    Sums may differ in their last bits, and where numbers are rounded to 8 bits behind them, a last
    bit can move a whole step: of activations, or of the keys and values that later tokens read.
    """
    rounds_kv = loaded.engine.model.kv == "int8" and not loaded.engine.independent_rows
    return "approximate" if loaded.rounds_activations or rounds_kv else "token_identical"


def _exactness(answer: Answer, options: RerankOptions) -> list[Exactness]:
    """Guarantees of everything that took effect in this answer."""
    levels: list[Exactness] = []
    if answer.stop_reason == "determined":
        levels.append("permutation_identical")
    if answer.stop_reason == "top_k":
        levels.append("topk_identical")
    forced = answer.reasoning_end in ("skipped", "budget", "deadline")
    if forced or answer.stop_reason == "deadline" or options.image_kv == "relocate":
        levels.append("approximate")
    if options.layout != "reference":
        levels.append("replanned")
    return levels
