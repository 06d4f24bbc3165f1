"""Reasons of cache misses, in the situations users meet."""

from __future__ import annotations

import hashlib
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from mmr5_runtime.reuse.chain import page_key, root_key, text_key
from mmr5_runtime.reuse.ledger import REASONS, MissLedger, PromptKeys

ROOT = root_key(b"engine", "mm-r5")


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def prompt(query: str, names: str, size: int = 1, root: bytes = ROOT) -> PromptKeys:
    """A prompt over one page per letter, resized with parameters ``size``."""
    head = text_key(root, "head", [len(names), *query.encode()])
    pixels = [digest(name) for name in names]
    pages = [digest(f"{name} at {size}") for name in names]
    segments, parent = [], head
    for page in pages:
        parent = page_key(parent, [1] * size, page, (1, 2, 2 * size))
        segments.append(parent)
    return PromptKeys(root, digest(query), head, tuple(segments), tuple(pages), tuple(pixels))


def test_the_first_prompt_is_a_new_question() -> None:
    ledger = MissLedger()
    assert ledger.segment_misses(prompt("q", "abc"), 0) == ("query",) * 4
    assert ledger.segment_misses(prompt("other", "abc"), 0) == ("query",) * 4


def test_a_complete_hit_misses_nothing() -> None:
    ledger = MissLedger()
    ledger.segment_misses(prompt("q", "abc"), 0)
    assert ledger.segment_misses(prompt("q", "abc"), 4) == ()
    assert sum(ledger.totals().segments.values()) == 4


def test_the_same_question_over_fewer_pages() -> None:
    ledger = MissLedger()
    ledger.segment_misses(prompt("q", "abc"), 0)
    assert ledger.segment_misses(prompt("q", "ab"), 0) == ("count",) * 3


def test_the_same_question_on_another_engine_is_new_to_it() -> None:
    ledger = MissLedger()
    ledger.segment_misses(prompt("q", "abc"), 0)
    other = prompt("q", "abc", root=root_key(b"other engine", "mm-r5"))
    assert ledger.segment_misses(other, 0) == ("query",) * 4


def test_changed_order() -> None:
    ledger = MissLedger()
    ledger.segment_misses(prompt("q", "abcd"), 0)
    assert ledger.segment_misses(prompt("q", "acbd"), 2) == ("order",) * 3


def test_a_new_page_moves_those_behind_it() -> None:
    ledger = MissLedger()
    ledger.segment_misses(prompt("q", "abcd"), 0)
    assert ledger.segment_misses(prompt("q", "axcd"), 2) == ("page", "order", "order")


def test_a_page_known_from_another_question_is_new_to_this_one() -> None:
    ledger = MissLedger()
    ledger.segment_misses(prompt("other", "xyz"), 0)
    ledger.segment_misses(prompt("q", "abc"), 0)
    assert ledger.segment_misses(prompt("q", "abz"), 3) == ("page",)
    # Even in another size: what another question read could not have been reused.
    assert ledger.segment_misses(prompt("q", "aby", size=2), 1) == (
        "parameters",
        "parameters",
        "page",
    )


def test_changed_parameters_win_over_nothing_but_a_new_page() -> None:
    ledger = MissLedger()
    ledger.segment_misses(prompt("q", "abc"), 0)
    assert ledger.segment_misses(prompt("q", "abc", size=2), 1) == ("parameters",) * 3
    # Both sizes are known by now: what differs is the order.
    assert ledger.segment_misses(prompt("q", "cab"), 1) == ("order",) * 3


def test_evicted_from_the_end() -> None:
    ledger = MissLedger()
    ledger.segment_misses(prompt("q", "abc"), 0)
    assert ledger.segment_misses(prompt("q", "abc"), 2) == ("evicted", "evicted")
    assert ledger.segment_misses(prompt("q", "abc"), 0) == ("evicted",) * 4
    assert ledger.segment_misses(prompt("q", "abx"), 2) == ("evicted", "page")


def test_a_page_shown_twice_is_not_out_of_order() -> None:
    ledger = MissLedger()
    ledger.segment_misses(prompt("q", "ab"), 0)
    assert ledger.segment_misses(prompt("q", "xx"), 1) == ("page", "page")


def test_reasons_of_embeddings() -> None:
    ledger = MissLedger()
    assert ledger.encoder_miss(digest("a at 1"), digest("a")) == "page"
    assert ledger.encoder_miss(digest("a at 2"), digest("a")) == "parameters"
    assert ledger.encoder_miss(digest("a at 1"), digest("a")) == "evicted"
    assert ledger.encoder_miss(digest("b at 1"), digest("b")) == "page"
    totals = ledger.totals()
    assert {reason: n for reason, n in totals.pages.items() if n} == {
        "page": 2,
        "parameters": 1,
        "evicted": 1,
    }
    assert not any(totals.segments.values())


def test_what_was_cleared_on_purpose_is_not_called_evicted() -> None:
    ledger = MissLedger()
    ledger.segment_misses(prompt("q", "ab"), 0)
    ledger.encoder_miss(digest("a at 1"), digest("a"))
    ledger.forget()
    assert ledger.segment_misses(prompt("q", "ab"), 0) == ("query",) * 3
    assert ledger.encoder_miss(digest("a at 1"), digest("a")) == "page"
    assert ledger.totals().segments["query"] == 6


def test_beyond_its_memory_it_calls_things_new() -> None:
    ledger = MissLedger(remembered=2)
    ledger.encoder_miss(digest("a at 1"), digest("a"))
    ledger.encoder_miss(digest("b at 1"), digest("b"))
    assert ledger.encoder_miss(digest("a at 1"), digest("a")) == "page"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("qr"),
            st.text(st.sampled_from("abc"), min_size=1, max_size=3),
            st.integers(1, 2),
        ),
        max_size=12,
    )
)
def test_totals_are_what_was_reported_and_nothing_new_is_called_evicted(
    requests: list[tuple[str, str, int]],
) -> None:
    """With a cache that keeps everything, only true differences are reported."""
    ledger, kept, reported = MissLedger(), set[bytes](), Counter[str]()
    for query, names, size in requests:
        asked = prompt(query, names, size)
        chain = [asked.head, *asked.segments]
        reused = next((i for i, key in enumerate(chain) if key not in kept), len(chain))
        reasons = ledger.segment_misses(asked, reused)
        assert len(reasons) == len(chain) - reused
        assert "evicted" not in reasons
        kept.update(chain)
        reported.update(reasons)
    assert ledger.totals().segments == {reason: reported[reason] for reason in REASONS}
