"""How sure the model was of each place: log-probabilities of the ids as it chose them.

The list is read as a Plackett-Luce ranking: each id is drawn from those not used yet, with the
model's probabilities renormalised over them. Ids of several digits are drawn digit by digit, and
ending an id is a draw against going on with it. White space and the brackets decide nothing. The
vocabulary is taken to hold no token of two digits, as Qwen's does.

``logits`` are float32 [V], the model's own, without temperature, penalty or mask; sums are float64.
The numbers compare the ids of one list, not lists with each other, and say nothing about relevance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mmr5_runtime.stopping.grammar import ENDS
from mmr5_runtime.stopping.machine import AnswerMachine
from mmr5_runtime.stopping.mask import PermutationMask


def choice_logprob(
    logits: Tensor,
    token: int,
    machine: AnswerMachine,
    mask: PermutationMask,
    vocabulary: Sequence[bytes],
) -> float | None:
    """Natural logarithm of the probability with which the model went the way ``token`` goes.

    ``machine`` has read everything before ``token``. The ways are those of the tokens that may
    stand here, grouped by the digit they add, or by ending the id. None where ``token`` decides
    nothing: outside the list, no fork, or a token that may not stand here.
    """
    if machine.state != "list":
        return None
    data, ways = vocabulary[token], mask.ways(machine)
    way = machine.grammar_key.way(data)
    if way is None or way not in ways or not machine.allows(data):
        return None
    return _logprobs(logits, ways)[way]


class ListScores:
    """Log-probability of every id of a list, summed up while the list is written."""

    def __init__(self) -> None:
        self._logprobs: tuple[float, ...] = ()
        self._writing: float | None = None  # the choices of the id being written, if it had any

    @property
    def logprobs(self) -> tuple[float, ...]:
        """One number <= 0 per id that an observed token completed, in the order of ``ids``.

        NaN for an id that was not drawn: in a list that is not constrained, other scripts' digits
        or several numbers between two commas are read as ids too.
        """
        return self._logprobs

    def observe(self, chosen: float | None, data: bytes, machine: AnswerMachine) -> None:
        """Take in a token that adds ``data``, with ``machine`` as it was before it.

        ``chosen`` is its :func:`choice_logprob`.
        """
        if machine.state == "list":
            place = machine.grammar_key
            if not place.digits and place.way(data) is not None:
                self._writing = None  # an id begins; what came before it named none
            if chosen is not None:
                self._writing = (self._writing or 0.0) + chosen
        after = machine.copy()
        after.feed(data)
        completed = len(after.ids) - len(machine.ids)
        if completed:
            drawn = self._writing if completed == 1 and self._writing is not None else math.nan
            self._logprobs += (drawn,) * completed
            self._writing = None


def first_choice(
    logits: Tensor,
    machine: AnswerMachine,
    mask: PermutationMask,
    vocabulary: Sequence[bytes],
    fork: Callable[[Sequence[int]], Tensor],
) -> dict[int, float]:
    """Probability of every unused id to be named next; ascending ids, sum 1.

    ``machine`` stands in the list before an id and ``logits`` are those of the next token.
    ``fork(tokens)`` returns the logits [V] after ``tokens`` more and forgets them again; it is
    called once for every run of digits that several unused ids begin with, so never for N < 10.
    """
    place = machine.grammar_key
    if machine.state != "list" or place.digits or not place.free:
        raise ValueError("the machine does not stand before an id of a list; feed it up to there")

    def share_out(
        mass: float, row: Tensor, machine: AnswerMachine, written: tuple[int, ...]
    ) -> Iterator[tuple[int, float]]:
        """Divide ``mass``, the probability of the tokens ``written``, among the ids they begin."""
        place, ways = machine.grammar_key, mask.ways(machine)
        for way, logprob in _logprobs(row, ways).items():
            share = mass * math.exp(logprob)
            if way == ENDS:
                yield int(place.digits), share
                continue
            begun = [number for number in place.free if number.startswith(place.digits + way)]
            if len(begun) == 1:
                yield int(begun[0]), share
                continue
            likeliest = int(ways[way][row[ways[way]].argmax()])
            deeper = machine.copy()
            deeper.feed(vocabulary[likeliest])
            tokens = (*written, likeliest)
            yield from share_out(share, fork(tokens), deeper, tokens)

    return dict(sorted(share_out(1.0, logits, machine, ())))


def _logprobs(logits: Tensor, ways: Mapping[bytes, Tensor]) -> dict[bytes, float]:
    """Log of each way's share of the probability of all ways."""
    masses = torch.stack([logits[tokens].double().logsumexp(0) for tokens in ways.values()])
    return dict(zip(ways, masses.log_softmax(0).tolist(), strict=True))
