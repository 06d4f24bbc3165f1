"""How much memory and disk reuse may take."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from mmr5_runtime.types import RequestError

_GIB = 1 << 30
_MIB = 1 << 20
_SIZES = ("embeddings_gib", "kv_gib", "gpu_gib", "disk_gib")
# The limit of the group this process is in, as a container sees it: versions 2 and 1 of cgroups.
_CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


@dataclass(frozen=True)
class CacheConfig:
    """Limits of everything that is kept for later requests, in GiB; 0 keeps nothing.

    ``embeddings_gib``: main memory for page embeddings (7 KiB per visual token at 7B in bf16, 8 MiB
    for a page of 1,200); None is 4, but at most an eighth of what the machine or container has.
    ``kv_gib``: main memory for the KV of prompt segments (8 times as much per token); None is 16,
    but at most a quarter; requests with ``image_kv="relocate"`` may take as much again.
    ``gpu_gib``: GPU memory for the page embeddings used last; it plays no part on a CPU, nor
    without ``embeddings_gib``. ``disk``: a folder for page embeddings that outlives the process and
    may be shared by several; ``disk_gib`` bounds it.

    Raises:
        RequestError: a size is negative or no number, or ``disk`` is no path or has no room.
    """

    embeddings_gib: float | None = None
    kv_gib: float | None = None
    gpu_gib: float = 0.25
    disk: str | os.PathLike[str] | None = None
    disk_gib: float = 16.0

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if value is None and name in ("embeddings_gib", "kv_gib"):
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and value >= 0):
                raise RequestError(
                    f"{name}={value!r} is no size in GiB; pass a number, 0 keeps nothing."
                )
        if self.disk is None:
            return
        if not isinstance(self.disk, str | os.PathLike) or not os.fspath(self.disk):
            raise RequestError(f"disk={self.disk!r} is no folder; pass a path, or None.")
        if not self.disk_bytes:
            raise RequestError(
                f"disk_gib={self.disk_gib} leaves no room in disk={os.fspath(self.disk)!r}; "
                "raise it, or pass disk=None."
            )

    @classmethod
    def off(cls) -> CacheConfig:
        """Nothing is kept from one request to the next."""
        return cls(embeddings_gib=0, kv_gib=0, gpu_gib=0)

    @property
    def embedding_bytes(self) -> int:
        """Main memory for page embeddings."""
        return _bytes(self.embeddings_gib, default=4, share=8)

    @property
    def kv_bytes(self) -> int:
        """Main memory for the KV of prompt segments."""
        return _bytes(self.kv_gib, default=16, share=4)

    @property
    def gpu_bytes(self) -> int:
        """GPU memory for page embeddings; it stands in front of main memory, never alone."""
        return int(self.gpu_gib * _GIB) if self.embedding_bytes else 0

    @property
    def disk_bytes(self) -> int:
        """Disk space for page embeddings, whether or not a folder is given."""
        return int(self.disk_gib * _GIB)


def check_limits(
    config: CacheConfig,
    device: torch.device,
    *,
    embedding_bytes_per_page: int,
    kv_bytes_per_page: int,
) -> None:
    """Refuse a limit that was given, is not 0 and yet too small for a single page.

    The sizes are those of the largest page that ``max_pixels`` allows. A default may be too small
    for it on a small machine: smaller pages are then kept all the same.

    Raises:
        RequestError: naming the limit, what one page needs and the remedy.
    """
    needed = {
        "embeddings_gib": host_bytes(embedding_bytes_per_page, device),
        "kv_gib": host_bytes(kv_bytes_per_page, device),
        "gpu_gib": embedding_bytes_per_page if device.type == "cuda" and config.gpu_bytes else 0,
        "disk_gib": embedding_bytes_per_page if config.disk is not None else 0,
    }
    for name, need in needed.items():
        limit = getattr(config, name)
        if limit and need > limit * _GIB:
            remedy = "None as disk" if name == "disk_gib" else "0 to keep none"
            raise RequestError(
                f"{name}={limit:g} cannot hold one page of this engine, which may take "
                f"{math.ceil(need / _MIB)} MiB; raise it, lower max_pixels, or pass {remedy}."
            )


def host_bytes(count: int, device: torch.device) -> int:
    """Main memory that a block of ``count`` bytes takes in a store for ``device``.

    For a GPU it is page-locked, and PyTorch rounds such blocks up to a power of two (pytorch
    #150517); they are counted as they are, so that a limit bounds the machine's memory.
    """
    return 1 << (count - 1).bit_length() if device.type == "cuda" and count else count


def _bytes(gib: float | None, *, default: int, share: int) -> int:
    if gib is not None:
        return int(gib * _GIB)
    memory = main_memory()
    return default * _GIB if memory is None else min(default * _GIB, memory // share)


def main_memory(container_limits: Iterable[Path] = _CONTAINER_LIMITS) -> int | None:
    """Bytes of memory this machine, or the container around this process, has in all.

    None where the system does not tell (Windows). ``container_limits`` are files that hold a number
    of bytes, or no number where there is no limit.
    """
    found = []
    if hasattr(os, "sysconf"):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in container_limits:
        try:
            found.append(int(path.read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(found, default=None)
