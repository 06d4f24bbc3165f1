"""Percentiles, ratios and quality against values worked out by hand, and their properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmr5_bench.evidence.quality import Judged, ndcg_at, quality_of, reciprocal_rank
from mmr5_bench.evidence.statistics import STATISTICS, latency_summary, ratio_interval

TIMES = st.lists(st.floats(0.1, 1e4), min_size=1, max_size=30)


def test_percentiles_interpolate_between_samples() -> None:
    summary = latency_summary([10.0, 20.0, 30.0, 40.0, 50.0])
    assert summary["p50"]["value"] == 30.0
    assert summary["p90"]["value"] == pytest.approx(46.0)
    assert summary["p95"]["value"] == pytest.approx(48.0)
    assert summary["mean"]["value"] == 30.0


@given(TIMES)
@settings(max_examples=50)
def test_intervals_hold_the_value_and_stay_among_the_samples(samples: list[float]) -> None:
    for interval in latency_summary(samples, resamples=200).values():
        assert min(samples) * (1 - 1e-12) <= interval["low"]
        assert interval["high"] <= max(samples) * (1 + 1e-12)
        assert interval["low"] <= interval["high"]
    ordered = [latency_summary(samples, resamples=200)[p]["value"] for p in ("p50", "p90", "p99")]
    assert ordered == sorted(ordered)


def test_the_interval_of_a_median_covers_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        drawn = latency_summary(rng.lognormal(0.0, 0.5, 40).tolist(), resamples=400, seed=seed)[
            "p50"
        ]
        covered += drawn["low"] <= 1.0 <= drawn["high"]
    assert 180 <= covered <= 200  # 95 % of 200, four standard errors to each side


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [1.0, -0.1], [math.inf]])
def test_what_is_no_time_is_refused(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="sample"):
        latency_summary(samples)


@given(TIMES, st.sampled_from(STATISTICS), st.floats(0.1, 10.0))
@settings(max_examples=50)
def test_a_paired_ratio_of_a_scaled_run_is_certain(
    samples: list[float], statistic: str, factor: float
) -> None:
    scaled = [factor * sample for sample in samples]
    ratio = ratio_interval(samples, scaled, statistic, paired=True, resamples=100)  # type: ignore[arg-type]
    assert ratio == pytest.approx({"value": factor, "low": factor, "high": factor})


def test_an_unpaired_ratio_knows_what_lists_differ_by() -> None:
    lists = [100.0, 1000.0, 300.0, 2000.0, 500.0]
    paired = ratio_interval(lists, [1.1 * v for v in lists], "p50", paired=True)
    unpaired = ratio_interval(lists, [1.1 * v for v in lists], "p50", paired=False)
    assert paired["high"] - paired["low"] < 1e-9 < unpaired["high"] - unpaired["low"]


def test_pairs_have_to_be_of_the_same_lists() -> None:
    with pytest.raises(ValueError, match="2 rounds cannot be paired with 1"):
        ratio_interval([1.0, 2.0], [1.0], "p50", paired=True)
    with pytest.raises(ValueError, match="above zero"):
        ratio_interval([0.0], [1.0], "p50", paired=True)


def test_ndcg_and_reciprocal_rank_by_hand() -> None:
    assert ndcg_at([3, 1, 2], {3}, 5) == 1.0
    assert ndcg_at([1, 3, 2], {3}, 5) == pytest.approx(1 / math.log2(3))
    both = (1 + 1 / math.log2(4)) / (1 + 1 / math.log2(3))
    assert ndcg_at([3, 0, 2], {2, 3}, 5) == pytest.approx(both)
    assert ndcg_at([0, 1, 2, 3, 4, 5], {5}, 5) == 0.0
    assert ndcg_at([5, 4], {4, 5, 6}, 1) == 1.0  # no more than one has room
    assert reciprocal_rank([4, 2, 7], {7, 2}) == 0.5
    assert reciprocal_rank([4], {7}) == 0.0
    with pytest.raises(ValueError, match="gold"):
        ndcg_at([1], set(), 1)


def test_quality_averages_over_lists_and_over_domains() -> None:
    judged = [
        Judged((0, 1, 2), (0,), "ok", "chart", (0, 1, 2)),
        Judged((2, 1, 0), (0,), "repaired", "chart", (2, 0, 1)),
        Judged((1, 0, 2), (0,), "fallback", "table", (0, 1, 2)),
    ]
    found = quality_of(judged, ("chart", "table", "text"))
    assert found["cases"] == 3
    assert found["recall@1"]["value"] == pytest.approx(1 / 3)
    assert found["macro_recall@1"]["value"] == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert quality_of(judged)["macro_recall@1"]["value"] == pytest.approx((1 / 2 + 0) / 2)
    assert found["mrr"]["value"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    assert found["kendall_tau"]["value"] == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)
    assert found["top1_agreement"]["value"] == pytest.approx(2 / 3)
    assert found["order_agreement"]["value"] == pytest.approx(1 / 3)
    assert found["fallback"]["value"] == pytest.approx(1 / 3)
    alone = quality_of([Judged((0, 1), (1,), "ok", "x")])
    assert "kendall_tau" not in alone
    with pytest.raises(ValueError, match="none of chart"):
        quality_of(judged, ("chart",))
    with pytest.raises(ValueError, match="no list"):
        quality_of([])
