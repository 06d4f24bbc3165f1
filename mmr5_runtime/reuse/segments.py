"""Remembered KV: a tree of prompt segments in host memory, bounded in bytes.

A node holds the keys and values of one segment (the head of a prompt, one page, a reply). Its
parent is the segment read before it, and without its parent it is useless; so nodes enter behind
their parents and leave before them. Loading a prefix copies its nodes into an arena one after the
other, which restores the very bits that reading the segments had left there.

What leaves first follows GreedyDual-Size (Cao and Irani, "Cost-Aware WWW Proxy Caching Algorithms",
USITS 1997): a node is worth the clock at its last use plus its cost in ms per byte, the least worth
leaves, and the clock moves up to it. Frequency, which GreedyDual-Size-Frequency (Cherkasova, HP
Labs 1998) multiplies in, is left out: one question is used in a burst (retries, samples, windows)
and would then outstay questions that come back. Two adaptations to a tree:

* Only leaves can leave, so an expensive little leaf (a reply takes seconds and is 100 tokens) would
  keep a stale prompt behind it alive. A leaf is therefore worth no more than it and the nodes that
  only it needs are worth together.
* Making room is all or nothing: if what may leave is not enough, nothing leaves.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmr5_runtime.reuse.config import host_bytes
from mmr5_runtime.reuse.host_memory import host_block
from mmr5_runtime.types import RequestError


@dataclass(frozen=True, eq=False)
class Node:
    """Keys ``k`` and values ``v`` of one segment of n tokens, each [L, K, n, D].

    Both lie in host memory, in the arena's dtype, and are never written again. ``parent`` is None
    for a head. ``note`` is whatever small thing was stored with it, such as the tokens of a reply.
    """

    key: bytes
    parent: bytes | None
    k: Tensor
    v: Tensor
    note: object | None = None


@dataclass(frozen=True)
class SegmentStoreStats:
    """``bytes`` of ``limit_bytes`` are taken by ``entries`` nodes; the rest counts since the start.

    ``hits`` and ``misses`` count nodes that prefixes asked for, ``evictions`` nodes that made room,
    ``refused`` nodes that did not fit.
    """

    entries: int
    bytes: int
    limit_bytes: int
    hits: int
    misses: int
    evictions: int
    refused: int


@dataclass(eq=False)
class _Entry:
    node: Node
    size: int  # bytes
    cost_ms: float
    clock: float  # of the store at the last use
    children: int = 0


class SegmentStore:
    """Nodes by key, at most ``limit_bytes`` of them; every method may be called from any thread.

    For a CUDA ``device`` the memory is page-locked, so that a copy into an arena overlaps with
    computing. PyTorch rounds page-locked blocks up to a power of two (pytorch #150517); they are
    counted as they are, so that the limit bounds the machine's memory and not a wish.
    """

    def __init__(self, limit_bytes: int, device: torch.device) -> None:
        """Raises RequestError for a negative limit; with 0 nothing is ever kept."""
        if limit_bytes < 0:
            raise RequestError(
                f"a segment store of {limit_bytes} bytes is impossible; give 0 to switch it off."
            )
        self._limit = limit_bytes
        self._device = device
        self._lock = threading.Lock()
        self._entries: dict[bytes, _Entry] = {}  # least recently used first
        self._clock = 0.0
        self._bytes = 0
        self._hits = self._misses = self._evictions = self._refused = 0

    def prefix(self, keys: Sequence[bytes]) -> list[Node]:
        """The nodes of the longest remembered prefix of a chain of keys that begins at a head."""
        found: list[Node] = []
        with self._lock:
            for key in keys:
                entry = self._entries.get(key)
                if entry is None or entry.node.parent != (found[-1].key if found else None):
                    break
                found.append(self._use(key).node)
            self._hits += len(found)
            self._misses += len(keys) - len(found)
        return found

    def peek(self, key: bytes) -> Node | None:
        """The node of ``key``, if it is remembered: a use of it, but neither a hit nor a miss.

        For chains of which nobody knows how long they are: looking behind the last node is how
        their end is found, and means nothing.
        """
        with self._lock:
            return self._use(key).node if key in self._entries else None

    def insert(
        self,
        key: bytes,
        parent: bytes | None,
        k: Tensor,
        v: Tensor,
        cost_ms: float,
        note: object | None = None,
    ) -> bool:
        """Remember the segment that was read behind ``parent``; True if it is remembered now.

        k, v [L, K, n, D] on any device, views of an arena included: they are copied, and the copy
        has finished when this returns. ``cost_ms`` is what computing the segment took. A key that
        is remembered already keeps its node. False means that it did not fit: its parent is not
        there, it is too large beside the nodes before it in its own chain, or the machine has no
        memory for it.

        Raises RequestError for keys and values of other shapes than these, or a bad cost.
        """
        _check(k, v, cost_ms)
        size = host_bytes(2 * k.nbytes, self._device)
        with self._lock:
            if key in self._entries:
                self._use(key)
                return True
            if (parent is not None and parent not in self._entries) or not self._make_room(
                size, parent
            ):
                self._refused += 1
                return False
            # One block for both: it is rounded up once.
            shape = (2, *k.shape)
            both = host_block(shape, k.dtype, self._device)
            if both is None:
                self._refused += 1
                return False
            both[0].copy_(k)
            both[1].copy_(v)
            node = Node(key, parent, both[0], both[1], note)
            self._entries[key] = _Entry(node, size, cost_ms, self._clock)
            self._bytes += size
            if parent is not None:
                self._entries[parent].children += 1
            return True

    def clear(self) -> None:
        """Forget every node; the counters stay."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def stats(self) -> SegmentStoreStats:
        with self._lock:
            return SegmentStoreStats(
                entries=len(self._entries),
                bytes=self._bytes,
                limit_bytes=self._limit,
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                refused=self._refused,
            )

    def _use(self, key: bytes) -> _Entry:
        entry = self._entries.pop(key)
        entry.clock = self._clock
        self._entries[key] = entry
        return entry

    def _make_room(self, size: int, parent: bytes | None) -> bool:
        """Evict until ``size`` more bytes fit behind ``parent``; False, and no change, if never."""
        if self._bytes + size <= self._limit:
            return True
        kept = self._chain(parent)
        if sum(self._entries[key].size for key in kept) + size > self._limit:
            return False
        while self._bytes + size > self._limit:
            self._evict(kept)
        return True

    def _chain(self, key: bytes | None) -> set[bytes]:
        """The key, if it is one, and those of all nodes before it."""
        found = set[bytes]()
        while key is not None:
            found.add(key)
            key = self._entries[key].node.parent
        return found

    def _evict(self, kept: set[bytes]) -> None:
        """Drop the leaf of least worth outside ``kept``; among equals the least recently used."""
        leaves = [key for key, entry in self._entries.items() if not entry.children]
        worths = {key: self._worth(key, kept) for key in leaves}
        key = min(worths, key=worths.__getitem__)
        entry = self._entries.pop(key)
        if entry.node.parent is not None:
            self._entries[entry.node.parent].children -= 1
        # A leaf may be worth less than one that left before it: it was no leaf then.
        self._clock = max(self._clock, worths[key])
        self._bytes -= entry.size
        self._evictions += 1

    def _worth(self, leaf: bytes, kept: set[bytes]) -> float:
        """The least of clock + ms per byte over the leaf, it and its parent, and so on.

        The walk ends before a node that other leaves need too, or one of ``kept``; a leaf among
        these is worth more than any other.
        """
        least, cost_ms, size, clock = math.inf, 0.0, 0, 0.0
        key: bytes | None = leaf
        while key is not None and key not in kept and self._entries[key].children < 2:
            entry = self._entries[key]
            cost_ms, size = cost_ms + entry.cost_ms, size + entry.size
            clock = max(clock, entry.clock)
            least = min(least, clock + cost_ms / size)
            key = entry.node.parent
        return least


def _check(k: Tensor, v: Tensor, cost_ms: float) -> None:
    if k.dim() != 4 or not k.numel() or (k.shape, k.dtype) != (v.shape, v.dtype):
        raise RequestError(
            f"keys {list(k.shape)} {k.dtype} and values {list(v.shape)} {v.dtype} are no segment; "
            "give both as [layers, kv heads, tokens, head dim] with at least one token."
        )
    if not (math.isfinite(cost_ms) and cost_ms >= 0):
        raise RequestError(f"a segment cannot cost {cost_ms} ms; give the measured time.")
