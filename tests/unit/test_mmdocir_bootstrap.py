"""Intervals clustered by document: against worked-out cases, and what they must not depend on."""

from __future__ import annotations

import numpy as np
import pytest

from mmr5_bench.mmdocir.annotations import DOMAINS
from mmr5_bench.mmdocir.bootstrap import Clusters
from mmr5_bench.mmdocir.metrics import macro, micro
from mmr5_runtime.agreement import bootstrap_interval


def test_two_documents_have_three_resamples() -> None:
    # Both of the first: 1; one each: 2 of 3 questions; both of the second: 0. Odds 1 : 2 : 1.
    documents, domains, values = [0, 0, 1], ["Laws"] * 3, [1.0, 1.0, 0.0]
    wide = Clusters(documents, domains).micro(values)
    assert wide == {"value": 2 / 3, "low": 0.0, "high": 1.0}
    middle = Clusters(documents, domains, level=0.4).micro(values)
    assert (middle["low"], middle["high"]) == pytest.approx((2 / 3, 2 / 3))


def test_a_document_of_each_question_is_the_plain_bootstrap() -> None:
    values = [float(n % 3 == 0) for n in range(200)]
    found = Clusters(range(200), ["Laws"] * 200).micro(values)
    low, high = bootstrap_interval(values)
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.01)


def test_questions_of_one_document_count_as_one() -> None:
    per_document = [float(n % 2) for n in range(40)]
    values = [value for value in per_document for _ in range(10)]
    documents = [index // 10 for index in range(400)]
    found = Clusters(documents, ["Laws"] * 400).micro(values)
    low, high = bootstrap_interval(per_document)
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.03)
    assert found["high"] - found["low"] > 2 * np.diff(bootstrap_interval(values))[0]


def test_a_constant_difference_has_no_spread() -> None:
    documents, domains = list(range(30)), [DOMAINS[n % 10] for n in range(30)]
    clusters = Clusters(documents, domains)
    for found in (clusters.micro([0.25] * 30), clusters.macro([0.25] * 30)):
        assert (found["value"], found["low"], found["high"]) == pytest.approx((0.25, 0.25, 0.25))
    assert clusters.micro([0.0] * 30) == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_macro_counts_missing_domains_as_zero_and_news_does_not_vary() -> None:
    documents, domains = [0, 0, 1, 2, 3], ["News", "News", "Laws", "Laws", "Laws"]
    values = [1.0, 0.0, 1.0, 1.0, 1.0]
    clusters = Clusters(documents, domains)
    over_ten = clusters.macro(values)
    assert over_ten["value"] == macro(values, domains) == pytest.approx(0.15)
    assert (over_ten["low"], over_ten["high"]) == pytest.approx((0.15, 0.15))
    without = clusters.macro(values, without=["News"])
    assert (without["value"], without["low"]) == pytest.approx((1 / 9, 1 / 9))


def test_values_of_intervals_are_the_metrics_own() -> None:
    rng = np.random.default_rng(3)
    documents = rng.integers(0, 25, 300).tolist()
    domains = [DOMAINS[document % 10] for document in documents]
    values = rng.random(300).tolist()
    clusters = Clusters(documents, domains)
    assert clusters.micro(values)["value"] == micro(values)
    assert clusters.macro(values)["value"] == macro(values, domains)
    for found in (clusters.micro(values), clusters.macro(values)):
        assert found["low"] < found["value"] < found["high"]
    again = Clusters(documents, domains)
    assert again.micro(values) == clusters.micro(values)
    other = Clusters(documents, domains, seed=1)
    assert other.micro(values)["low"] != clusters.micro(values)["low"]


def test_resamples_agree_with_drawing_documents_one_by_one() -> None:
    rng = np.random.default_rng(5)
    documents = rng.integers(0, 12, 60).tolist()
    domains = [DOMAINS[document % 3] for document in documents]
    values = rng.random(60).tolist()
    held: dict[int, list[float]] = {}
    for document, value in zip(documents, values, strict=True):
        held.setdefault(document, []).append(value)
    flat, strata = [], []
    for _ in range(4000):
        drawn = [list(held)[i] for i in rng.integers(0, len(held), len(held))]
        flat.append(float(np.mean([value for d in drawn for value in held[d]])))
        total = 0.0
        for part in range(3):
            inside = [d for d in held if d % 3 == part]
            again = [inside[i] for i in rng.integers(0, len(inside), len(inside))]
            total += float(np.mean([value for d in again for value in held[d]])) / 10
        strata.append(total)
    clusters = Clusters(documents, domains)
    for found, slow in ((clusters.micro(values), flat), (clusters.macro(values), strata)):
        expected = np.quantile(slow, [0.025, 0.975])
        assert [found["low"], found["high"]] == pytest.approx(expected, abs=0.12 * np.ptp(expected))


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match="every question"):
        Clusters([], [])
    with pytest.raises(ValueError, match="every question"):
        Clusters([0, 1], ["Laws"])
    with pytest.raises(ValueError, match="one domain"):
        Clusters([0, 0], ["Laws", "News"])
    with pytest.raises(ValueError, match="Sports"):
        Clusters([0], ["Sports"])
    with pytest.raises(ValueError, match="finite"):
        Clusters([0], ["Laws"]).micro([float("nan")])
    with pytest.raises(ValueError, match="finite"):
        Clusters([0], ["Laws"]).macro([1.0, 1.0])
