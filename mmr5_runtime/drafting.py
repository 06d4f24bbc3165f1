"""Guesses at the next tokens, for a decoder that checks several in one forward pass.

A guess never changes what is decoded: the decoder keeps the part of it that it would have chosen
itself (speculative decoding, arXiv 2211.17192, with greedy acceptance), so a bad guess costs time
and nothing else. Three sources, the most certain first: the tags between reasoning and answer; the
end of the list, because MM-R5 was trained to name the irrelevant pages in ascending order; and what
followed the same tokens earlier in this output or in earlier ones (after SuffixDecoding,
arXiv 2411.04975).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from threading import Lock

from mmr5_runtime.stopping.machine import AnswerMachine

TAIL_BYTES = 32  # how much of the text's end a Drafter looks at
MIN_MATCH, MAX_MATCH = 2, 8  # tokens; one token alone says too little about the next

_THINK_CLOSE, _ANSWER_OPEN, _ANSWER_CLOSE = b"</think>", b"<answer>[", b"]</answer>"
# The id before the last comma (or the bracket that opens the list), white space, the digits
# written since, white space.
_LAST_PIECES = re.compile(rb"(?:(\d+)\s*,|\[)(\s*)(\d*)(\s*)\Z")
_BOUNDARY = -1  # stands between two outputs; no token id is negative
_MAX_CANDIDATES = 64  # places compared per look-up, which bounds its time


class SuffixIndex:
    """Outputs of the past, looked up by the last tokens of the present one.

    Holds at most ``capacity`` tokens; when they are full, the older half is forgotten. Places that
    share their last two tokens are chained from the newest to the oldest, as LZ77 coders do, which
    takes a fraction of the memory of a table of all sequences of 2 to 8 tokens. Thread-safe.
    """

    def __init__(self, capacity: int = 65_536) -> None:
        self._capacity = capacity
        self._lock = Lock()
        self._reset()

    def _reset(self) -> None:
        self._tokens: list[int] = []
        self._latest: dict[tuple[int, int], int] = {}  # a pair -> where its newest place ends
        self._previous: list[int] = []  # where the same pair ended before; -1: nowhere

    def add(self, tokens: Sequence[int]) -> None:
        """Remember a whole output, its end token included."""
        with self._lock:
            self._append(_BOUNDARY)
            for token in tokens:
                self._append(token)

    def extend(self, tokens: Sequence[int]) -> None:
        """Remember ``tokens`` as the continuation of the output that was added last."""
        with self._lock:
            for token in tokens:
                self._append(token)

    def clear(self) -> None:
        """Forget every output."""
        with self._lock:
            self._reset()

    def _append(self, token: int) -> None:
        if len(self._tokens) >= self._capacity:
            kept = self._tokens[len(self._tokens) - self._capacity // 2 :]
            self._reset()
            for old in kept:
                self._append(old)
        pair = (self._tokens[-1] if self._tokens else _BOUNDARY, token)
        self._previous.append(self._latest.get(pair, -1))
        if _BOUNDARY not in pair:
            self._latest[pair] = len(self._tokens)
        self._tokens.append(token)

    def find(self, suffix: Sequence[int], count: int) -> tuple[int, list[int]]:
        """What followed the end of ``suffix`` before: ``(tokens matched, up to count tokens)``.

        Of the 64 newest places that share two tokens, the longest match of up to 8 wins, the newest
        of equally long ones; a place that nothing follows is none. ``(0, [])`` without a match.
        """
        if len(suffix) < MIN_MATCH or count < 1:
            return 0, []
        with self._lock:
            length, end = self._longest(suffix[-MAX_MATCH:])
            if not length:
                return 0, []
            following = self._tokens[end + 1 : end + 1 + count]
        if _BOUNDARY in following:
            following = following[: following.index(_BOUNDARY)]
        return length, following

    def _longest(self, suffix: Sequence[int]) -> tuple[int, int]:
        """The best match's length and where it ends; ``(0, -1)`` when there is none."""
        best, best_end = 0, -1
        end = self._latest.get((suffix[-2], suffix[-1]), -1)
        for _ in range(_MAX_CANDIDATES):
            if end < 0:
                break
            if end + 1 < len(self._tokens) and self._tokens[end + 1] != _BOUNDARY:
                length = self._common(suffix, end)
                if length > best:
                    best, best_end = length, end
                if best == len(suffix):
                    break
            end = self._previous[end]
        return best, best_end

    def _common(self, suffix: Sequence[int], end: int) -> int:
        """How many of the last tokens of ``suffix`` stand up to the place ``end``."""
        length = MIN_MATCH
        while length < min(len(suffix), end + 1):
            if self._tokens[end - length] != suffix[-1 - length]:
                break
            length += 1
        return length


