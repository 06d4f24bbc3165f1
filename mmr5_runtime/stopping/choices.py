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
from itertools import islice

from torch import Tensor

from mmr5_runtime.stopping.grammar import ENDS
from mmr5_runtime.stopping.machine import AnswerMachine
from mmr5_runtime.stopping.mask import PermutationMask


def way_logits(logits: Tensor, machine: AnswerMachine, mask: PermutationMask) -> Tensor | None:
    """Logits [F] of the tokens at a fork, as ``mask.forks`` orders them, for :func:`way_logprob`.

    The ways are those of the tokens that may stand here, grouped by the digit they add, or by
    ending the id. ``machine`` has read everything so far. On the device of ``logits``, which nobody
    waits for; None outside the list and where there is no fork.
    """
    if machine.state != "list":
        return None
    tokens, ways = mask.forks(machine)
    return logits.index_select(0, tokens) if ways else None


def way_logprob(
    way_logits: Sequence[float],
    token: int,
    machine: AnswerMachine,
    mask: PermutationMask,
    vocabulary: Sequence[bytes],
) -> float | None:
    """Natural logarithm of the probability with which the model went the way ``token`` goes.

    ``way_logits`` are the numbers of :func:`way_logits`, and ``machine`` is as it was then. None
    where ``token`` decides nothing: no fork, or a token that may not stand here.
    """
    data = vocabulary[token]
    place = machine.grammar_key
    way = place.way(data)
    if way is None or not place.allows(data):
        return None
    _, ways = mask.forks(machine)
    return _shares(way_logits, ways).get(way)


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

    def read(self, chosen: float | None, data: bytes, machine: AnswerMachine) -> None:
        """Let ``machine`` read a token that adds ``data``, and take in what that completes.

        ``chosen`` is the log-probability of the way it went, None if it decided nothing.
        """
        known = len(machine.ids)
        if machine.state == "list":
            place = machine.grammar_key
            if not place.digits and place.way(data) is not None:
                self._writing = None  # an id begins; what came before it named none
            if chosen is not None:
                self._writing = (self._writing or 0.0) + chosen
        machine.feed(data)
        completed = len(machine.ids) - known
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

    return dict(sorted(_share_out(1.0, logits, machine, (), mask, vocabulary, fork)))


# No closure: one that names itself is a cycle, and would keep what ``fork`` holds (a whole arena)
# until the collector of cycles comes by.
def _share_out(
    mass: float,
    row: Tensor,
    machine: AnswerMachine,
    written: tuple[int, ...],
    mask: PermutationMask,
    vocabulary: Sequence[bytes],
    fork: Callable[[Sequence[int]], Tensor],
) -> Iterator[tuple[int, float]]:
    """Divide ``mass``, the probability of the tokens ``written``, among the ids they begin."""
    place, (ids, ways) = machine.grammar_key, mask.forks(machine)
    ids_of = dict(zip(ways, ids.split(list(ways.values())), strict=True))
    for way, logprob in _shares(row[ids].tolist(), ways).items():
        share = mass * math.exp(logprob)
        if way == ENDS:
            yield int(place.digits), share
            continue
        begun = [number for number in place.free if number.startswith(place.digits + way)]
        if len(begun) == 1:
            yield int(begun[0]), share
            continue
        likeliest = int(ids_of[way][row[ids_of[way]].argmax()])
        deeper = machine.copy()
        deeper.feed(vocabulary[likeliest])
        tokens = (*written, likeliest)
        yield from _share_out(share, fork(tokens), deeper, tokens, mask, vocabulary, fork)


def _shares(logits: Sequence[float], ways: Mapping[bytes, int]) -> dict[bytes, float]:
    """Log of each way's share of the probability of all ways; ``ways``: how many go each."""
    left = iter(logits)
    masses = [_logsumexp(list(islice(left, count))) for count in ways.values()]
    whole = _logsumexp(masses)
    return {way: mass - whole for way, mass in zip(ways, masses, strict=True)}


def _logsumexp(numbers: Sequence[float]) -> float:
    top = max(numbers)
    if len(numbers) == 1 or math.isinf(top):
        return top
    return top + math.log(math.fsum(math.exp(number - top) for number in numbers))
