"""Where relocatable pages are kept between requests: a byte-bounded LRU of its own.

It shares nothing with the stores of exact keys and values, so that what is approximate can never be
found by a request that asked for exact reuse.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from mmr5_runtime.reuse.config import host_bytes
from mmr5_runtime.reuse.host_memory import host_block
from mmr5_runtime.reuse.tiers import Tier
from mmr5_runtime.rope import Grid


@dataclass(frozen=True, eq=False)
class RelocatablePage:
    """Keys and values of one page's image tokens, free of any place in a prompt.

    ``k`` [L, K, n, D] before rotation and ``v`` [L, K, n, D], both in the compute dtype and never
    written to; ``grid`` the page's patches. Label and vision markers are not part of it.
    """

    k: Tensor
    v: Tensor
    grid: Grid

    @property
    def num_tokens(self) -> int:
        """n, the image tokens of the page."""
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


@dataclass(frozen=True)
class RelocatableStats:
    """Counters since the store was made; ``entries`` and ``bytes`` as of now."""

    entries: int
    bytes: int
    limit_bytes: int
    hits: int
    misses: int
    evictions: int
    refused: int


class RelocatableStore:
    """Relocatable pages by key, in host memory; the least recently used goes first. Thread-safe.

    A key must name everything a capture depends on: the engine, the content-free head it was read
    behind, the page's token ids, its pixels and its grid.
    """

    def __init__(self, limit_bytes: int, device: torch.device) -> None:
        """``limit_bytes`` 0 keeps nothing; host memory is pinned when ``device`` is a GPU."""
        self._device = device
        self._lock = Lock()
        self._pages = Tier[RelocatablePage](limit_bytes)
        self._misses = self._refused = 0

    def get(self, key: bytes) -> RelocatablePage | None:
        """The page of ``key``, in host memory, or None."""
        with self._lock:
            page = self._pages.get(key)
            if page is None:
                self._misses += 1
            else:
                self._pages.hits += 1
            return page

    def put(self, key: bytes, page: RelocatablePage) -> bool:
        """Keeps a copy of ``page``, evicting others.

        False when it alone exceeds the limit, or the machine has no memory for it.
        """
        size = host_bytes(page.k.nbytes, self._device) + host_bytes(page.v.nbytes, self._device)
        if size > self._pages.limit_bytes:
            with self._lock:
                self._refused += 1
            return False
        k, v = self._copied(page.k), self._copied(page.v)
        with self._lock:
            if k is None or v is None:
                self._refused += 1
                return False
            self._pages.put(key, RelocatablePage(k, v, page.grid), size)
        return True

    def clear(self) -> None:
        """Forgets every page; the counters go on."""
        with self._lock:
            self._pages.clear()

    def stats(self) -> RelocatableStats:
        with self._lock:
            return RelocatableStats(
                entries=len(self._pages),
                bytes=self._pages.num_bytes,
                limit_bytes=self._pages.limit_bytes,
                hits=self._pages.hits,
                misses=self._misses,
                evictions=self._pages.evictions,
                refused=self._refused,
            )

    def _copied(self, part: Tensor) -> Tensor | None:
        """``part`` in contiguous host memory that nobody else writes to; None without any."""
        host = host_block(part.shape, part.dtype, self._device)
        return None if host is None else host.copy_(part)
