"""Metrics against values worked out by hand."""

from __future__ import annotations

import pytest

from mmr5_bench.metrics import (
    bootstrap_interval,
    bootstrap_ratio_interval,
    hit_at,
    recall_at,
    wilson_interval,
)


@pytest.mark.parametrize(
    "order, gold, k, recall, hit",
    [
        ((2, 0, 1), {2}, 1, 1.0, 1.0),
        ((2, 0, 1), {0}, 1, 0.0, 0.0),
        ((2, 0, 1), {0, 2}, 1, 0.5, 1.0),  # two gold pages: one place cannot hold both
        ((2, 0, 1), {0, 1}, 2, 0.5, 1.0),
        ((1, 0), {0, 1}, 5, 1.0, 1.0),  # k beyond the list
    ],
)
def test_recall_and_hit(
    order: tuple[int, ...], gold: set[int], k: int, recall: float, hit: float
) -> None:
    assert recall_at(order, gold, k) == recall
    assert hit_at(order, gold, k) == hit


def test_recall_without_gold_is_an_error() -> None:
    with pytest.raises(ValueError, match="gold"):
        recall_at((0, 1), set(), 1)


def test_bootstrap_brackets_the_mean_and_repeats() -> None:
    values = [0.0] * 30 + [1.0] * 70
    low, high = bootstrap_interval(values)
    assert 0.58 < low < 0.64 and 0.76 < high < 0.82  # normal theory: 0.61 to 0.79
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval([1.0] * 10) == (1.0, 1.0)


def test_bootstrap_of_a_ratio_weighs_cases_by_their_size() -> None:
    values = [0.0] * 30 + [1.0] * 70
    assert bootstrap_ratio_interval(values, [1.0] * 100) == bootstrap_interval(values)
    low, high = bootstrap_ratio_interval([3.0, 6.0, 30.0], [1.0, 2.0, 10.0])
    assert low == high == 3.0  # the same ratio in every case, whichever are drawn
    low, high = bootstrap_ratio_interval([0.0, 100.0] * 50, [1.0, 99.0] * 50)
    assert low < 1.0 < high


@pytest.mark.parametrize(
    ("over", "under"), [([], []), ([1.0], [0.0]), ([1.0], [1.0, 1.0]), ([1.0], [float("nan")])]
)
def test_a_ratio_without_a_denominator_is_an_error(over: list[float], under: list[float]) -> None:
    with pytest.raises(ValueError, match="positive denominator"):
        bootstrap_ratio_interval(over, under)


def test_wilson_known_values() -> None:
    low, high = wilson_interval(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    low, high = wilson_interval(300, 300)
    assert low == pytest.approx(0.98736, abs=1e-4) and high == 1.0


@pytest.mark.parametrize("call", [lambda: bootstrap_interval([]), lambda: wilson_interval(0, 0)])
def test_empty_input_is_an_error(call: object) -> None:
    with pytest.raises(ValueError, match="at least one"):
        call()  # type: ignore[operator]
