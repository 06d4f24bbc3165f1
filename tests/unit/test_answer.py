"""Answers as models write them, well formed and not."""

from __future__ import annotations

import pytest

from mmr5_runtime.answer import parse_answer
from mmr5_runtime.types import Status


@pytest.mark.parametrize(
    ("listing", "order", "status"),
    [
        ("[2, 3, 1]", (1, 2, 0), "ok"),
        ("[2,3,1,]", (1, 2, 0), "ok"),
        ("[ +2 , 0_3, \u0661 ]", (1, 2, 0), "ok"),
        ("[3]", (2, 0, 1), "repaired"),
        ("[2, 2, 1]", (1, 0, 2), "repaired"),
        ("[2, 3, 1, 1]", (1, 2, 0), "repaired"),
        ("[0, 2, 4, -1, 3, 1]", (1, 2, 0), "repaired"),
        ("[]", (0, 1, 2), "fallback"),
        ("[7, 8]", (0, 1, 2), "fallback"),
        # from here on the reference gives up
        ("[Image 2, Image 3, Image 1]", (1, 2, 0), "repaired"),
        ("[image_id_3, image_id_1, image_id_2]", (2, 0, 1), "repaired"),
        ("[2 > 3 > 1]", (1, 2, 0), "repaired"),
        ('["2", "3", "1"]', (1, 2, 0), "repaired"),
        ("[[2], [3], [1]]", (1, 0, 2), "repaired"),  # a list ends at its first bracket
        ("[2\uff0c3\uff0c1]", (1, 2, 0), "repaired"),
        ("[1.3, 2]", (1, 0, 2), "repaired"),
        ("[id_most_relevant, id_second_relevant, ...]", (0, 1, 2), "fallback"),
        ("[" + "9" * 5000 + ", 2]", (1, 0, 2), "repaired"),
    ],
)
def test_listing(listing: str, order: tuple[int, ...], status: Status) -> None:
    parsed = parse_answer(f"<think>x</think><answer>{listing}</answer>", 3)
    assert (parsed.order, parsed.status) == (order, status)


@pytest.mark.parametrize(
    ("text", "order", "status"),
    [
        ("", (0, 1, 2), "fallback"),
        ("The second page fits, see [2] and [3].", (0, 1, 2), "fallback"),
        ("<answer>[2, 3, 1]", (1, 2, 0), "repaired"),
        ("<answer>[2, 3", (1, 2, 0), "repaired"),
        ("<answer>[2, 3, 1</answer>", (1, 2, 0), "repaired"),
        ("<answer>[2, 3, 1]</ans", (1, 2, 0), "repaired"),
        ("<answer>\n[2,\n3,\n1]\n</answer>", (1, 2, 0), "repaired"),
        ("<answer> [2, 3, 1] </answer>", (1, 2, 0), "repaired"),
        ("<Answer>[2, 3, 1]</Answer>", (1, 2, 0), "repaired"),
        ("<answer>2, 3, 1</answer>", (1, 2, 0), "repaired"),
        ("<answer>[2, 3, 1] as image 3 is off</answer>", (1, 2, 0), "repaired"),
        ("In short: [2, 3, 1].", (1, 2, 0), "repaired"),
        # the first readable one counts, as in the reference, even inside the reasoning
        ("<answer>[3]</answer><answer>[2, 3, 1]</answer>", (2, 0, 1), "repaired"),
        ("<answer>[]</answer><answer>[2, 3, 1]</answer>", (0, 1, 2), "fallback"),
        # an unreadable first one (the instruction repeated) gives way to the last
        ("<answer>[image_id_1, ...]</answer>x<answer>[2, 3, 1]</answer>", (1, 2, 0), "repaired"),
        ("<answer>[id, ...]</answer>x<answer>[3, 2]\n</answer>", (2, 1, 0), "repaired"),
        ("say <answer>[ids then <answer>[2, 3, 1]</answer>", (1, 2, 0), "repaired"),
    ],
)
def test_text(text: str, order: tuple[int, ...], status: Status) -> None:
    parsed = parse_answer(text, 3)
    assert (parsed.order, parsed.status) == (order, status)


@pytest.mark.parametrize(
    ("answer", "order", "status"),
    [
        # the reference answers with the second list in all of these
        ("<answer>[3,\n1]</answer><answer>[1, 2, 3]</answer>", (2, 0, 1), "repaired"),
        ("<answer> [3]</answer><answer>[1, 2, 3]</answer>", (2, 0, 1), "repaired"),
        ("<answer>[3, 1]\n</answer><answer>[1, 2, 3]</answer>", (2, 0, 1), "repaired"),
        ("<answer>\n[2, 3, 1]\n</answer><answer>[2, 3, 1]</answer>", (1, 2, 0), "ok"),
        ("<answer>\n[x]\n</answer><answer>[3, 2, 1]</answer>", (2, 1, 0), "ok"),
        # not a list, so nothing was passed over
        ("<answer>see [3]<answer>[2, 3, 1]</answer>", (1, 2, 0), "ok"),
        ("<answer>3, 1</answer>", (2, 0, 1), "repaired"),
    ],
)
def test_first_list_behind_the_reasoning(
    answer: str, order: tuple[int, ...], status: Status
) -> None:
    parsed = parse_answer(f"a</think>{answer}", 3)
    assert (parsed.order, parsed.status) == (order, status)


def test_an_answer_quoted_in_the_reasoning_is_the_references() -> None:
    text = "so <answer>[3, 2, 1]</answer> it is</think><answer>[1, 2, 3]</answer>"
    assert parse_answer(text, 3).order == (2, 1, 0)
    assert parse_answer(text.replace("]</answer> it", "] it"), 3).order == (0, 1, 2)


def test_number_broken_off_by_the_token_limit_is_not_believed() -> None:
    for opening in ("<answer>[", "</think><answer>["):
        assert parse_answer(f"{opening}5, 1", 12).order[:2] == (4, 0)
        assert parse_answer(f"{opening}5, 1", 12).order == parse_answer(f"{opening}5", 12).order
        assert parse_answer(f"{opening}5, 2", 12).order[:2] == (4, 1)
        assert parse_answer(f"{opening}5, 2, 1", 12).order[:3] == (4, 1, 0)
        assert parse_answer(f"{opening}5, 2, 1", 12).order[3] == 2
        assert parse_answer(f"{opening}5, 10", 12).order[:2] == (4, 9)


@pytest.mark.parametrize(
    ("text", "reasoning"),
    [
        ("<think>Page 2 fits.\n</think><answer>[2]</answer>", "Page 2 fits.\n"),
        ("\n<think> a </think>\n<answer>[1]</answer>", " a "),
        ("Well: <think>a</think>b<answer>[1]</answer>", "a"),
        ("a</think><answer>[1]</answer>", "a"),
        ("<think>a<answer>[1]</answer>", "a"),
        ("a<answer>[1]</answer>", "a"),
        ("<think>say <answer>[1]</answer> and end</think>", "say <answer>[1]</answer> and end"),
        ("<think>a</think>b</think>", "a"),
        ("<think>unfinished </thi", "unfinished </thi"),
        ("neither", "neither"),
        ("", ""),
    ],
)
def test_reasoning(text: str, reasoning: str) -> None:
    assert parse_answer(text, 2).reasoning == reasoning


@pytest.mark.parametrize(("text", "status"), [("<answer>[1]</answer>", "ok"), ("?", "fallback")])
def test_one_page(text: str, status: Status) -> None:
    parsed = parse_answer(text, 1)
    assert (parsed.order, parsed.status) == ((0,), status)
