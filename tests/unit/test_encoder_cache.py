"""Page embeddings come back with their bits, from the right page, within the limits."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from mmr5_runtime.image import CLIP_MEAN, CLIP_STD, PixelBudget, planned_sizes
from mmr5_runtime.reuse.config import CacheConfig
from mmr5_runtime.reuse.encoder_cache import EncoderCache, page_key
from mmr5_runtime.reuse.page_source import PageReader
from mmr5_runtime.reuse.tiers import Tier
from mmr5_runtime.types import EngineError, RequestError

CPU = torch.device("cpu")
GIB = 1 << 30
ENGINE = b"e" * 32
GRID = (1, 4, 6)
SETTINGS: dict[str, Any] = {
    "mean": CLIP_MEAN,
    "std": CLIP_STD,
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
}


def embeddings(seed: int, tokens: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 8, generator=generator).to(dtype)


def key(number: int) -> bytes:
    return bytes([number]) * 32


def cache(num_bytes: int = 1 << 20, **options: Any) -> EncoderCache:
    return EncoderCache(CacheConfig(embeddings_gib=num_bytes / GIB, **options), CPU, ENGINE)


def same_bits(found: Tensor | None, expected: Tensor) -> bool:
    return (
        found is not None
        and (found.dtype, found.shape) == (expected.dtype, expected.shape)
        and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_put_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    store, page = cache(), embeddings(0, dtype=dtype)
    page[0, :4] = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-40]).to(dtype)
    expected = page.clone()
    assert store.get(key(0), GRID, 6) is None
    store.put(key(0), page, GRID)
    page.zero_()  # the cache has its own copy
    assert same_bits(store.get(key(0), GRID, 6), expected)
    stats = store.stats()
    assert (stats.host.entries, stats.host.bytes) == (1, expected.nbytes)
    assert (stats.host.hits, stats.misses, stats.gpu.hits, stats.disk.hits) == (1, 1, 0, 0)


def test_a_part_of_a_larger_tensor_does_not_keep_the_rest() -> None:
    store, whole = cache(), embeddings(0, tokens=600)
    store.put(key(0), whole[10:16], GRID)
    found = store.get(key(0), GRID, 6)
    assert found is not None and found.untyped_storage().nbytes() == 6 * 8 * 4


@pytest.mark.parametrize(("grid", "tokens"), [((1, 6, 4), 6), (GRID, 7), ((1, 2, 12), 6)])
def test_another_grid_or_length_is_a_miss_and_the_entry_goes(
    grid: tuple[int, int, int], tokens: int
) -> None:
    store = cache()
    store.put(key(0), embeddings(0), GRID)
    assert store.get(key(0), grid, tokens) is None
    assert store.get(key(0), GRID, 6) is None
    stats = store.stats()
    assert (stats.rejected, stats.misses, stats.host.hits, stats.host.entries) == (1, 2, 0, 0)


def test_the_page_used_longest_ago_makes_room() -> None:
    store = cache(2 * embeddings(0).nbytes)
    for number in (0, 1):
        store.put(key(number), embeddings(number), GRID)
    store.get(key(0), GRID, 6)
    store.put(key(2), embeddings(2), GRID)
    assert [store.get(key(n), GRID, 6) is not None for n in range(3)] == [True, False, True]
    store.put(key(1), embeddings(1), GRID)
    assert [store.get(key(n), GRID, 6) is not None for n in range(3)] == [False, True, True]
    assert store.stats().host.evictions == 2


def test_a_page_larger_than_the_limit_is_not_kept_and_drives_nobody_out() -> None:
    store = cache(embeddings(0).nbytes)
    store.put(key(0), embeddings(0), GRID)
    store.put(key(1), embeddings(1, tokens=7), (1, 2, 14))
    assert store.get(key(1), (1, 2, 14), 7) is None
    assert same_bits(store.get(key(0), GRID, 6), embeddings(0))


def test_pinned_pages_stay_until_every_pin_is_taken_back() -> None:
    store = cache(2 * embeddings(0).nbytes)
    store.pin([key(0)])
    store.pin([key(0)])
    for number in range(4):
        store.put(key(number), embeddings(number), GRID)
    assert same_bits(store.get(key(0), GRID, 6), embeddings(0))
    assert store.stats().pinned == 1
    store.unpin([key(0)])
    store.put(key(4), embeddings(4), GRID)
    assert store.get(key(0), GRID, 6) is not None
    store.unpin([key(0)])
    for number in (5, 6):
        store.put(key(number), embeddings(number), GRID)
    assert store.get(key(0), GRID, 6) is None
    assert store.stats().pinned == 0


def test_pins_are_taken_back_as_a_whole_or_not_at_all() -> None:
    store = cache()
    store.pin([key(0), key(1)])
    for keys in ([key(0), key(0)], [key(1), key(2)]):
        with pytest.raises(RequestError, match="not pinned; unpin each pin once"):
            store.unpin(keys)
    store.unpin([key(0), key(1)])
    assert store.stats().pinned == 0


def test_pinned_pages_that_do_not_fit_are_refused_with_the_remedy() -> None:
    store = cache(2 * embeddings(0).nbytes + 8)
    store.pin([key(0), key(1), key(2)])
    for number in (0, 1):
        store.put(key(number), embeddings(number), GRID)
    message = r"embeddings_gib=.* cannot hold one more pinned page of .* MiB beside 2; raise it"
    with pytest.raises(RequestError, match=message):
        store.put(key(2), embeddings(2), GRID)
    assert [store.get(key(n), GRID, 6) is not None for n in range(3)] == [True, True, False]
    store.put(key(3), embeddings(3), GRID)  # not pinned: it is only not kept
    assert store.get(key(3), GRID, 6) is None


def test_nothing_can_be_pinned_where_nothing_is_kept() -> None:
    store = EncoderCache(CacheConfig.off(), CPU, ENGINE)
    store.put(key(0), embeddings(0), GRID)
    assert store.get(key(0), GRID, 6) is None
    with pytest.raises(RequestError, match="embeddings_gib=0 keeps none; raise embeddings_gib"):
        store.pin([key(0)])
    store.pin([])


def test_clear_forgets_pages_but_not_pins() -> None:
    store = cache(embeddings(0).nbytes)
    store.put(key(0), embeddings(0), GRID)
    store.put(key(1), embeddings(1), GRID)
    store.pin([key(1)])
    store.clear()
    assert store.get(key(1), GRID, 6) is None
    stats = store.stats()
    assert (stats.host.entries, stats.host.bytes, stats.pinned) == (0, 0, 1)


def test_the_disk_stands_behind_main_memory(tmp_path: Path) -> None:
    store = cache(embeddings(0).nbytes, disk=tmp_path / "pages")
    for number in (0, 1):
        store.put(key(number), embeddings(number), GRID)
    assert same_bits(store.get(key(1), GRID, 6), embeddings(1))
    assert same_bits(store.get(key(0), GRID, 6), embeddings(0))
    assert same_bits(store.get(key(0), GRID, 6), embeddings(0))  # moved to main memory
    stats = store.stats()
    assert (stats.host.hits, stats.disk.hits, stats.misses) == (2, 1, 0)
    assert (stats.host.entries, stats.disk.entries) == (1, 2)


def test_a_new_process_finds_the_same_bits(tmp_path: Path) -> None:
    pages = {n: embeddings(n, dtype=torch.bfloat16) for n in range(3)}
    first = cache(disk=tmp_path)
    for number, page in pages.items():
        first.put(key(number), page, GRID)
    for memory in (1 << 20, 0):
        second = cache(memory, disk=tmp_path)
        for number, page in pages.items():
            assert same_bits(second.get(key(number), GRID, 6), page)
        assert second.stats().disk.hits == 3
    other = EncoderCache(CacheConfig(disk=tmp_path), CPU, b"o" * 32)
    assert other.get(key(0), GRID, 6) is None and other.stats().rejected == 1


def test_pages_the_disk_let_go_are_gone(tmp_path: Path) -> None:
    size = cache(disk=tmp_path)
    size.put(key(9), embeddings(9), GRID)
    limit = size.stats().disk.bytes
    store = cache(0, disk=tmp_path, disk_gib=limit / GIB)
    store.put(key(0), embeddings(0), GRID)
    assert [store.get(key(n), GRID, 6) is not None for n in (9, 0)] == [False, True]
    assert store.stats().disk.evictions == 1


def test_a_folder_that_cannot_be_used_is_named_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(EngineError, match=rf"cache folder {folder} cannot be written to"):
            cache(disk=folder)


def test_near_collisions_never_hit() -> None:
    """Everything a page's embeddings depend on, changed one at a time: all keys differ."""
    reader, found = PageReader(10_000_000), []
    pixels = torch.randint(0, 256, (150 * 30 * 3,), dtype=torch.uint8).numpy()
    for shape in ((30, 150, 3), (150, 30, 3)):
        source = reader.open(pixels.reshape(shape), 0)
        for budget in (PixelBudget(), PixelBudget(784, 1568), PixelBudget(min_pixels=12544)):
            found.append((source.pixels, planned_sizes(*source.size, budget), SETTINGS, ENGINE))
    base = found[0]
    (first, last), other = base[1], reader.open(pixels[:4500].reshape(30, 150), 0)
    found += [
        (other.pixels, base[1], SETTINGS, ENGINE),  # grey: the start of the same bytes
        (base[0], (last, (first[0] + 28, first[1])), SETTINGS, ENGINE),
        (base[0], ((first[0], first[1] + 28), last), SETTINGS, ENGINE),
        (base[0], (first, (last[1], last[0])), SETTINGS, ENGINE),
        (base[0], base[1], SETTINGS, b"f" * 32),
        (base[0], base[1], SETTINGS | {"mean": CLIP_STD}, ENGINE),
        (base[0], base[1], SETTINGS | {"mean": CLIP_STD, "std": CLIP_MEAN}, ENGINE),
        (base[0], base[1], SETTINGS | {"patch_size": 7}, ENGINE),
        (base[0], base[1], SETTINGS | {"merge_size": 1}, ENGINE),
        (ENGINE, base[1], SETTINGS, base[0]),
    ]
    keys = [page_key(*parts) for parts in found]
    assert all(len(found_key) == 32 for found_key in keys)
    store = cache()
    for number, found_key in enumerate(keys):
        assert store.get(found_key, GRID, 6) is None
        store.put(found_key, embeddings(number), GRID)
    for number, parts in enumerate(found):
        assert same_bits(store.get(page_key(*parts), GRID, 6), embeddings(number))


