"""Generated text to a ranking.

The reference is the public MM-R5 script: the first one-line ``<answer>[...]</answer>`` anywhere,
comma pieces through ``int``, ids outside 1..N dropped, missing ones appended in input order. Where
it reads the first list behind the reasoning, the order here is the same, except that a repeated id
keeps its first place only (the script returns it twice).

That first list is read by the :class:`AnswerMachine` that also watches the generation, well formed
or not: the script would skip a malformed one in favour of a later one, but then no order would be
certain before the text ends. Where there is no such list (no ``</think>``, an answer quoted in the
reasoning, a list without one valid id) the script's reading comes first; where that fails too, the
script answers the input order without saying so, and here whatever can be read is used. ``status``
always tells how the order was obtained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmr5_runtime.stopping.machine import AnswerMachine, whole_numbers
from mmr5_runtime.types import Status

_THINK_OPEN, _THINK_CLOSE, _ANSWER_OPEN = "<think>", "</think>", "<answer>"
_STRICT = re.compile(r"<answer>\[(.*?)\]</answer>")
_OPEN = re.compile(r"<answer>", re.IGNORECASE)
_CLOSE = re.compile(r"</answer>", re.IGNORECASE)
_BARE_LIST = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True)
class ParsedAnswer:
    """``order``: 0-based permutation of the pages, best first; ``status``: how it was obtained."""

    order: tuple[int, ...]
    status: Status
    reasoning: str


def parse_answer(text: str, num_pages: int) -> ParsedAnswer:
    """Read the ranking of ``num_pages`` pages out of generated ``text``; never raises.

    ``status`` is ``ok`` when the answer, written as the reference reads it, named every page
    exactly once, ``repaired`` when at least one page could be read, ``fallback`` (input order)
    otherwise.
    """
    machine = AnswerMachine(num_pages)
    machine.feed(text.encode("utf-8", "replace"))
    machine.finish()
    strict = _STRICT.search(text)
    reference = _integers(strict[1]) if strict else None
    ids: Sequence[int] = machine.ids
    if not ids:  # always so when an answer is quoted
        ids = _salvage(text, num_pages) if reference is None else reference
    status: Status
    if reference == list(ids) and _names_every_page(ids, num_pages):
        status = "ok"
    else:
        status = "repaired" if any(1 <= i <= num_pages for i in ids) else "fallback"
    return ParsedAnswer(order_of(ids, num_pages), status, extract_reasoning(text))


def order_of(ids: Sequence[int], num_pages: int) -> tuple[int, ...]:
    """The 0-based order that 1-based ``ids`` begin: repeated and unknown ones are dropped, missing
    ones appended in input order. Always a permutation of ``range(num_pages)``."""
    named = dict.fromkeys(i - 1 for i in ids if 1 <= i <= num_pages)
    return (*named, *(page for page in range(num_pages) if page not in named))


def _names_every_page(ids: Sequence[int], num_pages: int) -> bool:
    return sorted(ids) == list(range(1, num_pages + 1))


def _integers(listing: str) -> list[int] | None:
    """Comma pieces through ``int`` (so ``+1``, ``1_0`` and other scripts' digits count), blanks
    skipped; None when a piece is not an integer."""
    try:
        return [int(piece) for piece in listing.split(",") if piece.strip()]
    except ValueError:
        return None


def _salvage(text: str, num_pages: int) -> list[int]:
    """Ids of the most credible list in ``text``; empty when there is none.

    Tried in turn: the last tagged list of integers alone, numbers in the last tagged answer that
    has any, the last untagged list that names every page once. Other untagged lists are citations
    such as "[2] and [3] show", not answers.
    """

    def usable(ids: Sequence[int] | None) -> bool:
        return ids is not None and any(1 <= i <= num_pages for i in ids)

    bodies = list(_tagged_bodies(text))
    for body, _ in reversed(bodies):
        ids = _integers(body.partition("]")[0]) if "]" in body else None
        if ids is not None and usable(ids):
            return ids
    for body, cut in reversed(bodies):
        ids = _numbers(body, num_pages, cut)
        if usable(ids):
            return ids
    for match in reversed(list(_BARE_LIST.finditer(text))):
        ids = _integers(match.group(1))
        if ids is not None and _names_every_page(ids, num_pages):
            return ids
    return []


def _tagged_bodies(text: str) -> Iterator[tuple[str, bool]]:
    """What follows each ``<answer>`` and its bracket, and whether the text breaks off in it."""
    after_tags = _OPEN.split(text)[1:]
    for position, after in enumerate(after_tags, start=1):
        body, *closed = _CLOSE.split(after, maxsplit=1)
        inside = body.partition("[")[2] or body
        yield inside, not closed and position == len(after_tags) and "]" not in inside


def _numbers(body: str, num_pages: int, cut: bool) -> list[int]:
    """Whole numbers anywhere in the listing, as in ``[Image 2, Image 1]`` or ``2 > 1``."""
    ids = [number for number, _ in whole_numbers(body.rpartition("]")[0] or body)]
    # Broken off inside a number: `1` may have been the start of `12`.
    if cut and ids and body[-1:].isdigit() and ids[-1] * 10 <= num_pages:
        ids.pop()
    return ids


def extract_reasoning(text: str) -> str:
    """The text between the think tags, white space kept.

    A missing opening tag means from the start, a missing closing tag up to the answer.
    """
    end = text.find(_THINK_CLOSE)
    if end < 0:
        end = text.find(_ANSWER_OPEN)
    region = text if end < 0 else text[:end]
    before, tag, inside = region.partition(_THINK_OPEN)
    return inside if tag else before


class ReasoningStream:
    """Gives out the reasoning while it is generated.

    The joined pieces of all ``feed`` calls and the final ``finish`` equal ``extract_reasoning``
    of the whole text. Text before ``<think>`` is held back, since it only counts when that tag
    never comes; so is what follows an ``<answer>`` inside the reasoning.
    """

    def __init__(self) -> None:
        self._text = ""
        self._sent = 0

    def feed(self, piece: str) -> str:
        """Append generated text; returns the reasoning that is certain now, possibly empty."""
        self._text += piece
        return self._advance(self._certain())

    def finish(self) -> str:
        """The rest, once the generation has ended."""
        return self._advance(extract_reasoning(self._text))

    def _advance(self, reasoning: str) -> str:
        fresh = reasoning[self._sent :]
        self._sent += len(fresh)
        return fresh

    def _certain(self) -> str:
        text = self._text
        if _THINK_CLOSE in text:
            return extract_reasoning(text)
        before, tag, inside = text.partition(_THINK_OPEN)
        if not tag or _ANSWER_OPEN in before:
            return ""
        inside, answer, _ = inside.partition(_ANSWER_OPEN)
        if answer:
            return inside
        # The end may be the beginning of a tag.
        for length in range(min(len(_THINK_CLOSE) - 1, len(inside)), 0, -1):
            if (_THINK_CLOSE[:length] == inside[-length:]) or (
                _ANSWER_OPEN[:length] == inside[-length:]
            ):
                return inside[:-length]
        return inside