class Drafter:
    """Proposes what probably follows in one output; make one per generation.

    ``encode`` tokenizes text without adding special tokens. ``end_ids`` are the ids that end a
    generation, the one that the model normally writes first. ``history`` holds earlier outputs
    (None: only this one is searched); the caller adds this output to it when it is complete.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        end_ids: Sequence[int],
        num_pages: int,
        history: SuffixIndex | None,
        max_tokens: int = 7,
    ) -> None:
        self._encode = encode
        self._end_ids = end_ids
        self._num_pages = num_pages
        self._history = history
        self._max_tokens = max_tokens
        self._own = SuffixIndex()
        self._num_indexed = 0

    def propose(self, tokens: Sequence[int], machine: AnswerMachine, text_tail: bytes) -> list[int]:
        """Up to ``max_tokens`` ids that probably follow; empty when nothing suggests itself.

        ``tokens`` is the whole output so far, which may only grow from call to call; ``machine``
        has read it, and ``text_tail`` is the end of its text, ``TAIL_BYTES`` or more if there are.
        """
        self._own.extend(tokens[self._num_indexed :])
        self._num_indexed = len(tokens)
        return self.from_format(machine, text_tail) or self._from_past(tokens)

    def from_format(self, machine: AnswerMachine, text_tail: bytes) -> list[int]:
        """The part of a proposal that follows from the answer's format; see :meth:`propose`.

        The rest of the canonical answer is tokenized from where the text ends, so it fits whatever
        tokens wrote the text, however they split it.
        """
        text_tail = text_tail[-TAIL_BYTES:]
        if machine.state == "closed":
            written = _overlap(text_tail, _ANSWER_CLOSE)
            if not written:
                return []
            rest = [*self._encode(_ANSWER_CLOSE[written:].decode()), *self._end_ids[:1]]
        elif machine.state == "list":
            ending = self._rest_of_list(machine.ids, text_tail)
            rest = [*self._encode(ending), *self._end_ids[:1]] if ending else []
        else:
            rest = self._encode(_rest_of_tags(machine.state == "between", text_tail))
        return rest[: self._max_tokens]

    def _rest_of_list(self, ids: Sequence[int], text_tail: bytes) -> str:
        """From the end of the text: unused ids ascending, then ``]</answer>``.

        Empty before the first digit, and where the list is not canonical.
        """
        pieces = _LAST_PIECES.search(text_tail)
        if pieces is None:
            return ""
        before, space, digits, after = pieces.groups()
        unused = [number for number in range(1, self._num_pages + 1) if number not in ids]
        written = digits.decode()
        if not digits:
            if not ids or not unused:
                return ""
            first = ("" if space else " ") + str(unused.pop(0))
        elif ids and str(ids[-1]) == written and before != digits:
            first = ""  # a constrained machine counts an id before its delimiter is there
        else:
            fitting = [number for number in unused if str(number).startswith(written)]
            if not fitting or (after and str(fitting[0]) != written):
                return ""
            unused.remove(fitting[0])
            first = str(fitting[0])[len(written) :]
        # Every id is at least one token, so what a long list is cut to still fills a draft.
        others = "".join(f", {number}" for number in unused[: self._max_tokens])
        return f"{first}{others}{_ANSWER_CLOSE.decode()}"

    def _from_past(self, tokens: Sequence[int]) -> list[int]:
        """What followed ``tokens`` in this output or, if more of it matches, in earlier ones."""
        matched, following = self._own.find(tokens, self._max_tokens)
        if self._history is not None:
            matched_before, before = self._history.find(tokens, self._max_tokens)
            if matched_before > matched:
                return before
        return following


def _overlap(text: bytes, expected: bytes) -> int:
    """How many bytes of ``expected`` the end of ``text`` has already; the most that fit."""
    fits = (n for n in range(len(expected), 0, -1) if text.endswith(expected[:n]))
    return next(fits, 0)


def _rest_of_tags(reasoning_closed: bool, text_tail: bytes) -> str:
    """What is missing of ``</think><answer>[``; empty where it does not seem to be coming."""
    if reasoning_closed:
        after = text_tail.rpartition(_THINK_CLOSE)[2].lstrip()
        return _ANSWER_OPEN[len(after) :].decode() if _ANSWER_OPEN.startswith(after) else ""
    written = _overlap(text_tail, _THINK_CLOSE)
    if written < len("</"):  # a lone `<` may be "less than"
        return ""
    return (_THINK_CLOSE[written:] + _ANSWER_OPEN).decode()