def test_threads_get_their_own_pages() -> None:
    store, wrong = cache(3 * embeddings(0).nbytes), []

    def work(shift: int) -> None:
        for turn in range(200):
            number = (turn * shift) % 7
            found = store.get(key(number), GRID, 6)
            if found is None:
                store.put(key(number), embeddings(number), GRID)
            elif not same_bits(found, embeddings(number)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(shift,)) for shift in (1, 2, 3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = store.stats()
    assert wrong == [] and stats.host.hits + stats.misses == 800
    assert stats.host.bytes <= 3 * embeddings(0).nbytes


class TierMachine(RuleBasedStateMachine):
    """A tier against a plain dictionary in order of use."""

    LIMIT = 10

    def __init__(self) -> None:
        super().__init__()
        self.tier = Tier[int](self.LIMIT)
        self.model: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        self.kept: set[bytes] = set()
        self.evictions = self.turn = 0

    @rule(name=st.integers(0, 6), size=st.integers(1, 12))
    def put(self, name: int, size: int) -> None:
        self.turn += 1
        found = self.tier.put(key(name), self.turn, size, self.kept)
        rest = OrderedDict((k, entry) for k, entry in self.model.items() if k != key(name))
        held = sum(entry[1] for k, entry in rest.items() if k in self.kept)
        if held + size > self.LIMIT:
            assert found is None
            return
        gone = []
        while sum(entry[1] for entry in rest.values()) + size > self.LIMIT:
            gone.append(next(k for k in rest if k not in self.kept))
            del rest[gone[-1]]
        assert found == gone
        self.evictions += len(gone)
        rest[key(name)] = (self.turn, size)
        self.model = rest

    @rule(name=st.integers(0, 6))
    def get(self, name: int) -> None:
        expected = self.model.get(key(name))
        assert self.tier.get(key(name)) == (None if expected is None else expected[0])
        if expected is not None:
            self.model.move_to_end(key(name))

    @rule(name=st.integers(0, 6))
    def keep_or_release(self, name: int) -> None:
        self.kept ^= {key(name)}

    @rule(name=st.integers(0, 6))
    def drop(self, name: int) -> None:
        self.tier.drop(key(name))
        self.model.pop(key(name), None)

    @precondition(lambda self: len(self.model) > 3)
    @rule()
    def clear(self) -> None:
        self.tier.clear()
        self.model.clear()

    @invariant()
    def agree(self) -> None:
        assert list(self.tier) == list(self.model)
        assert self.tier.num_bytes == sum(size for _, size in self.model.values()) <= self.LIMIT
        assert self.tier.evictions == self.evictions


class CacheMachine(RuleBasedStateMachine):
    """The whole cache on a CPU: what it returns are the bits that were put, or nothing."""

    ROOM = 4  # pages of 6 tokens

    def __init__(self) -> None:
        super().__init__()
        self.page_bytes = embeddings(0).nbytes
        self.cache = cache(self.ROOM * self.page_bytes)
        self.pins: list[int] = []
        self.kept = set[int]()  # pinned and there

    @rule(number=st.integers(0, 9))
    def ask_and_compute(self, number: int) -> None:
        found = self.cache.get(key(number), GRID, 6)
        if found is not None:
            assert same_bits(found, embeddings(number))
            return
        assert number not in self.kept
        before = self.cache.stats().host
        full = len(self.kept) == self.ROOM
        try:
            self.cache.put(key(number), embeddings(number), GRID)
        except RequestError:
            assert full and number in self.pins
            assert self.cache.stats().host == before
            return
        assert not (full and number in self.pins)
        assert (self.cache.get(key(number), GRID, 6) is None) == full
        if number in self.pins:
            self.kept.add(number)

    @rule(number=st.integers(0, 9))
    def pin(self, number: int) -> None:
        self.cache.pin([key(number)])
        self.pins.append(number)
        if self.cache.get(key(number), GRID, 6) is not None:
            self.kept.add(number)

    @precondition(lambda self: self.pins)
    @rule()
    def unpin(self) -> None:
        number = self.pins.pop()
        self.cache.unpin([key(number)])
        self.kept &= set(self.pins)

    @invariant()
    def within_limits(self) -> None:
        stats = self.cache.stats()
        assert stats.host.bytes == stats.host.entries * self.page_bytes
        assert stats.host.entries <= self.ROOM and stats.rejected == 0
        assert stats.pinned == len(set(self.pins))
        for number in self.kept:
            assert same_bits(self.cache.get(key(number), GRID, 6), embeddings(number))


TestTier = TierMachine.TestCase
TestTier.settings = settings(max_examples=60, stateful_step_count=40)
TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=40, stateful_step_count=40)
