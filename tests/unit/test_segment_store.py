"""The segment store: bounded, a tree at all times, and never other bits than were put in."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.reuse.config import host_bytes
from mmr5_runtime.reuse.segments import SegmentStore
from mmr5_runtime.spec import TextSpec
from mmr5_runtime.types import RequestError

CPU = torch.device("cpu")
LAYERS, KV_HEADS, DIM = 2, 1, 2
TOKEN_BYTES = 2 * LAYERS * KV_HEADS * DIM * 4  # of keys and values of one token, fp32


def tensors(seed: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that no other seed has."""
    values = torch.arange(LAYERS * KV_HEADS * tokens * DIM, dtype=torch.float32)
    k = (values + 1000 * seed).view(LAYERS, KV_HEADS, tokens, DIM)
    return k, -k - 0.5


def put(
    store: SegmentStore,
    key: bytes,
    parent: bytes | None = None,
    tokens: int = 1,
    cost_ms: float = 1.0,
) -> bool:
    return store.insert(key, parent, *tensors(key[0], tokens), cost_ms)


def present(store: SegmentStore, keys: list[bytes]) -> list[bytes]:
    """Which keys are there; asking makes them recent, in this order."""
    return [key for key in keys if store.peek(key)]


class StoreMachine(RuleBasedStateMachine):
    """The model knows every segment ever made, and the last known presence."""

    segments = Bundle("segments")

    @initialize(limit=st.integers(0, 14))
    def start(self, limit: int) -> None:
        self.limit = limit * TOKEN_BYTES
        self.store = SegmentStore(self.limit, CPU)
        self.parents: dict[bytes, bytes | None] = {}
        self.tokens: dict[bytes, int] = {}
        self.there = set[bytes]()  # as of the end of the last rule
        self.refused = self.evictions = 0

    def chain(self, key: bytes | None) -> list[bytes]:
        """From the head to ``key``."""
        keys: list[bytes] = []
        while key is not None:
            keys.insert(0, key)
            key = self.parents[key]
        return keys

    def protected(self, key: bytes | None) -> set[bytes]:
        """What may not leave while a child of ``key`` is inserted."""
        return set(self.chain(key)) & self.there

    @rule(
        target=segments,
        parent=st.none() | segments,
        tokens=st.integers(1, 5),
        cost=st.sampled_from([0.0, 1.0, 10.0]),
    )
    def insert_new(self, parent: bytes | None, tokens: int, cost: float) -> bytes:
        key = len(self.parents).to_bytes(2, "big")
        self.parents[key], self.tokens[key] = parent, tokens
        self.insert(key, cost)
        return key

    @rule(key=segments, cost=st.sampled_from([0.0, 1.0, 10.0]))
    def insert_again(self, key: bytes, cost: float) -> None:
        self.insert(key, cost)

    def insert(self, key: bytes, cost: float) -> None:
        parent, tokens = self.parents[key], self.tokens[key]
        before = self.present_now()
        protected = self.protected(parent)
        needed = sum(self.tokens[one] for one in protected) + tokens
        k, v = tensors(int.from_bytes(key, "big"), tokens)
        stored = self.store.insert(key, parent, k, v, cost, note=key)
        k.zero_()  # the store owns a copy
        after = self.present_now()
        if key in before:
            assert stored and after == before
        elif not stored:
            assert after == before  # nothing left in vain
            homeless = parent is not None and parent not in before
            assert homeless or needed * TOKEN_BYTES > self.limit
            self.refused += 1
        else:
            assert after - before == {key} and protected <= after
            # Not one more than needed had to go: with the last evicted it would not have fitted.
            lost = before - after
            if lost:
                used = sum(self.tokens[one] for one in after)
                least = max(self.tokens[one] for one in lost)
                assert (used + least) * TOKEN_BYTES > self.limit
            self.evictions += len(lost)
        self.there = after

    @rule(key=segments)
    def read_prefix(self, key: bytes) -> None:
        chain = self.chain(key)
        before = self.store.stats()
        nodes = self.store.prefix(chain)
        expected = []
        for one in chain:
            if one not in self.there:
                break
            expected.append(one)
        assert [node.key for node in nodes] == expected
        for node in nodes:
            k, v = tensors(int.from_bytes(node.key, "big"), self.tokens[node.key])
            assert torch.equal(node.k, k) and torch.equal(node.v, v)
            assert node.note == node.key
        after = self.store.stats()
        assert after.hits - before.hits == len(expected)
        assert after.misses - before.misses == len(chain) - len(expected)

    @rule()
    def clear(self) -> None:
        self.store.clear()
        self.there = self.present_now()
        assert not self.there

    def present_now(self) -> set[bytes]:
        """What is there, read off the tree itself: ``peek`` would change what leaves next."""
        entries = self.store._entries
        assert all(entry.node.key == key for key, entry in entries.items())
        return set(entries)

    @invariant()
    def is_a_bounded_tree(self) -> None:
        stats = self.store.stats()
        there = self.present_now()
        assert there == self.there
        assert stats.entries == len(there) and stats.limit_bytes == self.limit
        assert stats.bytes == sum(self.tokens[key] for key in there) * TOKEN_BYTES <= self.limit
        assert all(self.parents[key] is None or self.parents[key] in there for key in there)
        assert (stats.refused, stats.evictions) == (self.refused, self.evictions)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=150, stateful_step_count=40)


