"""Page embeddings by page: what the vision tower computed once is used again, bit for bit.

The embeddings of a page depend on its pixels, on how it is resized and on the engine, and not on
the question, its position or the other pages. They are an eighth of the page's KV and good for
every later request. Three tiers stand behind one another: GPU memory, main memory, a folder. What
is kept enters every tier that has room for it; the one used longest ago leaves first.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmr5_runtime.exhaustion import is_exhaustion
from mmr5_runtime.reuse.config import CacheConfig, host_bytes
from mmr5_runtime.reuse.disk import PageFolder
from mmr5_runtime.reuse.host_memory import host_block
from mmr5_runtime.reuse.identity import digest
from mmr5_runtime.reuse.page_source import Size
from mmr5_runtime.reuse.tiers import Tier
from mmr5_runtime.rope import Grid
from mmr5_runtime.types import OutOfMemoryError, RequestError


def page_key(
    source_pixels: bytes,
    planned: tuple[Size, Size],
    image_settings: Mapping[str, Any],
    engine: bytes,
) -> bytes:
    """SHA-256 (32 bytes) of all that page embeddings depend on.

    ``source_pixels`` is ``PageSource.pixels``, ``planned`` what ``image.planned_sizes`` gives: the
    resize as resolved, since one pixel budget resizes different pages differently and two budgets
    may resize a page alike. ``engine`` is :func:`~mmr5_runtime.reuse.identity.engine_identity`.
    """
    return digest(
        {
            "pixels": source_pixels.hex(),
            "resize": planned,
            "image": dict(image_settings),
            "engine": engine.hex(),
        }
    )


@dataclass(frozen=True)
class TierStats:
    """One tier as of now (``entries``, ``bytes``, of at most ``limit_bytes``) and since the start.

    ``hits`` counts pages this tier was the first to have, ``evictions`` those that made room.
    """

    entries: int
    bytes: int
    limit_bytes: int
    hits: int
    evictions: int


@dataclass(frozen=True)
class EncoderCacheStats:
    """Counters since the start; ``pinned`` is the number of pages pinned now.

    ``rejected`` counts pages that were there under the right key and not served: another grid or
    length, or a file that was altered. ``write_failures`` counts pages the disk did not take,
    ``refused`` those that main or GPU memory did not although a tier had room by its limit.
    """

    gpu: TierStats
    host: TierStats
    disk: TierStats
    misses: int
    rejected: int
    write_failures: int
    pinned: int
    refused: int = 0


@dataclass(frozen=True, eq=False)
class _Entry:
    embeddings: Tensor
    grid: Grid

    def matches(self, grid: Grid, tokens: int) -> bool:
        return self.grid == grid and len(self.embeddings) == tokens


class EncoderCache:
    """Embeddings [tokens, hidden] by :func:`page_key`; every method may be called from any thread.

    Main memory is page-locked for a CUDA device. PyTorch rounds such blocks up to a power of two
    (pytorch #150517); they are counted as they are.

    Raises:
        EngineError: the folder of the disk tier cannot be used.
    """

    def __init__(self, config: CacheConfig, device: torch.device, engine: bytes) -> None:
        self._device = device
        self._gpu = Tier[_Entry](config.gpu_bytes if device.type == "cuda" else 0)
        self._host = Tier[_Entry](config.embedding_bytes)
        self._disk = None
        if config.disk is not None:
            self._disk = PageFolder(config.disk, config.disk_bytes, engine)
        self._disk_limit = config.disk_bytes if self._disk is not None else 0
        self._lock = threading.Lock()
        self._pins = Counter[bytes]()
        self._misses = self._rejected = self._refused = 0

    def get(self, key: bytes, grid: Grid, tokens: int) -> Tensor | None:
        """The embeddings of ``key`` on the device, with the bits that were put; not to be changed.

        ``grid`` and ``tokens`` are what the caller expects. Should something else be stored, it is
        dropped, counted as rejected, and this is a miss. A page found on disk moves to main memory;
        raises like :meth:`put` if it is pinned and does not fit there.
        """
        with self._lock:
            if (found := self._in_memory(key, grid, tokens)) is not None:
                return found
        stored = None if self._disk is None else self._disk.load(key, grid, tokens)
        if stored is None:
            with self._lock:
                self._misses += 1
            return None
        return self._keep(key, stored, grid)

    def holds(self, key: bytes) -> bool:
        """Whether ``key`` is in a tier now, unchecked; no hit, no miss, and nothing is moved."""
        with self._lock:
            if key in self._gpu or key in self._host:
                return True
        return self._disk is not None and self._disk.holds(key)

    def put(self, key: bytes, embeddings: Tensor, grid: Grid) -> None:
        """Keep a copy of ``embeddings`` in every tier that has room for it.

        Raises:
            RequestError: the page is pinned, and main memory cannot hold it beside the other pinned
                pages; the message names the limit and the remedy.
            OutOfMemoryError: the page is pinned, and the machine has no memory for it.
        """
        self._keep(key, embeddings, grid)
        if self._disk is not None:
            self._disk.save(key, embeddings, grid)

    def pin(self, keys: Iterable[bytes]) -> None:
        """Never evict these pages from main memory, until as many calls of :meth:`unpin`.

        A page need not be there yet: pin a document first and encode it afterwards, and nothing of
        it is lost in between. Pinned pages that do not fit are found out when they are put.

        Raises:
            RequestError: main memory keeps no page embeddings at all.
        """
        wanted = Counter(keys)
        if wanted and not self._host.limit_bytes:
            raise RequestError(
                "pages cannot be pinned while embeddings_gib=0 keeps none; raise embeddings_gib."
            )
        with self._lock:
            self._pins.update(wanted)

    def unpin(self, keys: Iterable[bytes]) -> None:
        """Take back one :meth:`pin` of each key; RequestError, and no change, without one."""
        counts = Counter(keys)
        with self._lock:
            if any(self._pins[key] < count for key, count in counts.items()):
                raise RequestError("cannot unpin pages that are not pinned; unpin each pin once.")
            self._pins -= counts

    def clear(self) -> None:
        """Empty both memories, of pinned pages too; pins, counters and the disk stay."""
        with self._lock:
            self._gpu.clear()
            self._host.clear()

    def stats(self) -> EncoderCacheStats:
        """The folder is listed for this, which other processes may have written to."""
        disk = TierStats(0, 0, 0, 0, 0)
        rejected = failures = 0
        if self._disk is not None:
            entries, size = self._disk.usage()
            disk = TierStats(entries, size, self._disk_limit, self._disk.hits, self._disk.evictions)
            rejected, failures = self._disk.rejected, self._disk.write_failures
        with self._lock:
            return EncoderCacheStats(
                gpu=_tier_stats(self._gpu),
                host=_tier_stats(self._host),
                disk=disk,
                misses=self._misses,
                rejected=self._rejected + rejected,
                write_failures=failures,
                pinned=len(self._pins),
                refused=self._refused,
            )

    def _in_memory(self, key: bytes, grid: Grid, tokens: int) -> Tensor | None:
        on_gpu, in_host = self._gpu.get(key), self._host.get(key)
        found = on_gpu or in_host
        if found is None:
            return None
        if not found.matches(grid, tokens):
            self._gpu.drop(key)
            self._host.drop(key)
            self._rejected += 1
            return None
        if on_gpu is not None:
            self._gpu.hits += 1
            return on_gpu.embeddings
        self._host.hits += 1
        embeddings = found.embeddings.to(self._device, non_blocking=True)
        self._keep_on_gpu(key, embeddings, grid)
        return embeddings

    def _keep(self, key: bytes, embeddings: Tensor, grid: Grid) -> Tensor:
        """Store a copy in the memories; returns the embeddings on the device."""
        size = host_bytes(embeddings.nbytes, self._device)
        with self._lock:
            if self._host.fits(key, size, self._pins):
                copy = host_block(embeddings.shape, embeddings.dtype, self._device)
                if copy is not None:
                    self._host.put(key, _Entry(copy.copy_(embeddings), grid), size, self._pins)
                elif key in self._pins:
                    raise OutOfMemoryError(
                        f"main memory has no {size / (1 << 20):.1f} MiB left for one more pinned "
                        "page; lower kv_gib, lower max_pixels, or pin fewer pages."
                    )
                else:
                    self._refused += 1
            elif key in self._pins:
                raise RequestError(self._too_little(key, size))
            on_device = embeddings.to(self._device)
            self._keep_on_gpu(key, on_device, grid)
            return on_device

    def _keep_on_gpu(self, key: bytes, embeddings: Tensor, grid: Grid) -> None:
        if self._gpu.fits(key, embeddings.nbytes):
            try:
                # A copy: a part of a larger tensor would keep all of that alive.
                copy = embeddings.clone()
            except RuntimeError as error:
                if not is_exhaustion(error):
                    raise
                self._refused += 1
                return
            self._gpu.put(key, _Entry(copy, grid), embeddings.nbytes)

    def _too_little(self, key: bytes, size: int) -> str:
        pinned = sum(other in self._pins for other in self._host if other != key)
        return (
            f"embeddings_gib={self._host.limit_bytes / (1 << 30):g} cannot hold one more pinned "
            f"page of {size / (1 << 20):.1f} MiB beside {pinned}; raise it, lower max_pixels, or "
            "pin fewer pages."
        )


def _tier_stats(tier: Tier[_Entry]) -> TierStats:
    return TierStats(len(tier), tier.num_bytes, tier.limit_bytes, tier.hits, tier.evictions)
