"""Reasons of cache misses, in the situations users meet."""

from __future__ import annotations

import hashlib
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from mmr5_runtime.reuse.chain import page_key, root_key, text_key
from mmr5_runtime.reuse.ledger import REASONS, MissLedger, PromptKeys, Reason

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


def read(
    ledger: MissLedger, asked: PromptKeys, reused: int, upto: int | None = None
) -> tuple[Reason, ...]:
    """Reasons of a prompt that is then read as a whole, or up to ``upto`` segments."""
    reasons = ledger.segment_misses(asked, reused)
    ledger.remember(asked, 1 + len(asked.segments) if upto is None else upto)
    return reasons


def test_the_first_prompt_is_a_new_question() -> None:
    ledger = MissLedger()
    assert read(ledger, prompt("q", "abc"), 0) == ("query",) * 4
    assert read(ledger, prompt("other", "abc"), 0) == ("query",) * 4


def test_a_complete_hit_misses_nothing() -> None:
    ledger = MissLedger()
    read(ledger, prompt("q", "abc"), 0)
    assert read(ledger, prompt("q", "abc"), 4) == ()
    assert sum(ledger.totals().segments.values()) == 4


def test_the_same_question_over_fewer_pages() -> None:
    ledger = MissLedger()
    read(ledger, prompt("q", "abc"), 0)
    assert read(ledger, prompt("q", "ab"), 0) == ("count",) * 3


def test_the_same_question_on_another_engine_is_new_to_it() -> None:
    ledger = MissLedger()
    read(ledger, prompt("q", "abc"), 0)
    other = prompt("q", "abc", root=root_key(b"other engine", "mm-r5"))
    assert read(ledger, other, 0) == ("query",) * 4


def test_changed_order() -> None:
    ledger = MissLedger()
    read(ledger, prompt("q", "abcd"), 0)
    assert read(ledger, prompt("q", "acbd"), 2) == ("order",) * 3


def test_a_new_page_moves_those_behind_it() -> None:
    ledger = MissLedger()
    read(ledger, prompt("q", "abcd"), 0)
    assert read(ledger, prompt("q", "axcd"), 2) == ("page", "order", "order")


def test_a_page_known_from_another_question_is_new_to_this_one() -> None:
    ledger = MissLedger()
    read(ledger, prompt("other", "xyz"), 0)
    read(ledger, prompt("q", "abc"), 0)
    assert read(ledger, prompt("q", "abz"), 3) == ("page",)
    # Even in another size: what another question read could not have been reused.
    assert read(ledger, prompt("q", "aby", size=2), 1) == (
        "parameters",
        "parameters",
        "page",
    )


def test_changed_parameters_win_over_nothing_but_a_new_page() -> None:
    ledger = MissLedger()
    read(ledger, prompt("q", "abc"), 0)
    assert read(ledger, prompt("q", "abc", size=2), 1) == ("parameters",) * 3
    # Both sizes are known by now: what differs is the order.
    assert read(ledger, prompt("q", "cab"), 1) == ("order",) * 3


def test_evicted_from_the_end() -> None:
    ledger = MissLedger()
    read(ledger, prompt("q", "abc"), 0)
    assert read(ledger, prompt("q", "abc"), 2) == ("evicted", "evicted")
    assert read(ledger, prompt("q", "abc"), 0) == ("evicted",) * 4
    assert read(ledger, prompt("q", "abx"), 2) == ("evicted", "page")


def test_what_was_not_read_is_not_called_evicted() -> None:
    ledger = MissLedger()
    assert read(ledger, prompt("q", "abc"), 0, upto=2) == ("query",) * 4  # the head and page a
    assert read(ledger, prompt("q", "abc"), 2, upto=3) == ("page", "page")
    assert read(ledger, prompt("q", "abc"), 1, upto=1) == ("evicted", "evicted", "page")
    # Page c was never read behind this head, not even in another place or size.
    assert read(ledger, prompt("q", "cab"), 1, upto=1) == ("page", "order", "order")
    assert read(ledger, prompt("q", "abc", size=2), 1) == ("parameters", "parameters", "page")


def test_a_question_of_which_nothing_was_read_stays_new() -> None:
    ledger = MissLedger()
    read(ledger, prompt("q", "abc"), 0, upto=0)
    assert read(ledger, prompt("q", "abc"), 0, upto=1) == ("query",) * 4
    assert read(ledger, prompt("q", "ab"), 0) == ("count",) * 3


def test_asking_for_reasons_alone_changes_none() -> None:
    ledger = MissLedger()
    for _ in range(2):
        assert ledger.segment_misses(prompt("q", "ab"), 0) == ("query",) * 3


def test_a_page_shown_twice_is_not_out_of_order() -> None:
    ledger = MissLedger()
    read(ledger, prompt("q", "ab"), 0)
    assert read(ledger, prompt("q", "xx"), 1) == ("page", "page")


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
    read(ledger, prompt("q", "ab"), 0)
    ledger.encoder_miss(digest("a at 1"), digest("a"))
    ledger.forget()
    assert read(ledger, prompt("q", "ab"), 0) == ("query",) * 3
    assert ledger.encoder_miss(digest("a at 1"), digest("a")) == "page"
    assert ledger.totals().segments["query"] == 6


def test_beyond_its_memory_it_calls_things_new() -> None:
    ledger = MissLedger(remembered=2)
    ledger.encoder_miss(digest("a at 1"), digest("a"))
    ledger.encoder_miss(digest("b at 1"), digest("b"))
    assert ledger.encoder_miss(digest("a at 1"), digest("a")) == "page"


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("qr"),
            st.text(st.sampled_from("abc"), min_size=1, max_size=3),
            st.integers(1, 2),
            st.integers(0, 4),
        ),
        max_size=12,
    )
)
def test_totals_are_what_was_reported_and_nothing_new_is_called_evicted(
    requests: list[tuple[str, str, int, int]],
) -> None:
    """With a cache that keeps everything, only true differences are reported.

    However early reading a prompt ended: what was not read is as new as before.
    """
    ledger, kept, reported = MissLedger(), set[bytes](), Counter[str]()
    for query, names, size, read_now in requests:
        asked = prompt(query, names, size)
        chain = [asked.head, *asked.segments]
        reused = next((i for i, key in enumerate(chain) if key not in kept), len(chain))
        upto = min(len(chain), reused + read_now)
        reasons = read(ledger, asked, reused, upto)
        assert len(reasons) == len(chain) - reused
        assert "evicted" not in reasons
        kept.update(chain[:upto])
        reported.update(reasons)
    assert ledger.totals().segments == {reason: reported[reason] for reason in REASONS}