def test_a_loaded_prefix_leaves_the_arena_as_reading_it_did() -> None:
    # Vocabulary, hidden size, layers, heads, kv heads, head dim, intermediate size, and the rest.
    spec = TextSpec(10, 8, LAYERS, 2, KV_HEADS, DIM, 8, 1e-6, 1e4, (1, 0, 0), 64, False)
    read, loaded = (KVArena(spec, 8, torch.bfloat16) for _ in range(2))
    read.load(*(torch.randn(LAYERS, KV_HEADS, 5, DIM).bfloat16() for _ in "kv"))
    store = SegmentStore(10**6, CPU)
    # Views of the arena, as they come; one starts in the middle.
    assert store.insert(b"a", None, *read.view(0, 2), 1.0)
    assert store.insert(b"b", b"a", *read.view(2, 5), 1.0)
    expected = [part.clone() for part in read.view(0, 5)]
    read.k.zero_()
    read.v.zero_()
    for node in store.prefix([b"a", b"b", b"c"]):
        loaded.load(node.k, node.v)
    assert loaded.length == 5
    assert all(torch.equal(x, y) for x, y in zip(loaded.view(0, 5), expected, strict=True))


def filled(*costs: float, tokens: int = 1) -> tuple[SegmentStore, list[bytes]]:
    """A store that is full of heads without children, one per cost."""
    store = SegmentStore(len(costs) * tokens * TOKEN_BYTES, CPU)
    keys = [bytes([number]) for number in range(len(costs))]
    for key, cost in zip(keys, costs, strict=True):
        assert put(store, key, tokens=tokens, cost_ms=cost)
    return store, keys


def test_what_is_cheapest_per_byte_leaves_first() -> None:
    store, keys = filled(3.0, 1.0, 2.0)
    assert put(store, b"\x10", cost_ms=5.0) and put(store, b"\x11", cost_ms=5.0)
    assert present(store, keys) == [keys[0]]
    # A larger node of the same cost is worth less.
    store = SegmentStore(4 * TOKEN_BYTES, CPU)
    assert put(store, b"\x01", tokens=1, cost_ms=3.0) and put(store, b"\x02", tokens=3, cost_ms=3.0)
    assert put(store, b"\x03")
    assert present(store, [b"\x01", b"\x02"]) == [b"\x01"]


def test_among_equals_the_least_recently_used_leaves() -> None:
    store, keys = filled(1.0, 1.0, 1.0)
    assert store.peek(keys[0])
    assert put(store, b"\x10")
    assert present(store, keys) == [keys[0], keys[2]]


