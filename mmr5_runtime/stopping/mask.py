"""Which tokens may come next in the answer's list."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mmr5_runtime.stopping.grammar import ListPosition
from mmr5_runtime.stopping.machine import AnswerMachine
from mmr5_runtime.types import EngineError

# What can stand in a list at all: of Qwen's 151,643 tokens a few hundred, most of them a bracket
# and something behind it. The group is the part that the grammar looks at.
_LIST_BYTES = re.compile(rb"(?=.)((?:[ \n\t]{0,4}[,0-9])*[ \n\t]{0,4}(?:\]|\Z)).*", re.DOTALL)
_REMEMBERED = 1024  # places of the list; one answer passes three per page


@dataclass(frozen=True, eq=False)
class _Choices:
    """``allowed``: int64 token ids [A], ascending; ``ways``: those of them that meet a fork, by the
    way they go there (see :meth:`ListPosition.way`)."""

    allowed: Tensor
    ways: Mapping[bytes, Tensor]


class PermutationMask:
    """The tokens that :class:`ListPosition`'s grammar allows, for one vocabulary on one device.

    Thread-safe: what it remembers of past places is all it ever changes.
    """

    def __init__(self, vocabulary: Sequence[bytes], device: torch.device) -> None:
        """``vocabulary`` holds the bytes of each token id. Raises EngineError when a digit, the
        comma or the bracket is not a token, since then the grammar could run into dead ends."""
        self._device = device
        self._tokens: dict[bytes, list[int]] = {}
        for token, data in enumerate(vocabulary):
            if part := _LIST_BYTES.fullmatch(data):
                self._tokens.setdefault(part[1], []).append(token)
        missing = {b"%c" % byte for byte in b"0123456789,]"} - self._tokens.keys()
        if missing:
            raise EngineError(
                f"tokenizer.json has no token for {min(missing).decode()!r}; "
                "use the tokenizer of a Qwen2.5-VL checkpoint"
            )
        self._choices = lru_cache(_REMEMBERED)(self._choices_at)

    def allowed(self, machine: AnswerMachine) -> Tensor:
        """Ids [A] int64, ascending, of the tokens that may come next; never empty.

        ``machine`` must be in state ``list``.
        """
        return self._choices(machine.grammar_key).allowed

    def ways(self, machine: AnswerMachine) -> Mapping[bytes, Tensor]:
        """The allowed tokens that decide something, by what they decide: ids [W] int64 per way.

        ``machine`` must be in state ``list``.
        """
        return self._choices(machine.grammar_key).ways

    def _choices_at(self, place: ListPosition) -> _Choices:
        allowed: list[int] = []
        ways: dict[bytes, list[int]] = {}
        for part, tokens in self._tokens.items():
            if place.allows(part):
                allowed += tokens
                way = place.way(part)
                if way is not None:
                    ways.setdefault(way, []).extend(tokens)
        return _Choices(
            self._ids(allowed), {way: self._ids(tokens) for way, tokens in sorted(ways.items())}
        )

    def _ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor(sorted(tokens), dtype=torch.long, device=self._device)
