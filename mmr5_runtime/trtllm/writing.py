"""One answer made of calls of a runner, and where it ends.

A call writes until a stop word, an end token or its limit comes, and reads everything so far again,
which the runner's block cache makes cheap. An answer is one call or several:

* without reasoning, the empty reasoning stands behind the prompt, as our own engine forces it;
* a budget of reasoning is a first call of so many tokens; if the model still reasons then, another
  goes on behind the forced end of the reasoning;
* a stop word that was only quoted in the reasoning ends a call, but not the answer.

Every token is read by the :class:`AnswerMachine` of :class:`~mmr5_runtime.decoding.Decoding` and
judged by the same rules, so that an answer ends at the same token; what a call wrote behind that
place is dropped. ``stop="determined"`` ends at the tag: same order, and nothing is saved.

The list is not masked. A second machine, which knows the mask, reads along and says whether the
mask would have let every token of the list pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmr5_runtime.decoding import ANSWER_OPEN, EMPTY_REASONING, REASONING_CLOSE, Answer
from mmr5_runtime.language import Language
from mmr5_runtime.options import RerankOptions
from mmr5_runtime.replies import Step
from mmr5_runtime.stopping.machine import AnswerMachine
from mmr5_runtime.trtllm.prompt import Written
from mmr5_runtime.types import EngineError

# (tokens behind the prompt, limit) -> what follows them
Write = Callable[[Sequence[int], int], Written]


@dataclass(frozen=True)
class Room:
    """Tokens left behind a prompt: that may be generated, read again, and be there in all."""

    generated: int
    read_again: int
    total: int


class Writing:
    """Writes one answer; ``answer`` is complete when :meth:`run` has returned.

    ``decoded`` counts the tokens that were generated, dropped ones included. ``masked`` is false
    once the list holds a token that the mask of ``constrain`` would not have allowed.
    """

    def __init__(
        self, write: Write, language: Language, num_pages: int, options: RerankOptions, room: Room
    ) -> None:
        self._write, self._language = write, language
        self._options, self._room = options, room
        self._forced = 0
        self._along = AnswerMachine(num_pages, constrained=True)
        self.answer = Answer(AnswerMachine(num_pages))
        self.decoded = 0
        self.masked = True

    @property
    def tokens(self) -> list[int]:
        """What was written, the end token excluded."""
        return [token for token in self.answer.tokens if token not in self._language.end_ids]

    def run(self) -> None:
        """Raises EngineError when the runner writes nothing and does not end either."""
        answer, machine = self.answer, self.answer.machine
        if self._options.think == "off":
            answer.reasoning_end = "skipped"
            self._force(EMPTY_REASONING)
        while not self._call():
            pass
        if answer.reasoning_end == "open" and machine.state not in ("before", "think"):
            answer.reasoning_end = "closed"

    def _call(self) -> bool:
        """One call; True when the answer has ended with it."""
        answer, machine = self.answer, self.answer.machine
        limit = self._limit()
        if limit < 1:
            machine.finish()
            return True
        found = self._write(answer.tokens, limit)
        if not found.tokens and not found.ended:
            raise EngineError(
                "TensorRT-LLM wrote nothing and gave no end token; build the engine again with "
                "the command lines of its bundle."
            )
        self.decoded += len(found.tokens) + found.ended
        for token in found.tokens:
            self._take(token)
            if self._ended():
                return True
            if self._reasoned_enough():
                answer.reasoning_end = "budget"
                self._force(REASONING_CLOSE[machine.pending_close :] + ANSWER_OPEN)
                return False
        if found.ended:
            self.masked &= self._along.state != "list"
            answer.steps.append(Step(min(self._language.end_ids)))
            answer.stop_reason = "eos"
            machine.finish()
        return found.ended

    def _limit(self) -> int:
        """Tokens for the next call; below 1 when there is no room for one."""
        written, room = len(self.answer.steps), self._room
        if written > room.read_again:
            return 0
        limit = min(room.generated - (written - self._forced), room.total - written)
        budget = self._options.think_budget
        if budget is not None and self._reasoning():
            limit = min(limit, budget - written)
        return limit

    def _take(self, token: int) -> None:
        data = self._language.vocabulary[token]
        if self._along.state == "list":
            self.masked &= bool(data) and self._along.allows(data)
        self._read(token, data)

    def _force(self, text: str) -> None:
        for token in self._language.encode(text):
            self._forced += 1
            self._read(token, self._language.vocabulary[token])

    def _read(self, token: int, data: bytes) -> None:
        self.answer.steps.append(Step(token))
        self.answer.machine.feed(data)
        self._along.feed(data)

    def _ended(self) -> bool:
        """Whether the last token was the last; says why."""
        answer, machine = self.answer, self.answer.machine
        if self._options.stop != "eos" and machine.closed_by_tag and machine.ids:
            answer.stop_reason = "tag"
        elif len(answer.steps) - self._forced >= self._room.generated:
            machine.finish()  # stop_reason is max_tokens unless said otherwise
        elif machine.quoted and self._reasoning() and self._over_budget():
            # A list forced behind one that was quoted would not be read.
            answer.reasoning_end = "budget"
        else:
            return False
        return True

    def _reasoning(self) -> bool:
        return self.answer.machine.state in ("before", "think")

    def _over_budget(self) -> bool:
        budget = self._options.think_budget
        return budget is not None and len(self.answer.steps) >= budget

    def _reasoned_enough(self) -> bool:
        return self._reasoning() and self._over_budget() and not self.answer.machine.quoted