def test_a_use_makes_worth_more_than_an_unused_newcomer() -> None:
    store, (kept, cheap) = filled(1.5, 1.0)
    assert put(store, b"\x10", cost_ms=1.0) and not store.peek(cheap)  # the clock stands at 1
    assert store.peek(kept)  # 1 + 1.5 instead of 1.5; the newcomer has 1 + 1
    assert put(store, b"\x11", cost_ms=1.0)
    assert present(store, [kept, b"\x10", b"\x11"]) == [kept, b"\x11"]


def test_a_cheap_leaf_leaves_a_dear_parent_behind() -> None:
    store = SegmentStore(3 * TOKEN_BYTES, CPU)
    put(store, b"\x01", None, 1, 9.0)
    put(store, b"\x02", b"\x01", 1, 1.0)
    put(store, b"\x03", None, 1, 3.0)
    assert put(store, b"\x04", None, 1, 3.0)
    assert present(store, [b"\x01", b"\x02", b"\x03"]) == [b"\x01", b"\x03"]


def test_what_is_not_used_ages_however_dear_it_was() -> None:
    store, (dear, _) = filled(4.0, 1.0)
    for number in range(16, 40):  # a stream of cheap ones, each used once
        assert put(store, bytes([number]))
    assert not store.peek(dear)


def test_a_costly_reply_does_not_keep_a_stale_prompt() -> None:
    """It is worth most per byte, but the reply is nothing without the pages behind it."""
    store = SegmentStore(13 * TOKEN_BYTES, CPU)
    put(store, b"\x01", None, 3, 3.0)
    put(store, b"\x02", b"\x01", 3, 3.0)
    put(store, b"\x03", b"\x02", 1, 10.0)  # the reply: with its prompt 16 ms for 7 tokens
    put(store, b"\x05", None, 3, 9.0)
    put(store, b"\x06", b"\x05", 3, 9.0)  # 3 ms per token
    assert put(store, b"\x09", None, 3, 9.0)
    assert present(store, [b"\x01", b"\x02", b"\x03"]) == [b"\x01"]
    assert present(store, [b"\x05", b"\x06", b"\x09"]) == [b"\x05", b"\x06", b"\x09"]


def test_a_shared_head_is_not_held_against_its_children() -> None:
    store = SegmentStore(12 * TOKEN_BYTES, CPU)
    put(store, b"\x01", None, 9, 0.0)  # a head that cost nothing, and two pages on it
    put(store, b"\x02", b"\x01", 1, 5.0)
    put(store, b"\x03", b"\x01", 1, 5.0)
    put(store, b"\x04", None, 1, 1.0)
    assert put(store, b"\x05", None, 1, 1.0)
    assert present(store, [b"\x02", b"\x03", b"\x04"]) == [b"\x02", b"\x03"]


def test_a_chain_longer_than_the_store_keeps_its_beginning() -> None:
    store = SegmentStore(3 * TOKEN_BYTES, CPU)
    assert put(store, b"\x40")
    keys = [bytes([number]) for number in range(1, 6)]
    parents = [None, *keys]
    stored = [put(store, key, parents[i]) for i, key in enumerate(keys)]
    assert stored == [True, True, True, False, False]
    assert [node.key for node in store.prefix(keys)] == keys[:3]
    assert store.peek(b"\x40") is None
    assert (store.stats().evictions, store.stats().refused) == (1, 2)


def test_too_large_a_node_drives_nobody_out() -> None:
    store, keys = filled(1.0, 1.0)
    assert not put(store, b"\x10", tokens=3)
    assert present(store, keys) == keys


def test_a_prefix_begins_at_a_head_and_follows_parents() -> None:
    store = SegmentStore(10**6, CPU)
    for key, parent in [(b"\x01", None), (b"\x02", b"\x01"), (b"\x03", b"\x02"), (b"\x04", None)]:
        assert put(store, key, parent)
    assert store.prefix([b"\x02", b"\x03"]) == []
    assert [node.key for node in store.prefix([b"\x01", b"\x03"])] == [b"\x01"]
    assert [node.key for node in store.prefix([b"\x01", b"\x04"])] == [b"\x01"]
    assert store.prefix([]) == []


