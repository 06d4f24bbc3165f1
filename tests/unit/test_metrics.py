"""Metrics against values worked out by hand."""

from __future__ import annotations

import pytest

from mmr5_bench.metrics import bootstrap_interval, bootstrap_ratio_interval


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
