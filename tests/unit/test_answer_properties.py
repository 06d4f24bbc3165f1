"""What must hold of every text: a permutation, agreement with the reference, streamed = whole."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from helpers.reference_parser import listed_ids, reference_order, skips_a_list
from mmr5_runtime.answer import ReasoningStream, extract_reasoning, order_of, parse_answer

FRAGMENTS = [
    "<think>", "</think>", "<answer>", "</answer>", "<answer>[", "]</answer>", "[", "]", ",",
    ", ", " ", "\n", "1", "2", "3", "10", "+2", "-1", "1_0", "0", "\u0663", "x", "Image 2", "<",
    "</", "</th", "<ans", "99",
]  # fmt: skip
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=30).map("".join)
listings = st.lists(st.sampled_from(FRAGMENTS[8:]), max_size=12).map(
    lambda pieces: f"<think>a</think><answer>[{''.join(pieces)}]</answer>"
)
page_counts = st.integers(1, 12)


@given(texts | listings, page_counts)
def test_always_a_permutation(text: str, num_pages: int) -> None:
    parsed = parse_answer(text, num_pages)
    assert sorted(parsed.order) == list(range(num_pages))
    if parsed.status == "fallback":
        assert parsed.order == tuple(range(num_pages))


@given(texts | listings, page_counts)
def test_agrees_with_the_reference_but_for_repeated_ids(text: str, num_pages: int) -> None:
    expected = reference_order(text, num_pages)
    parsed = parse_answer(text, num_pages)
    if expected is None:
        assert parsed.status != "ok"
    elif not (skips_a_list(text) and listed_ids(text + ",", num_pages)):
        assert parsed.order == tuple(dict.fromkeys(expected))


@given(texts | listings, page_counts)
def test_the_first_list_behind_the_reasoning_counts(text: str, num_pages: int) -> None:
    """Whatever the reference makes of it: otherwise no answer could be known before its end."""
    ids = listed_ids(text, num_pages)
    assert parse_answer(text, num_pages).order[: len(ids)] == tuple(i - 1 for i in ids)


@given(st.lists(st.integers(-2, 14), max_size=20), page_counts)
def test_order_of_keeps_the_first_mention_and_fills_up(ids: list[int], num_pages: int) -> None:
    order = order_of(ids, num_pages)
    assert sorted(order) == list(range(num_pages))
    named = [number - 1 for number in ids if 1 <= number <= num_pages]
    assert [page for page in order if page in named] == list(dict.fromkeys(named))
    rest = order[len(set(named)) :]
    assert list(rest) == sorted(rest) and not set(rest) & set(named)


@given(st.permutations(range(1, 8)), texts)
def test_a_full_list_is_ok(numbers: list[int], after: str) -> None:
    parsed = parse_answer(f"<think>Why.</think><answer>{numbers}</answer>{after}", 7)
    assert parsed.status == "ok"
    assert parsed.order == tuple(number - 1 for number in numbers)
    assert parsed.reasoning == "Why."


@given(st.permutations(range(1, 8)), st.data())
def test_dropped_or_repeated_ids_are_repaired(numbers: list[int], data: st.DataObject) -> None:
    kept = numbers[: data.draw(st.integers(1, 6))]
    listing = kept + data.draw(st.lists(st.sampled_from(kept), max_size=3))
    parsed = parse_answer(f"<answer>{listing}</answer>", 7)
    assert parsed.status == "repaired"
    assert parsed.order[: len(kept)] == tuple(number - 1 for number in kept)
    assert list(parsed.order[len(kept) :]) == sorted(parsed.order[len(kept) :])


@given(st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=30))
def test_streamed_reasoning_equals_the_whole(pieces: list[str]) -> None:
    stream = ReasoningStream()
    sent = [stream.feed(piece) for piece in pieces]
    assert "".join([*sent, stream.finish()]) == extract_reasoning("".join(pieces))


def test_well_formed_reasoning_is_streamed_as_it_comes() -> None:
    stream = ReasoningStream()
    pieces = ["<thi", "nk>", "Page", " 2 <", "b", " fits", "</", "think", "><", "answer", ">[", "2"]
    sent = [stream.feed(piece) for piece in pieces]
    assert sent == ["", "", "Page", " 2 ", "<b", " fits", "", "", "", "", "", ""]
    assert stream.finish() == ""
