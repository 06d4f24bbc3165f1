"""Keys of prompt segments: equal exactly when everything they stand for is equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmr5_runtime.reuse.chain import RecentKeys, page_key, root_key, text_key

ROOT = root_key(b"engine", "ab" * 32)
PAGE = bytes(range(32))
IDS = (7, 1, 1, 1, 1, 1, 1, 8)
GRID = (1, 4, 6)

# Small domains, so that near and exact repetitions are frequent.
short_bytes = st.binary(max_size=2)
short_ids = st.lists(st.integers(0, 300), max_size=3).map(tuple)
grids = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3))
short_text = st.text(st.sampled_from("ab"), max_size=2)
calls = st.one_of(
    st.tuples(st.just(root_key), st.tuples(short_bytes, short_text)),
    st.tuples(st.just(text_key), st.tuples(short_bytes, short_text, short_ids)),
    st.tuples(st.just(page_key), st.tuples(short_bytes, short_ids, short_bytes, grids)),
)
Call = tuple[Callable[..., bytes], tuple[Any, ...]]


@given(calls, calls)
def test_keys_are_equal_exactly_when_what_they_name_is(one: Call, other: Call) -> None:
    key, other_key = one[0](*one[1]), other[0](*other[1])
    assert len(key) == len(other_key) == 32
    assert (key == other_key) == (one == other)


@pytest.mark.parametrize(
    "other",
    [
        page_key(ROOT, IDS, PAGE, (1, 6, 4)),  # the same number of tokens, lying
        page_key(ROOT, IDS, PAGE, (1, 2, 12)),
        page_key(ROOT, IDS, PAGE[:-1] + b"\x00", GRID),  # another page of the same size
        page_key(ROOT, IDS[:-1], PAGE, GRID),
        page_key(ROOT, (9, *IDS[1:]), PAGE, GRID),  # another label
        page_key(root_key(b"engine", "cd" * 32), IDS, PAGE, GRID),
        page_key(root_key(b"engin", "e" + "ab" * 32), IDS, PAGE, GRID),
        page_key(page_key(ROOT, IDS, PAGE, GRID), IDS, PAGE, GRID),  # the same page once more
        text_key(ROOT, "page", IDS),
    ],
)
def test_one_difference_makes_another_key(other: bytes) -> None:
    assert page_key(ROOT, IDS, PAGE, GRID) != other


def test_token_ids_do_not_run_together() -> None:
    keys = {
        text_key(ROOT, "head", ids)
        for ids in ([1, 23], [12, 3], [123], [1, 2, 3], [], [0], [0, 0], [256, 1], [1, 256])
    }
    assert len(keys) == 9


def test_every_later_key_depends_on_every_earlier_segment() -> None:
    def chain(question: list[int], pages: list[bytes]) -> list[bytes]:
        keys = [text_key(ROOT, "head", question)]
        for page in pages:
            keys.append(page_key(keys[-1], IDS, page, GRID))
        return keys

    base = chain([1, 2], [b"a" * 32, b"b" * 32, b"c" * 32])
    swapped = chain([1, 2], [b"a" * 32, b"c" * 32, b"b" * 32])
    assert [x == y for x, y in zip(base, swapped, strict=True)] == [True, True, False, False]
    other_question = chain([1, 3], [b"a" * 32, b"b" * 32, b"c" * 32])
    assert not set(base) & set(other_question)


@given(st.lists(st.binary(min_size=1, max_size=1), max_size=30), st.integers(1, 5))
def test_recent_keys_are_the_last_ones_added(added: list[bytes], limit: int) -> None:
    recent = RecentKeys(limit)
    expected: list[bytes] = []
    for key in added:
        recent.add(key)
        expected = [*(other for other in expected if other != key), key][-limit:]
        assert len(recent) == len(expected)
        assert all((key in recent) == (key in expected) for key in added)
