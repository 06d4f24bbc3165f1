"""Pairs to lists and back, whatever the batches and the order of the pairs; mteb is not needed."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmr5_bench import mteb_command
from mmr5_bench.mteb_grouping import KeptLists, RankedList, rank_scores, score_pairs, shuffled


def by_value(question: str, pages: Sequence[int]) -> list[int]:
    """A model that likes large numbers; of equal ones the first."""
    return sorted(range(len(pages)), key=lambda i: (-pages[i], i))


def test_pairs_of_a_question_are_one_list() -> None:
    asked: list[tuple[str, list[int]]] = []

    def rank(question: str, pages: list[int]) -> list[int]:
        asked.append((question, pages))
        return by_value(question, pages)

    scores = score_pairs(["a", "a", "a", "b", "b"], [5, 9, 7, 1, 2], rank)
    assert asked == [("a", [5, 9, 7]), ("b", [1, 2])]
    assert scores == pytest.approx([1 / 3, 1, 2 / 3, 0.5, 1])


def test_a_list_is_ranked_when_its_last_page_is_there() -> None:
    events: list[str] = []

    def pages() -> object:
        for number in range(6):
            events.append(f"page {number}")
            yield number

    def rank(question: str, listed: list[int]) -> range:
        events.append(f"rank {question} {listed}")
        return range(len(listed))

    score_pairs(["a", "a", "b", "c", "b", "c"], pages(), rank)  # type: ignore[arg-type]
    assert events == [
        "page 0",
        "page 1",
        "rank a [0, 1]",
        "page 2",
        "page 3",
        "page 4",
        "rank b [2, 4]",
        "page 5",
        "rank c [3, 5]",
    ]


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 9)), max_size=40))
def test_sorting_by_score_gives_every_order_back(pairs: list[tuple[str, int]]) -> None:
    questions, pages = [q for q, _ in pairs], [p for _, p in pairs]
    scores = score_pairs(questions, iter(pages), by_value)
    assert len(scores) == len(pairs)
    for question in set(questions):
        places = [i for i, q in enumerate(questions) if q == question]
        listed = [pages[i] for i in places]
        own = [scores[i] for i in places]
        assert len(set(own)) == len(own) and max(own) == 1 and min(own) > 0
        found = sorted(range(len(own)), key=lambda i: -own[i])
        assert found == by_value(question, listed)


@given(st.permutations(range(7)))
def test_scores_fall_strictly_along_the_order(order: list[int]) -> None:
    scores = rank_scores(order, 7)
    along = [scores[candidate] for candidate in order]
    assert along == pytest.approx([7 / 7, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7])


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1], [0, 1, 3], [1, 2, 3], []])
def test_what_is_no_permutation_is_refused(order: list[int]) -> None:
    with pytest.raises(ValueError, match="no order of 3 candidates"):
        score_pairs(["a"] * 3, [1, 2, 3], lambda question, pages: order)


@pytest.mark.parametrize("pages", [[], [1], [1, 2, 3]])
def test_questions_and_pages_have_to_be_pairs(pages: list[int]) -> None:
    with pytest.raises(ValueError, match="pair them"):
        score_pairs(["a", "b"], pages, by_value)


def test_no_pairs_have_no_scores() -> None:
    assert score_pairs([], [], by_value) == []


@given(st.integers(0, 50), st.integers(0, 9), st.text(max_size=9))
def test_shuffling_is_a_permutation_and_repeatable(count: int, seed: int, key: str) -> None:
    order = shuffled(count, seed, key)
    assert sorted(order) == list(range(count))
    assert order == shuffled(count, seed, key)


def test_shuffling_depends_on_seed_and_list() -> None:
    assert len({tuple(shuffled(20, seed, key)) for seed in (0, 1) for key in "ab"}) == 4


def test_finished_lists_are_kept_by_run(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lists.jsonl"
    first, other = KeptLists(path, "one"), KeptLists(path, "two")
    assert first.read() == {}
    ranked = RankedList((2, 0, 1), "ok", "determined", 12.5)
    first.add("a", ranked)
    other.add("a", RankedList((0,), "fallback", "length", 1.0))
    with path.open("ab") as file:
        file.write(b'{"run": "one", "key": "b", "ord')  # killed while writing
    first.add("c", ranked)
    assert first.read() == {"a": ranked, "c": ranked}
    assert set(other.read()) == {"a"}


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    mteb_command.add_arguments(parser)
    return parser.parse_args(["--engine", "e", "-o", "out.json", *arguments])


@pytest.mark.skipif(importlib.util.find_spec("mteb") is not None, reason="mteb is installed")
def test_without_mteb_the_error_says_how_to_install_it() -> None:
    with pytest.raises(ValueError, match=r"pip install 'mmr5-runtime\[mteb\]'"):
        mteb_command.run(parse("--task", "MMDocIRT2ITRetrieval"))
