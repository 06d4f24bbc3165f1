"""From the logits after a prompt to an answer, and no further.

Data flow of one answer::

    logits -> sampler (masked inside the list) -> token -> bytes -> answer machine -> stop or step

The machine reads the decoded bytes and says where in the answer the text is; everything else asks
it: whether the list is masked, whether the reasoning has used up its budget, whether what may
still come can change the order. Text that is not the model's choice (an empty reasoning, the end
of one that ran out of budget or time) is *forced*: read in one pass, like a prompt.

Each round of the loop reads the last token and, with a drafter, a few guesses behind it, in one
pass. The sampler then chooses row by row; a guess counts only where it is what was chosen, so what
comes out is what would have come out one token at a time. With a seed this holds as well, since
one draw is made per token either way; it is the rejection rule of speculative sampling for
proposals that are certain (Leviathan et al., arXiv 2211.17192).

On a device that works while the host goes on, the pass over a token is *launched ahead*: queued
with the token as the device chose it, before the host has read it. While it runs, the token is
read, taken to the text and judged, and the next mask is made. Where the answer ends there or text
has to be forced, the pass is taken back: at most once per answer, and nothing of it is left.

A greedy answer that was given before is *replayed*: its tokens go through the same loop without
the model, and only where they end is its KV loaded and decoding continued.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from mmr5_runtime.choosing import Choosing
from mmr5_runtime.cursor import Cursor
from mmr5_runtime.deadline import Deadline
from mmr5_runtime.drafting import Drafter
from mmr5_runtime.language import Language
from mmr5_runtime.lookahead import Passes
from mmr5_runtime.options import RerankOptions
from mmr5_runtime.replies import Replay, Step
from mmr5_runtime.sampler import Sampler
from mmr5_runtime.stopping.choices import ListScores, first_choice
from mmr5_runtime.stopping.machine import AnswerMachine
from mmr5_runtime.timing import Timings
from mmr5_runtime.types import EngineError, ReasoningEnd, StopReason

ANSWER_OPEN = "<answer>["
EMPTY_REASONING = "<think></think>" + ANSWER_OPEN
REASONING_CLOSE = "</think>"


@dataclass
class Answer:
    """What decoding has come to; complete once the iteration over :class:`Decoding` has ended.

    ``known`` is the order of ids when time ran out before a list was written: by the probability
    of each to come first.
    """

    machine: AnswerMachine
    steps: list[Step] = field(default_factory=list)
    stop_reason: StopReason = "max_tokens"
    reasoning_end: ReasoningEnd = "open"
    known: tuple[int, ...] | None = None
    scores: ListScores = field(default_factory=ListScores)
    drafted: int = 0
    accepted: int = 0
    replayed: int = 0

    @property
    def tokens(self) -> list[int]:
        return [step.token for step in self.steps]


class Decoding:
    """One answer being decoded; iterating yields new token ids, the end token excluded.

    ``cursor`` stands behind the prompt and ``logits`` [V] fp32 are what the prompt predicts. After
    the iteration the cursor stands behind the last token that was read. ``lookahead`` launches
    passes ahead; by default where the cursor's device is asynchronous, and never with a drafter,
    whose guesses need the token. It changes nothing of the answer.

    Raises :class:`EngineError` for logits that are not finite, naming where they come from.
    """

    def __init__(
        self,
        language: Language,
        cursor: Cursor,
        logits: Tensor,
        sampler: Sampler,
        num_pages: int,
        options: RerankOptions,
        max_new_tokens: int,
        timings: Timings,
        deadline: Deadline,
        drafter: Drafter | None = None,
        replay: Replay | None = None,
        lookahead: bool | None = None,
    ) -> None:
        self._language, self._cursor, self._sampler = language, cursor, sampler
        self._logits = logits
        self._options, self._limit = options, max_new_tokens
        self._timings, self._deadline = timings, deadline
        self._drafter, self._replay = drafter, replay
        self._lookahead = drafter is None and (
            cursor.asynchronous if lookahead is None else lookahead
        )
        self._passes = Passes(cursor, timings, deadline)
        self._prompt = cursor.mark
        self._text = b""
        self._forced = 0  # tokens that were nobody's choice, on top of what may be generated
        self._late = False
        self.answer = Answer(AnswerMachine(num_pages, constrained=options.constrain))

    def __iter__(self) -> Iterator[int]:
        answer, machine = self.answer, self.answer.machine
        try:
            with self._cursor.together():
                yield from self._run()
        finally:
            self._passes.take_back()
        if answer.reasoning_end == "open" and machine.state not in ("before", "think"):
            answer.reasoning_end = "closed"

    def _run(self) -> Iterator[int]:
        rows: Sequence[Tensor] = [self._logits]
        proposed: list[int] = []
        if forced := self._skip_reasoning():
            rows = [self._force(forced)]
            yield from forced
        elif self._replay:
            if (yield from self._play(self._replay)):
                return
            rows = self._next_rows(proposed)
        while True:
            closing: list[int] = []
            for index, row in enumerate(rows):
                token = self._choose(row)
                self.answer.accepted += proposed[index : index + 1] == [token]
                if token in self._language.end_ids:
                    return
                yield token
                self._passes.resume()
                if self._ended():
                    return
                if closing := self._close_reasoning():
                    break
                if proposed[index : index + 1] != [token]:
                    break
            if closing:
                self._settle()
                rows, proposed = [self._force(closing)], []
                yield from closing
                if self._is_over(rows[0]):
                    return
            elif (ahead := self._passes.take()) is not None:
                rows = list(ahead)
            else:
                self._settle()
                proposed = self._draft()
                rows = self._next_rows(proposed)

    def _choose(self, row: Tensor) -> int:
        """Pick, record and read the next token; an end token ends the answer."""
        with self._timings.span("decode", wait=False):
            step = self._pick(row)
        self.answer.steps.append(step)
        if step.token in self._language.end_ids:
            self.answer.stop_reason = "eos"
            self.answer.machine.finish()
        else:
            self._take(step)
        return step.token

    def _is_over(self, row: Tensor) -> bool:
        """Whether the answer ends right behind text that closed the reasoning."""
        if self._late:
            self.answer.known = self._rank_by_first_choice(row)
            self.answer.stop_reason = "deadline"
            return True
        return self._ended()

    def _pick(self, row: Tensor) -> Step:
        """Choose on the device, launch the pass over the choice, then read what was chosen."""
        answer, options = self.answer, self._options
        choosing = Choosing(row, answer.machine, self._sampler, self._language, options.constrain)
        step = self._passes.read(choosing, self._lookahead and self._probably_goes_on())
        if step is None:
            raise self._not_finite()
        return step

    def _probably_goes_on(self) -> bool:
        """Whether a pass over the token being chosen is needed, as far as one can tell before."""
        written = len(self.answer.steps) + 1
        budget = self._options.think_budget
        reasoning = self.answer.machine.state in ("before", "think")
        if reasoning and budget is not None and written >= budget:
            return False
        return written - self._forced < self._limit

    def _not_finite(self) -> EngineError:
        self._passes.take_back()
        steps = self.answer.steps
        self._cursor.forget(self._cursor.mark.length - self._prompt.length - len(steps))
        return self._cursor.not_finite(steps[-1].token if steps else None)

    def _take(self, step: Step) -> None:
        """Let the machine read a token, and the scores what it chose."""
        data = self._language.vocabulary[step.token]
        self.answer.scores.read(step.logprob, data, self.answer.machine)
        self._text += data

    def _ended(self) -> bool:
        """Whether nothing more is needed, or allowed; says why."""
        answer, options = self.answer, self._options
        machine = answer.machine
        determined = options.stop == "determined" and bool(machine.ids)
        if determined and options.top_k is not None and len(machine.ids) >= options.top_k:
            answer.stop_reason = "determined" if machine.determined else "top_k"
        elif determined and machine.determined:
            answer.stop_reason = "determined"
        elif options.stop == "tag" and machine.closed_by_tag and machine.ids:
            answer.stop_reason = "tag"
        elif len(answer.steps) - self._forced >= self._limit:
            answer.stop_reason = "max_tokens"
            machine.finish()
        elif machine.quoted and machine.state in ("before", "think") and self._over_budget():
            # A list forced behind one that was quoted would not be read.
            answer.stop_reason, answer.reasoning_end = "max_tokens", "budget"
        elif self._deadline.passed(steps_needed=1) and not self._can_close():
            answer.stop_reason = "deadline"
            machine.finish()
        else:
            return False
        return True

    def _over_budget(self) -> bool:
        budget = self._options.think_budget
        return budget is not None and len(self.answer.steps) >= budget

    def _can_close(self) -> bool:
        """Whether forced text can still open a list: none has been opened, and none was quoted."""
        machine = self.answer.machine
        return machine.state in ("before", "think", "between") and not machine.quoted

    def _settle(self) -> None:
        """Forget what was read beyond the last accepted token, which itself comes next."""
        self._passes.take_back()
        read = self._cursor.mark.length - self._prompt.length
        self._cursor.forget(read - (len(self.answer.steps) - 1))

    def _draft(self) -> list[int]:
        if self._drafter is None:
            return []
        room = self._limit - (len(self.answer.steps) - self._forced) - 1
        return self._drafter.propose(self.answer.tokens, self.answer.machine, self._text)[:room]

    def _next_rows(self, proposed: Sequence[int]) -> list[Tensor]:
        self.answer.drafted += len(proposed)
        return list(self._passes.run([self.answer.steps[-1].token, *proposed]))

    def _force(self, tokens: Sequence[int]) -> Tensor:
        """Read ``tokens`` behind the last one, chosen by nobody; logits [V] after them."""
        last = [step.token for step in self.answer.steps[-1:]]
        row = self._passes.run([*last, *tokens], wait=True)[-1]
        self._forced += len(tokens)
        for token in tokens:
            self._sampler.observe(token)
            self.answer.steps.append(Step(token))
            self._take(self.answer.steps[-1])
        return row

    def _play(self, replay: Replay) -> Generator[int, None, bool]:
        """Replay remembered steps; True when this request ends within them."""
        for step in replay.steps:
            self.answer.steps.append(step)
            self.answer.replayed += 1
            self._sampler.observe(step.token)
            self._sampler.interventions += step.intervened
            if step.token in self._language.end_ids:
                self.answer.stop_reason = "eos"
                self.answer.machine.finish()
                return True
            self._take(step)
            yield step.token
            if self._ended():
                return True
        with self._timings.span("kv_load"):
            replay.load(self._cursor)
        return False

    def _skip_reasoning(self) -> list[int]:
        """Tokens of an empty reasoning, where the answer is to come without one."""
        think = self._options.think
        if think not in ("off", "auto"):
            return []
        forced = self._language.encode(EMPTY_REASONING)
        if think == "auto" and not self._is_clear(forced):
            return []
        self.answer.reasoning_end = "skipped"
        return forced

    def _is_clear(self, forced: Sequence[int]) -> bool:
        """Whether the first choice without reasoning leads by the margin; forgets the probe."""
        probe = self.answer.machine.copy()
        for token in forced:
            probe.feed(self._language.vocabulary[token])
        with self._timings.span("probe"):
            row = self._cursor.step(forced)[-1]
            found = self._chances(row, probe, forced[-1])
            chances = sorted(found.values(), reverse=True)
        self._cursor.rewind(self._prompt)
        return chances[0] - chances[1] >= self._options.think_margin

    def _chances(self, row: Tensor, machine: AnswerMachine, last: int) -> dict[int, float]:
        """Probability of every unused id to come next, for a cursor behind ``machine``'s text.

        ``last`` is the token that was read last, of which the logits ``row`` [V] came.
        """
        mark = self._cursor.mark

        def fork(tokens: Sequence[int]) -> Tensor:
            logits = self._finite(self._cursor.step(tokens)[-1], tokens[-1])
            self._cursor.rewind(mark)
            return logits

        language = self._language
        row = self._finite(row, last)
        return first_choice(row, machine, language.mask, language.vocabulary, fork)

    def _finite(self, row: Tensor, last: int) -> Tensor:
        """``row`` [V], the logits after ``last``; raises where they are no numbers."""
        if not math.isfinite(row.max()):  # a NaN or an infinity is above any number
            raise self._cursor.not_finite(last)
        return row

    def _close_reasoning(self) -> list[int]:
        """Tokens that close the reasoning and open the list, where its budget or time is over."""
        answer, machine = self.answer, self.answer.machine
        if not self._can_close():
            return []
        reasoning = machine.state in ("before", "think")
        if self._deadline.passed(steps_needed=2):
            self._late = True
            answer.reasoning_end = "deadline" if reasoning else "closed"
        elif reasoning and self._over_budget():
            answer.reasoning_end = "budget"
        else:
            return []
        closing = REASONING_CLOSE[machine.pending_close :] if reasoning else ""
        return self._language.encode(closing + ANSWER_OPEN)

    def _rank_by_first_choice(self, row: Tensor) -> tuple[int, ...] | None:
        """All ids by their probability to come first: what one more pass can still tell."""
        machine = self.answer.machine
        if machine.state != "list":
            return None
        with self._timings.span("decode"):
            chances = self._chances(row, machine, self.answer.steps[-1].token)
        return tuple(sorted(chances, key=lambda number: (-chances[number], number)))