def test_a_peek_is_a_use_and_no_hit_or_miss() -> None:
    store, keys = filled(1.0, 1.0)
    before = store.stats()
    node = store.peek(keys[0])
    assert node is not None and node.key == keys[0]
    assert store.peek(b"\x10") is None
    assert store.stats() == before
    assert put(store, b"\x11") and present(store, keys) == [keys[0]]


def test_the_same_uses_leave_the_same_nodes() -> None:
    def survivors() -> list[bytes]:
        generator = torch.Generator().manual_seed(5)
        store = SegmentStore(20 * TOKEN_BYTES, CPU)
        heads = [bytes([number]) for number in range(100)]
        for key in heads:
            tokens, cost, other = torch.randint(1, 6, (3,), generator=generator).tolist()
            put(store, key, None, tokens, float(cost))
            store.peek(bytes([other]))
        return present(store, heads)

    first = survivors()
    assert 4 <= len(first) <= 20 and first == survivors()


@pytest.mark.parametrize(
    ("k", "v", "cost_ms", "message"),
    [
        (torch.zeros(2, 1, 0, 2), torch.zeros(2, 1, 0, 2), 1.0, "are no segment"),
        (torch.zeros(2, 3, 2), torch.zeros(2, 3, 2), 1.0, "are no segment"),
        (torch.zeros(2, 1, 3, 2), torch.zeros(2, 1, 2, 2), 1.0, "are no segment"),
        (torch.zeros(2, 1, 3, 2), torch.zeros(2, 1, 3, 2).bfloat16(), 1.0, "are no segment"),
        (*tensors(1, 1), -1.0, "cost -1.0 ms"),
        (*tensors(1, 1), float("nan"), "cost nan ms"),
    ],
)
def test_what_is_no_segment_is_refused_loudly(
    k: torch.Tensor, v: torch.Tensor, cost_ms: float, message: str
) -> None:
    store = SegmentStore(10**6, CPU)
    with pytest.raises(RequestError, match=message):
        store.insert(b"a", None, k, v, cost_ms)
    assert store.stats().entries == 0


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(RequestError, match="-1 bytes"):
        SegmentStore(-1, CPU)


def test_page_locked_blocks_count_as_the_powers_of_two_they_take() -> None:
    gpu = torch.device("cuda")  # only arithmetic: nothing is allocated
    store = SegmentStore(10**6, gpu)
    sizes = [host_bytes(count, gpu) for count in (1, 2, 3, 4096, 4097, 69 * 2**20)]
    assert sizes == [1, 2, 4, 4096, 8192, 128 * 2**20]
    assert not put(store, b"\x01", tokens=(10**6 // TOKEN_BYTES))  # 999,968 bytes take 2^20


def test_many_threads_leave_a_bounded_tree() -> None:
    store = SegmentStore(40 * TOKEN_BYTES, CPU)
    wrong: list[str] = []

    def work(worker: int) -> None:
        for turn in range(60):
            base = 1 + (worker * 7 + turn) % 60
            chain = [bytes([base]), bytes([base + 64]), bytes([base + 128])]
            for key, parent in zip(chain, [None, *chain], strict=False):
                put(store, key, parent, tokens=1 + turn % 4, cost_ms=float(base))
            for node in store.prefix(chain):
                if not torch.equal(node.k, tensors(node.key[0], node.k.shape[2])[0]):
                    wrong.append(f"{node.key!r}")
            if store.stats().bytes > 40 * TOKEN_BYTES:
                wrong.append("too many bytes")

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    entries = store._entries
    assert sum(entry.size for entry in entries.values()) == store.stats().bytes
    for key, entry in entries.items():
        assert entry.node.parent is None or entry.node.parent in entries
        assert entry.children == sum(other.node.parent == key for other in entries.values())
