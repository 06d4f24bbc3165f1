"""MiniDocs: deterministic, split without overlap, graded as it says."""

from __future__ import annotations

import numpy as np
import pytest

from mmr5_bench.minidocs.lists import (
    HELD_OUT_SEEDS,
    TRAIN_SEEDS,
    RerankCase,
    held_out_cases,
    make_case,
)
from mmr5_bench.minidocs.pages import SIZES, render_page
from mmr5_bench.minidocs.vocabulary import KINDS, TOPICS, is_held_out, pairs
from mmr5_runtime.answer import parse_answer


def _training_cases(count: int) -> list[RerankCase]:
    rng = np.random.default_rng(0)
    return [make_case(rng, 1 + i % 10, held_out=False, seeds=TRAIN_SEEDS) for i in range(count)]


def test_split_is_disjoint_and_complete() -> None:
    train, held_out = set(pairs(held_out=False)), set(pairs(held_out=True))
    assert not train & held_out
    assert len(train | held_out) == len(TOPICS) * len(KINDS) == 384
    assert {kind for _, kind in held_out} == set(range(len(KINDS)))
    assert len(held_out) == 48
    assert not set(TRAIN_SEEDS) & {HELD_OUT_SEEDS.start, HELD_OUT_SEEDS.stop - 1}


def test_training_never_meets_a_held_out_pair() -> None:
    for case in _training_cases(300):
        assert not any(is_held_out(page.topic, page.kind) for page in case.pages)
        assert all(page.seed in TRAIN_SEEDS for page in case.pages)


def test_held_out_cases_ask_for_held_out_pairs() -> None:
    for case in held_out_cases(100, 5):
        assert any(is_held_out(case.pages[i].topic, case.pages[i].kind) for i in case.gold)
        assert all(page.seed in HELD_OUT_SEEDS for page in case.pages)


@pytest.mark.parametrize("num_pages", [1, 2, 5, 10])
def test_grades_follow_the_question(num_pages: int) -> None:
    for case in held_out_cases(60, num_pages):
        assert len(case.pages) == len(case.grades) == num_pages
        for page, grade in zip(case.pages, case.grades, strict=True):
            same_topic = page.topic == case.topic
            same_kind = case.kind is None or page.kind == case.kind
            assert grade == (2 if same_topic and same_kind else 1 if same_topic else 0)
        assert case.gold and TOPICS[case.topic] in case.question


def test_lists_have_hard_negatives_and_several_golds() -> None:
    cases = held_out_cases(300, 10)
    assert any(len(case.gold) == 2 for case in cases)
    assert any(1 in case.grades for case in cases)
    hard = [
        page.kind == case.kind
        for case in cases
        for page, grade in zip(case.pages, case.grades, strict=True)
        if grade == 0
    ]
    assert any(hard) and not all(hard)
    firsts = np.bincount([case.gold[0] for case in cases], minlength=10)
    assert firsts.max() < 0.25 * len(cases)  # the first stage gives nothing away


def test_answers_parse_to_their_own_order() -> None:
    for case in _training_cases(100):
        parsed = parse_answer(case.answer(), len(case.pages))
        assert (parsed.order, parsed.status) == (case.order, "ok")
        assert [case.grades[i] for i in case.order] == sorted(case.grades, reverse=True)


def test_same_arguments_same_pixels() -> None:
    first, again, other = (render_page(3, 4, seed) for seed in (7, 7, 8))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_pages_vary_within_their_limits() -> None:
    sizes = {render_page(topic, topic % len(KINDS), topic).size for topic in range(40)}
    assert sizes == set(SIZES)


def test_cases_repeat() -> None:
    assert held_out_cases(20, 5, seed=1) == held_out_cases(20, 5, seed=1)
    assert held_out_cases(20, 5, seed=1) != held_out_cases(20, 5, seed=2)
