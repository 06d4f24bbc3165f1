"""Page metrics of MMDocIR: the worked examples, the published ceilings, a second implementation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.mmdocir_bruteforce import TEN, averages, pick, recall
from helpers.reference_parser import reference_order
from mmr5_bench.mmdocir.annotations import DOMAINS
from mmr5_bench.mmdocir.candidates import order_of_scores
from mmr5_bench.mmdocir.metrics import (
    METRICS,
    Ranked,
    by_domain,
    ceiling_at,
    macro,
    micro,
    needs_more,
    recall_at,
)
from mmr5_runtime.answer import parse_answer


def _recalls(order: Sequence[int], gold: Sequence[int]) -> list[float]:
    return [recall_at(order, gold, k) for k in (1, 3, 5)]


def test_a_several_gold_pages() -> None:
    assert _recalls([7, 2, 9, 0, 5], [2, 5, 11]) == [0.0, 1 / 3, 2 / 3]


def test_b_micro_and_macro() -> None:
    asked = [("News", [4, 1, 2], [4]), ("Laws", [3, 5, 0], [0, 3]), ("Laws", [2, 4, 1], [1])]
    domains = [domain for domain, _, _ in asked]
    found = {k: [recall_at(order, gold, k) for _, order, gold in asked] for k in (1, 3)}
    assert [micro(found[1]), micro(found[3])] == [0.5, 1.0]
    assert [macro(found[1], domains), macro(found[3], domains)] == [0.125, 0.2]
    assert by_domain(found[1], domains)["Laws"] == 0.25
    assert macro(found[1], domains, without=["News"]) == pytest.approx(0.25 / 9)


def test_c_a_short_document() -> None:
    order = order_of_scores([0.1, 0.9, 0.5])
    assert order == [1, 2, 0]
    assert _recalls(order, [0]) == [0.0, 1.0, 1.0]


def test_d_ties_keep_the_lower_page_first() -> None:
    order = order_of_scores([1, 1, 2, 1])
    assert order[:3] == [2, 0, 1]
    assert _recalls(order, [1])[:2] == [0.0, 1.0]
    assert _recalls(order, [3])[1:] == [0.0, 1.0]


def test_e_a_repeated_page_wastes_a_slot() -> None:
    reply = "<answer>[3, 3, 1]</answer>"
    order = reference_order(reply, 3)
    assert order == [2, 2, 0, 1]
    assert recall_at(order, [0, 2], 2) == 0.5
    ours = parse_answer(reply, 3)
    assert (ours.order, ours.status) == ((2, 0, 1), "repaired")
    assert recall_at(ours.order, [0, 2], 2) == 1.0


def test_a_gold_page_listed_twice_counts_twice_below() -> None:
    assert recall_at([4, 1], [4, 4], 1) == 0.5
    assert recall_at([4, 1], [], 1) == 0.0


def test_ceilings_are_the_published_ones() -> None:
    gold_pages = {1: 1346, 2: 230, 3: 43, 4: 25, 5: 12, 6: 2}  # questions by their gold pages
    for k, published in ((1, 0.8952), (3, 0.9927), (5, 0.9998)):
        values = [ceiling_at(range(n), k) for n, count in gold_pages.items() for _ in range(count)]
        assert len(values) == 1658
        assert round(micro(values), 4) == published


def test_ceilings_of_candidates_lose_what_the_first_stage_lost() -> None:
    assert ceiling_at([0, 7], 1) == 0.5
    assert ceiling_at([0, 7], 3, [7, 1, 2]) == 0.5
    assert ceiling_at([0, 7], 3, [1, 2]) == 0.0
    assert ceiling_at([], 3) == 0.0
    assert ceiling_at([2, 2], 3) == 0.5


def test_one_question_weighs_what_its_domain_makes_it_weigh() -> None:
    counts = dict(zip(DOMAINS, (194, 56, 104, 389, 76, 344, 115, 111, 132, 137), strict=True))
    domains = [domain for domain, count in counts.items() for _ in range(count)]
    published = {
        "News": 0.00073,
        "Administration/Industry file": 0.00179,
        "Academic paper": 0.00026,
    }
    for domain, weight in published.items():
        values = [0.0] * len(domains)
        values[domains.index(domain)] = 1.0
        assert round(macro(values, domains), 5) == weight


def _metric(name: str, order: Sequence[int], gold: Sequence[int]) -> float:
    return METRICS[name](Ranked(0, "News", tuple(order), tuple(gold)))


def test_ndcg_and_reciprocal_rank() -> None:
    ideal = 1.6309297535714575  # 1 + 1 / log2(3)
    assert _metric("ndcg@5", [3, 1, 0], [1]) == pytest.approx(ideal - 1)
    assert _metric("ndcg@5", [1, 0, 3], [1, 3]) == pytest.approx(1.5 / ideal)
    assert _metric("ndcg@5", [1, 3, 5, 6, 7], [1, 3, 5, 6, 7, 8]) == 1.0
    assert _metric("ndcg@5", [1], [1, 3]) == pytest.approx(1 / ideal)  # 3 was lost before
    assert _metric("ndcg@5", [1], [1, 1]) == 1.0  # a page cannot be found twice
    assert _metric("mrr", [3, 1, 0], [0, 1]) == 0.5
    assert _metric("mrr", [3], [0]) == 0.0
    for name in METRICS:
        assert _metric(name, [1], []) == 0.0


def test_metrics_look_at_so_many_places() -> None:
    def known(places: int | None) -> list[str]:
        return [name for name in METRICS if not needs_more(name, places)]

    assert known(None) == list(METRICS)
    assert known(9) == ["recall@1", "recall@3", "recall@5", "ndcg@5"]
    assert known(4) == ["recall@1", "recall@3"]
    assert known(1) == ["recall@1"]


def test_domains_are_those_of_the_official_table() -> None:
    assert list(DOMAINS) == TEN


def test_what_has_no_value_is_an_error() -> None:
    with pytest.raises(ValueError, match="k=0"):
        recall_at([1], [1], 0)
    with pytest.raises(ValueError, match="at least one question"):
        micro([])
    with pytest.raises(ValueError, match="no domain of MMDocIR"):
        macro([1.0], ["Sports"])
    with pytest.raises(ValueError, match="longer than"):
        macro([1.0], ["News", "Laws"])


def _random_question(rng: random.Random) -> tuple[str, list[float], list[int], int]:
    """Domain, scores with many ties, gold with repetitions or none, and candidates kept."""
    pages = rng.randint(1, 30)
    scores = [float(rng.randint(0, 4)) for _ in range(pages)]
    gold = [rng.randrange(pages) for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 6)))]
    domains = TEN if rng.random() < 0.5 else TEN[:3]
    return rng.choice(domains), scores, gold, rng.choice((1, 3, 10, 40))


def test_equal_to_a_second_implementation_on_a_thousand_data_sets() -> None:
    for seed in range(1000):
        rng = random.Random(seed)
        asked = [_random_question(rng) for _ in range(rng.randint(1, 12))]
        ours = [order_of_scores(scores)[:kept] for _, scores, _, kept in asked]
        theirs = [pick(scores, kept) for _, scores, _, kept in asked]
        assert ours == theirs
        domains = [domain for domain, _, _, _ in asked]
        for k in (1, 3, 5, 20):
            values = [recall_at(o, gold, k) for o, (_, _, gold, _) in zip(ours, asked, strict=True)]
            listed = [(d, o, g) for o, (d, _, g, _) in zip(theirs, asked, strict=True)]
            mean, over_ten, each = averages(listed, k)
            assert micro(values) == pytest.approx(float(mean), abs=1e-12)
            assert macro(values, domains) == pytest.approx(float(over_ten), abs=1e-12)
            found = by_domain(values, domains)
            assert [found[d] for d in TEN] == pytest.approx([float(f) for f in each], abs=1e-12)


ORDERS = st.permutations(range(8)).flatmap(
    lambda order: st.integers(1, 8).map(lambda kept: list(order[:kept]))
)
GOLD = st.lists(st.integers(0, 9), max_size=5)


@given(ORDERS, GOLD, st.integers(1, 12))
def test_recall_is_bounded_by_its_ceiling_and_exact(
    order: list[int], gold: list[int], k: int
) -> None:
    value = recall_at(order, gold, k)
    assert Fraction(value).limit_denominator(100) == recall(order, gold, k)
    assert value <= ceiling_at(gold, k, order) <= ceiling_at(gold, k)
    assert value <= recall_at(order, gold, k + 1)


@given(st.lists(st.sampled_from([0.0, -0.0, 0.5, -1.5, 1e300, 5e-324]), max_size=12))
def test_sorting_is_that_of_negated_scores_and_pages(scores: list[float]) -> None:
    assert order_of_scores(scores) == sorted(range(len(scores)), key=lambda p: (-scores[p], p))
