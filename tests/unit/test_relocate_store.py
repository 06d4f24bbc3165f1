"""The store of relocatable pages against an ordered dict, under any sequence of operations."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import sha256
from threading import Thread

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mmr5_runtime.reuse.relocate_store import RelocatablePage, RelocatableStore

TOKEN_BYTES = 2 * 2 * 3 * 4 * 4  # keys and values of 2 layers, 3 heads, 4 values of 4 bytes
CPU = torch.device("cpu")


def page(tokens: int, seed: int = 0) -> RelocatablePage:
    k, v = torch.randn(2, 2, 3, tokens, 4, generator=torch.Generator().manual_seed(seed))
    return RelocatablePage(k, v, (1, 2, 2 * tokens))


def same(found: RelocatablePage, expected: RelocatablePage) -> bool:
    return (
        torch.equal(found.k, expected.k)
        and torch.equal(found.v, expected.v)
        and (found.grid, found.num_tokens) == (expected.grid, expected.num_tokens)
    )


KEYS = st.sampled_from([sha256(bytes([number])).digest() for number in range(6)])


class StoreMachine(RuleBasedStateMachine):
    """The model is the pages that must be there, least recently used first."""

    @initialize(tokens=st.sampled_from([0, 5, 12, 20, 28]), loose=st.integers(0, TOKEN_BYTES - 1))
    def start(self, tokens: int, loose: int) -> None:
        self.limit = limit = tokens * TOKEN_BYTES + loose
        self.store = RelocatableStore(limit, CPU)
        self.pages: OrderedDict[bytes, RelocatablePage] = OrderedDict()
        self.counts = dict.fromkeys(("hits", "misses", "evictions", "refused"), 0)

    @rule(key=KEYS, tokens=st.integers(1, 9), seed=st.integers(0, 99))
    def put(self, key: bytes, tokens: int, seed: int) -> None:
        new = page(tokens, seed)
        fits = tokens * TOKEN_BYTES <= self.limit
        assert new.nbytes == tokens * TOKEN_BYTES
        assert self.store.put(key, new) is fits
        if not fits:
            self.counts["refused"] += 1
            return
        self.pages.pop(key, None)
        while sum(held.nbytes for held in self.pages.values()) + new.nbytes > self.limit:
            self.pages.popitem(last=False)
            self.counts["evictions"] += 1
        self.pages[key] = RelocatablePage(new.k.clone(), new.v.clone(), new.grid)
        new.k.zero_()  # the caller's tensors are the caller's: the store has its own
        new.v.zero_()

    @rule(key=KEYS)
    def get(self, key: bytes) -> None:
        found = self.store.get(key)
        self.counts["misses" if found is None else "hits"] += 1
        if key not in self.pages:
            assert found is None
            return
        assert found is not None and same(found, self.pages[key])
        self.pages.move_to_end(key)

    @rule()
    def clear(self) -> None:
        self.store.clear()
        self.pages.clear()

    @invariant()
    def the_books_are_right(self) -> None:
        stats = self.store.stats()
        assert stats.entries == len(self.pages)
        assert stats.bytes == sum(held.nbytes for held in self.pages.values()) <= self.limit
        assert stats.limit_bytes == self.limit
        assert {name: getattr(stats, name) for name in self.counts} == self.counts


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=30)


def test_the_least_recently_used_page_goes() -> None:
    store = RelocatableStore(6 * TOKEN_BYTES, CPU)
    for key in (b"a", b"b", b"c"):
        store.put(key, page(2))
    store.get(b"a")
    store.put(b"d", page(2))
    assert {key for key in (b"a", b"b", b"c", b"d") if store.get(key)} == {b"a", b"c", b"d"}


def test_a_page_survives_its_eviction_in_the_hands_of_who_got_it() -> None:
    store = RelocatableStore(4 * TOKEN_BYTES, CPU)
    store.put(b"a", page(4, seed=1))
    found = store.get(b"a")
    store.put(b"b", page(4, seed=2))
    assert store.get(b"a") is None
    assert found is not None and same(found, page(4, seed=1))


def test_views_of_larger_tensors_are_kept_at_their_own_size() -> None:
    wide = page(10)
    part = RelocatablePage(wide.k[:, :, 2:5], wide.v[:, :, 2:5], (1, 2, 6))
    store = RelocatableStore(3 * TOKEN_BYTES, CPU)
    assert store.put(b"part", part)
    found = store.get(b"part")
    assert found is not None and same(found, part)
    assert found.k.untyped_storage().nbytes() == part.k.nbytes


@pytest.mark.parametrize("limit", [3 * TOKEN_BYTES, 40 * TOKEN_BYTES])
def test_threads_share_a_store(limit: int) -> None:
    store = RelocatableStore(limit, CPU)
    wrong: list[int] = []

    def work(first: int) -> None:
        for step in range(150):
            number = (first + step) % 8
            found = store.get(bytes([number]))
            if found is not None and not same(found, page(1 + number % 3, seed=number)):
                wrong.append(number)
            store.put(bytes([number]), page(1 + number % 3, seed=number))

    threads = [Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = store.stats()
    assert not wrong
    assert stats.bytes <= limit
    assert stats.hits + stats.misses == 4 * 150
    store.clear()
    assert (store.stats().entries, store.stats().bytes) == (0, 0)
