"""The answer's list read byte by byte, while it is generated.

The tags and brackets of an answer never coincide with tokens (``><``, ``>[``, ``]</`` and ``>\\n``
are single tokens of Qwen's vocabulary), so everything here works on the bytes of the decoded text,
and any split of them into pieces gives the same result.

Only the first list behind the first ``</think>`` counts. Once it has been opened, what is known of
the order can only grow: ids are kept in order of first mention, repeated and unknown ones are
dropped, missing ones are appended in input order. Hence with N - 1 of N ids the whole order is
known, and with k ids its first k places.
"""

from __future__ import annotations

import copy
import re
from typing import Literal

from mmr5_runtime.stopping.grammar import DIGITS, MAX_SPACE, SPACE, ListPosition

State = Literal["before", "think", "between", "list", "closed"]

_THINK_CLOSE, _ANSWER_OPEN, _ANSWER_CLOSE = b"</think>", b"<answer>", b"</answer>"
_REASONING_TAG = re.compile(rb"<think>|</think>|<answer>\[")
_LIST_OPEN = re.compile(rb"<answer>\s*\[")
_MAYBE_LIST_OPEN = re.compile(rb"<answer>\s*\Z")
_DELIMITER = re.compile(rb"[,\]]|</answer>")
_LEADING_ID = re.compile(rb"[ \n\t]*([1-9][0-9]*)")
# A decimal is matched whole so that its halves are not taken for two ids.
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def whole_numbers(text: str) -> list[tuple[int, int]]:
    """Whole numbers anywhere in ``text`` and where each ends; decimals and 10 digits up do not
    count."""
    return [
        (int(match[0]), match.end())
        for match in _NUMBER.finditer(text)
        if "." not in match[0] and len(match[0]) < 10
    ]


