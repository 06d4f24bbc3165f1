"""Which tokens may come next in the answer's list."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor

from mmr5_runtime.stopping.grammar import BRACKET, ListPosition
from mmr5_runtime.stopping.machine import AnswerMachine
from mmr5_runtime.transfer import upload
from mmr5_runtime.types import EngineError

# What can stand in a list at all: of Qwen's 151,643 tokens a few hundred, most of them a bracket
# and something behind it. The group is the part that the grammar looks at.
_LIST_BYTES = re.compile(rb"(?=.)((?:[ \n\t]{0,4}[,0-9])*[ \n\t]{0,4}(?:\]|\Z)).*", re.DOTALL)
_REMEMBERED = 1024  # places of the list; one answer passes three per page


@dataclass(frozen=True, eq=False)
class _Choices:
    """``allowed``: int64 token ids [A], ascending; ``forks``: those of them [F] that meet a fork,
    way by way (see :meth:`ListPosition.way`); ``ways``: how many go each way, in that order."""

    allowed: Tensor
    forks: Tensor
    ways: Mapping[bytes, int]


@dataclass(eq=False)
class _Branch:
    """Tokens that begin with the same bytes: those that have no more, and the others by byte."""

    tokens: list[int] = field(default_factory=list)
    longer: dict[int, _Branch] = field(default_factory=dict)


class PermutationMask:
    """The tokens that :class:`ListPosition`'s grammar allows, for one vocabulary on one device.

    Thread-safe: what it remembers of past places is all it ever changes.
    """

    def __init__(self, vocabulary: Sequence[bytes], device: torch.device) -> None:
        """``vocabulary`` holds the bytes of each token id. Raises EngineError when a digit, the
        comma or the bracket is not a token, since then the grammar could run into dead ends."""
        self._device = device
        self._root = _Branch()
        for token, data in enumerate(vocabulary):
            if part := _LIST_BYTES.fullmatch(data):
                branch = self._root
                for byte in part[1]:
                    branch = branch.longer.setdefault(byte, _Branch())
                branch.tokens.append(token)
        missing = set(b"0123456789,]") - {
            byte for byte, branch in self._root.longer.items() if branch.tokens
        }
        if missing:
            raise EngineError(
                f"tokenizer.json has no token for {chr(min(missing))!r}; "
                "use the tokenizer of a Qwen2.5-VL checkpoint"
            )
        self._choices = lru_cache(_REMEMBERED)(self._choices_at)

    def allowed(self, machine: AnswerMachine) -> Tensor:
        """Ids [A] int64, ascending, of the tokens that may come next; never empty.

        ``machine`` must be in state ``list``.
        """
        return self._choices(machine.grammar_key).allowed

    def forks(self, machine: AnswerMachine) -> tuple[Tensor, Mapping[bytes, int]]:
        """The allowed tokens that decide something, ids [F] int64 ordered by what they decide.

        With them the ways, in that order, and how many tokens go each. ``machine`` must be in state
        ``list``.
        """
        choices = self._choices(machine.grammar_key)
        return choices.forks, choices.ways

    def _choices_at(self, place: ListPosition) -> _Choices:
        allowed: list[int] = []
        found: dict[bytes, list[int]] = {}
        for way, tokens in _walk(self._root, place, None):
            allowed += tokens
            if way is not None:
                found.setdefault(way, []).extend(tokens)
        ways = {way: sorted(found[way]) for way in sorted(found)}
        # One copy to the device for all of it: a place is new for almost every token of a list.
        ids = upload([*sorted(allowed), *chain.from_iterable(ways.values())], self._device)
        sizes = {way: len(tokens) for way, tokens in ways.items()}
        return _Choices(ids[: len(allowed)], ids[len(allowed) :], sizes)


def _walk(
    branch: _Branch, place: ListPosition, way: bytes | None
) -> Iterator[tuple[bytes | None, list[int]]]:
    """Allowed tokens of a branch with their way; ``place`` and ``way`` are what led there."""
    for byte, longer in branch.longer.items():
        gone = place.fork(byte) if way is None else way
        if byte == BRACKET:
            if place.may_close():
                yield gone, longer.tokens
        elif (behind := place.after(byte)) is not None:
            if longer.tokens:
                yield gone, longer.tokens
            if longer.longer:
                yield from _walk(longer, behind, gone)
