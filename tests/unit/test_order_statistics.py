"""Statistics of orders against values worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmr5_runtime.agreement import (
    bootstrap_interval,
    kendall_tau,
    overlap_at,
    paired_interval,
    recall_at,
    top1,
    wilson_interval,
)

orders = st.permutations(range(7))


def test_kendall_tau_by_hand() -> None:
    assert kendall_tau((0, 1, 2), (0, 1, 2)) == 1.0
    assert kendall_tau((0, 1, 2), (2, 1, 0)) == -1.0
    assert kendall_tau((0, 1, 2), (0, 2, 1)) == pytest.approx(1 / 3)
    assert kendall_tau((0,), (0,)) == 1.0


@given(order=orders, swap=st.integers(0, 5))
def test_one_swap_of_neighbours_costs_one_pair(order: list[int], swap: int) -> None:
    other = list(order)
    other[swap], other[swap + 1] = other[swap + 1], other[swap]
    assert kendall_tau(order, other) == pytest.approx(1 - 2 / 21)
    assert kendall_tau(order, other) == kendall_tau(other, order)


@given(first=orders, second=orders)
def test_overlap_of_one_is_the_first_choice(first: list[int], second: list[int]) -> None:
    assert overlap_at(first, second, 1) == top1(first, second)
    assert overlap_at(first, second, 3) == overlap_at(second, first, 3)
    assert overlap_at(first, first, 3) == overlap_at(first, second, 7) == 1.0
    assert overlap_at(first, second, 99) == 1.0  # k beyond the list


def test_overlap_by_hand() -> None:
    assert overlap_at((0, 1, 2, 3), (2, 0, 3, 1), 2) == 0.5
    assert overlap_at((0, 1, 2, 3), (2, 3, 0, 1), 2) == 0.0
    assert overlap_at((0, 1, 2, 3), (3, 2, 1, 0), 3) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("order", "gold", "k", "recall"),
    [
        ((2, 0, 1), {2}, 1, 1.0),
        ((2, 0, 1), {0}, 1, 0.0),
        ((2, 0, 1), {0, 2}, 1, 0.5),  # two gold pages: one place cannot hold both
        ((2, 0, 1), {0, 1}, 2, 0.5),
        ((1, 0), {0, 1}, 5, 1.0),  # k beyond the list
    ],
)
def test_recall(order: tuple[int, ...], gold: set[int], k: int, recall: float) -> None:
    assert recall_at(order, gold, k) == recall


def test_bootstrap_brackets_the_mean_and_repeats() -> None:
    values = [0.0] * 30 + [1.0] * 70
    low, high = bootstrap_interval(values)
    assert 0.58 < low < 0.64 and 0.76 < high < 0.82  # normal theory: 0.61 to 0.79
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval([1.0] * 10) == (1.0, 1.0)


def test_paired_differences_are_of_the_same_case() -> None:
    before = [0.0, 1.0] * 50
    assert paired_interval(before, before) == (0.0, 0.0)
    low, high = paired_interval(before, [value + 0.25 for value in before])
    assert low == high == 0.25  # the spread between the cases does not count
    low, high = paired_interval(before, [1.0, 1.0] * 50)
    assert low < 0.5 < high
    assert paired_interval([1.0, 1.0] * 50, before) == pytest.approx((-high, -low), abs=0.02)
    with pytest.raises(ValueError, match="shorter"):
        paired_interval([0.0, 1.0], [1.0])


def test_wilson_known_values() -> None:
    low, high = wilson_interval(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    low, high = wilson_interval(300, 300)
    assert low == pytest.approx(0.98736, abs=1e-4) and high == 1.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: recall_at((0, 1), set(), 1), "gold"),
        (lambda: bootstrap_interval([]), "at least one"),
        (lambda: paired_interval([], []), "at least one"),
        (lambda: wilson_interval(0, 0), "at least one"),
        (lambda: top1((), ()), "no pages"),
        (lambda: overlap_at((), (), 1), "one at the least"),
        (lambda: overlap_at((0,), (0,), 0), "one at the least"),
    ],
)
def test_empty_input_is_an_error(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