class AnswerMachine:
    """Where the generated text stands and which ids its list has named.

    ``constrained`` says that the decoder keeps the list to :class:`ListPosition`'s grammar. Then an
    id counts as soon as no unused id is longer, and otherwise, as always without it, at the
    delimiter behind it.
    """

    def __init__(self, num_pages: int, *, constrained: bool = False) -> None:
        self._num_pages = num_pages
        self._constrained = constrained
        # Everything held is immutable, so that a shallow copy is a copy.
        self._state: State = "before"
        self._ids: tuple[int, ...] = ()
        self._repaired = False
        self._quoted = False
        self._closed_by_tag = False
        self._text = b""  # bytes read whose meaning depends on what follows; in a list, the piece
        self._searched = 0  # how much of the piece holds no delimiter
        self._counted = False  # the id of the piece being written is in `ids` already

    @property
    def state(self) -> State:
        """``before`` the reasoning, in it (``think``), ``between`` it and the answer's list, in the
        ``list``, or behind it (``closed``)."""
        return self._state

    @property
    def ids(self) -> tuple[int, ...]:
        """Distinct 1-based ids of the list that are complete, in order of first mention."""
        return self._ids

    @property
    def repaired(self) -> bool:
        """Whether the list holds something repeated, outside 1..N or not a number."""
        return self._repaired

    @property
    def quoted(self) -> bool:
        """Whether ``<answer>[`` stood in the reasoning. The reference reads the first complete list
        of the whole text, wherever it stands, so that nothing is certain before the end."""
        return self._quoted

    @property
    def determined(self) -> bool:
        """Whether the order is the same whatever may follow: only one id is left, or the list has
        ended and named any."""
        if self._state == "list":
            return len(self._ids) >= self._num_pages - 1
        return self._state == "closed" and (bool(self._ids) or self._num_pages == 1)

    @property
    def closed_by_tag(self) -> bool:
        """Whether ``</answer>`` has been read completely, in the list or behind it."""
        return self._closed_by_tag

    @property
    def pending_close(self) -> int:
        """How many bytes at the end of the reasoning begin a ``</think>`` (0 to 7)."""
        if self._state not in ("before", "think"):
            return 0
        lengths = range(len(_THINK_CLOSE) - 1, 0, -1)
        return next((n for n in lengths if self._text.endswith(_THINK_CLOSE[:n])), 0)

    @property
    def grammar_key(self) -> ListPosition:
        """The place in the list, in state ``list``; equal places allow the same bytes."""
        written = self._text.rstrip(SPACE)
        digits = written[len(written.rstrip(DIGITS)) :]
        used = self._ids[:-1] if self._counted else self._ids
        spaces = min(len(self._text) - len(written), MAX_SPACE)
        return ListPosition(self._num_pages, frozenset(used), digits, spaces)

    def allows(self, data: bytes) -> bool:
        """Whether the grammar lets ``data`` come next, in state ``list``."""
        return self.grammar_key.allows(data)

    def copy(self) -> AnswerMachine:
        """An independent machine that has read the same."""
        return copy.copy(self)

    def feed(self, data: bytes) -> None:
        """Read the next bytes of the decoded text."""
        self._text += data
        while self._advance():
            pass

    def finish(self) -> None:
        """The text ends here: a last piece counts, but not a number that could have gone on."""
        if self._state == "list":
            self._end_piece(self._text, cut=True)
            self._hold(b"")

    def _advance(self) -> bool:
        """Take the next tag or piece out of the text; False when it holds none (yet)."""
        match self._state:
            case "before" | "think":
                return self._read_reasoning()
            case "between":
                return self._find_list()
            case "list":
                return self._read_list()
            case "closed":
                self._closed_by_tag |= _ANSWER_CLOSE in self._text
                self._hold(self._text[1 - len(_ANSWER_CLOSE) :])
                return False

    def _hold(self, text: bytes) -> None:
        self._text, self._searched = text, 0

    def _read_reasoning(self) -> bool:
        tag = _REASONING_TAG.search(self._text)
        if tag is None:
            self._hold(self._text[-len(_ANSWER_OPEN) :])
            return False
        if tag[0] == _THINK_CLOSE:
            self._state = "between"
        elif tag[0].endswith(b"["):
            self._quoted = True
        else:
            self._state = "think"
        self._hold(self._text[tag.end() :])
        return True

    def _find_list(self) -> bool:
        opening = None if self._quoted else _LIST_OPEN.search(self._text)
        if opening is None:
            # White space between the tag and its bracket says nothing: it need not be held.
            waiting = _MAYBE_LIST_OPEN.search(self._text)
            self._hold(_ANSWER_OPEN if waiting else self._text[1 - len(_ANSWER_OPEN) :])
            return False
        self._state = "list"
        self._hold(self._text[opening.end() :])
        return True

    def _read_list(self) -> bool:
        delimiter = _DELIMITER.search(self._text, self._searched)
        if delimiter is None:
            self._searched = max(0, len(self._text) + 1 - len(_ANSWER_CLOSE))
            self._count_early(self._text)
            return False
        self._end_piece(self._text[: delimiter.start()])
        if delimiter[0] != b",":
            self._state = "closed"
            self._closed_by_tag = delimiter[0] == _ANSWER_CLOSE
        self._hold(self._text[delimiter.end() :])
        return True

    def _count_early(self, piece: bytes) -> None:
        """Count the id of a constrained piece once its digits cannot go on."""
        leading = _LEADING_ID.match(piece)
        if not self._constrained or self._counted or leading is None:
            return
        for length in range(1, min(len(leading[1]), len(str(self._num_pages))) + 1):
            number = int(leading[1][:length])
            if self._is_free(number) and not self._may_go_on(number):
                self._ids += (number,)
                self._counted = True
                return

    def _end_piece(self, piece: bytes, cut: bool = False) -> None:
        """Read a complete piece, or what there is of the last one when the text was ``cut``."""
        self._count_early(piece)
        text = piece.decode("utf-8", "replace")
        numbers, clean = _read_piece(text)
        if self._counted:
            # Under the grammar only white space can have followed.
            clean &= [number for number, _ in numbers] == [self._ids[-1]]
            numbers = []
        for number, end in numbers:
            if cut and end == len(text) and self._may_go_on(number):
                break
            if self._is_free(number):
                self._ids += (number,)
            else:
                clean = False
        self._repaired |= not clean
        self._counted = False

    def _is_free(self, number: int) -> bool:
        return 1 <= number <= self._num_pages and number not in self._ids

    def _may_go_on(self, number: int) -> bool:
        """Whether ``number`` could become a longer id, if constrained an unused one."""
        if not self._constrained:
            return number * 10 <= self._num_pages
        longer = (
            other
            for other in range(number * 10, self._num_pages + 1)
            if str(other).startswith(str(number))
        )
        return any(other not in self._ids for other in longer)


def _read_piece(text: str) -> tuple[list[tuple[int, int]], bool]:
    """Numbers of one piece, where each ends in it, and whether the piece is blank or an integer.

    ``int`` decides, as in the reference, so ``+1``, ``1_0`` and other scripts' digits count.
    """
    if not text.strip():
        return [], True
    try:
        return [(int(text), len(text.rstrip()))], True
    except ValueError:
        return whole_numbers(text), False
