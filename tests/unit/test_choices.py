"""Probabilities of ids against everything a toy model could write under the mask."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mmr5_runtime.stopping.choices import ListScores, first_choice, way_logits, way_logprob
from mmr5_runtime.stopping.machine import AnswerMachine
from mmr5_runtime.stopping.mask import PermutationMask

OPENED = b"</think><answer>["
DIGITS = [b"%d" % digit for digit in range(10)]
DENSE = [*DIGITS, b",", b"]", b"]</", b"x", b"</answer>", b""]  # ids follow delimiters directly
SPACED = [*DENSE, b" ", b", ", b"\n", b"4x"]
CPU = torch.device("cpu")


class ToyModel:
    """Random logits for every text; the same text always gives the same."""

    def __init__(self, vocabulary: Sequence[bytes], seed: int) -> None:
        self.vocabulary = vocabulary
        self.mask = PermutationMask(vocabulary, CPU)
        self._seed = seed

    def logits(self, written: bytes) -> Tensor:
        """Float32 [V] after ``written``."""
        generator = random.Random(f"{self._seed} {written!r}")
        return torch.tensor([generator.gauss(0, 2) for _ in self.vocabulary])

    def allowed(self, machine: AnswerMachine, written: bytes) -> dict[int, float]:
        """Probability of every token that may stand behind ``written``, all others masked."""
        weights = self.logits(written).double().exp().tolist()
        tokens = [t for t, data in enumerate(self.vocabulary) if machine.allows(data)]
        total = sum(weights[token] for token in tokens)
        return {token: weights[token] / total for token in tokens}

    def next_ids(self, machine: AnswerMachine, written: bytes) -> dict[int, float]:
        """Probability of each id to be the next complete one, by writing everything there is."""
        chances: defaultdict[int, float] = defaultdict(float)
        for token, chance in self.allowed(machine, written).items():
            after, data = machine.copy(), self.vocabulary[token]
            after.feed(data)
            if len(after.ids) > len(machine.ids):
                chances[after.ids[-1]] += chance
            else:
                for number, further in self.next_ids(after, written + data).items():
                    chances[number] += chance * further
        return chances

    def tokens(self, text: bytes) -> list[int]:
        """One token per byte of ``text``."""
        return [self.vocabulary.index(bytes([byte])) for byte in text]


def opened(num_pages: int, listing: bytes = b"", constrained: bool = True) -> AnswerMachine:
    machine = AnswerMachine(num_pages, constrained=constrained)
    machine.feed(OPENED + listing)
    return machine


@pytest.mark.parametrize("num_pages", [1, 2, 5, 9, 10, 12, 21, 30, 112])
def test_first_choice_is_what_a_masked_model_writes_next(num_pages: int) -> None:
    model = ToyModel(DENSE, num_pages)
    forks: list[bytes] = []

    def fork(tokens: Sequence[int]) -> Tensor:
        forks.append(b"".join(DENSE[token] for token in tokens))
        return model.logits(forks[-1])

    machine = opened(num_pages)
    found = first_choice(model.logits(b""), machine, model.mask, DENSE, fork)
    assert list(found) == list(range(1, num_pages + 1))
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    assert found == pytest.approx(dict(model.next_ids(machine, b"")), rel=1e-9)
    names = [b"%d" % number for number in range(1, num_pages + 1)]
    ambiguous = [n for n in names if any(o.startswith(n) and o != n for o in names)]
    assert sorted(forks) == sorted(ambiguous)
    assert machine.ids == () and machine.grammar_key.digits == b""


def test_an_id_in_doubt_is_followed_through_its_likeliest_token() -> None:
    vocabulary = [*DENSE, b" 1"]
    for likelier in (b"1", b" 1"):
        logits = torch.zeros(len(vocabulary))
        logits[vocabulary.index(likelier)] = 5
        forks: list[bytes] = []

        def fork(
            tokens: Sequence[int], forks: list[bytes] = forks, logits: Tensor = logits
        ) -> Tensor:
            forks.append(b"".join(vocabulary[token] for token in tokens))
            return logits

        first_choice(logits, opened(10), PermutationMask(vocabulary, CPU), vocabulary, fork)
        assert forks == [likelier]


def test_later_choices_are_among_unused_ids() -> None:
    model = ToyModel(DENSE, 3)
    written = b"3,1,10,"
    machine = opened(14, written)
    found = first_choice(
        model.logits(written),
        machine,
        model.mask,
        DENSE,
        lambda tokens: model.logits(written + b"".join(DENSE[token] for token in tokens)),
    )
    assert list(found) == [2, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14]
    assert found == pytest.approx(dict(model.next_ids(machine, written)), rel=1e-9)


@pytest.mark.parametrize("listing", [b"1", b"3,2,1]", b"3, "])
def test_first_choice_needs_a_place_before_an_id(listing: bytes) -> None:
    model = ToyModel(SPACED, 0)
    machine = opened(12 if listing == b"1" else 3, listing)
    if listing == b"3, ":
        machine.feed(b"2,1,")  # no id is left
    with pytest.raises(ValueError, match="before an id"):
        first_choice(model.logits(b""), machine, model.mask, SPACED, model.logits)  # type: ignore[arg-type]


def choice_logprob(
    row: Tensor, token: int, machine: AnswerMachine, model: ToyModel
) -> float | None:
    """With which log-probability the model went the way of ``token``, if it decided anything."""
    logits = way_logits(row, machine, model.mask)
    if logits is None:
        return None
    return way_logprob(logits.tolist(), token, machine, model.mask, model.vocabulary)


def read(
    scores: ListScores, model: ToyModel, written: bytes, token: int, machine: AnswerMachine
) -> None:
    row, vocabulary = model.logits(written), model.vocabulary
    drawn = choice_logprob(row, token, machine, model)
    scores.read(drawn, vocabulary[token], machine)


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("num_pages", [1, 4, 12, 23])
def test_scores_of_a_list_are_those_of_its_ids(num_pages: int, constrained: bool) -> None:
    model = ToyModel(DENSE, num_pages)
    ids = random.Random(num_pages).sample(range(1, num_pages + 1), num_pages)
    machine = opened(num_pages, constrained=constrained)
    scores, written = ListScores(), b""
    expected: list[float] = []
    for token in model.tokens(b",".join(b"%d" % number for number in ids) + b"]"):
        if not machine.grammar_key.digits:
            before = opened(num_pages, written)
            expected.append(math.log(model.next_ids(before, written)[ids[len(expected)]]))
        read(scores, model, written, token, machine)
        written += DENSE[token]
        assert len(scores.logprobs) == len(machine.ids)
    assert machine.ids == tuple(ids)
    assert scores.logprobs == pytest.approx(expected, rel=1e-9)
    assert scores.logprobs[-1] == 0.0  # nothing else was left


def chosen(model: ToyModel, machine: AnswerMachine, data: bytes) -> float | None:
    token = model.vocabulary.index(data)
    found = choice_logprob(model.logits(b""), token, machine, model)
    return None if found is None else math.exp(found)


def share(model: ToyModel, way: Sequence[bytes], all_ways: Sequence[bytes]) -> float:
    weights = dict(zip(model.vocabulary, model.logits(b"").double().exp().tolist(), strict=True))
    return math.fsum(weights[data] for data in way) / math.fsum(weights[data] for data in all_ways)


def test_first_digits_share_among_digits() -> None:
    model = ToyModel(SPACED, 8)
    machine = opened(5, b"3, ")
    unused = [b"1", b"2", b"4", b"5"]
    assert chosen(model, machine, b"4") == pytest.approx(share(model, [b"4"], unused))
    assert chosen(model, machine, b"3") is None
    assert chosen(model, machine, b"4x") is None
    assert chosen(model, machine, b" ") is None
    assert chosen(model, opened(1), b"1") == 1.0


def test_further_digits_share_with_the_end() -> None:
    model = ToyModel(SPACED, 8)
    machine = opened(12, b"3, 1")
    ends = [b",", b", ", b" ", b"\n", b"]", b"]</"]
    ways = [b"0", b"1", b"2", *ends]
    assert chosen(model, machine, b"2") == pytest.approx(share(model, [b"2"], ways))
    for end in ends:
        assert chosen(model, machine, end) == pytest.approx(share(model, ends, ways))
    assert chosen(model, machine, b"3") is None
    # With 1 used, an end is no way any more; with 10 to 12 used, it is the only one.
    used = opened(12, b"1, 10, 1")
    assert chosen(model, used, b"2") == pytest.approx(share(model, [b"2"], [b"1", b"2"]))
    assert chosen(model, used, b",") is None
    assert chosen(model, opened(12, b"10, 11, 12, 1"), b",") is None


@pytest.mark.parametrize(
    ("listing", "data"), [(b"3", b","), (b"3", b"]"), (b"3", b" "), (b"1 ", b","), (b"12", b", ")]
)
def test_nothing_is_decided_behind_a_complete_id(listing: bytes, data: bytes) -> None:
    assert chosen(ToyModel(SPACED, 1), opened(12, listing), data) is None


def test_nothing_is_decided_outside_the_list() -> None:
    machine = AnswerMachine(5)
    assert chosen(ToyModel(SPACED, 1), machine, b"3") is None
    assert chosen(ToyModel(SPACED, 1), opened(5, b"3]"), b"1") is None


def test_lists_without_a_mask_score_what_was_drawn() -> None:
    model = ToyModel(SPACED, 2)
    machine, scores = opened(5, constrained=False), ListScores()
    for token in model.tokens(b"x3x,3,9,2 1,4]"):
        read(scores, model, b"", token, machine)
    assert machine.ids == (3, 2, 1, 4)
    third, two, one, four = scores.logprobs
    numbers = [b"1", b"2", b"3", b"4", b"5"]
    assert third == pytest.approx(math.log(share(model, [b"3"], numbers)))
    assert math.isnan(two) and math.isnan(one)  # `2 1` is no choice of one id
    assert four == pytest.approx(math.log(share(model, [b"4"], [b"4", b"5"])))


def test_an_id_that_came_to_nothing_leaves_nothing_behind() -> None:
    model = ToyModel(SPACED, 2)
    machine, scores = opened(12, constrained=False), ListScores()
    for token in model.tokens(b"19,3,"):
        read(scores, model, b"", token, machine)
    numbers = [b"%d" % digit for digit in range(1, 10)]
    assert scores.logprobs == pytest.approx([math.log(share(model, [b"3"], numbers))])
