"""Keys of prompt segments: each names its own content and everything that was read before it.

Keys and values of a segment depend on the engine, on every token in front of it and on the pages
among them, and on nothing else. So a key is the SHA-256 of its parent's key and its own content,
and the root is the engine. Rotary positions follow from token ids and grids and need no field.

Nothing is shortened: servers that kept 16 or 64 bits of a hash, or left an image's size out of it,
have served one image's KV for another's (LMCache #4086, SGLang #32404, dynamo #8340).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from mmr5_runtime.rope import Grid

# 2^15 prompt segments are some 1,500 requests of 20 pages, and a few MB.
REMEMBERED_KEYS = 1 << 15


def root_key(engine: bytes, profile_sha256: str) -> bytes:
    """The key in front of a head. ``engine`` names all that may change a bit of keys or values."""
    return _digest(b"root", engine, profile_sha256.encode())


def text_key(parent: bytes, kind: str, token_ids: Sequence[int]) -> bytes:
    """Key of a segment without image tokens; ``kind`` keeps equal ids of other use apart."""
    return _digest(b"text", parent, kind.encode(), _int64(token_ids))


def page_key(parent: bytes, token_ids: Sequence[int], page: bytes, grid: Grid) -> bytes:
    """Key of a segment that shows one page.

    ``token_ids`` are all ids of the segment, image tokens included; ``page`` is the key of the
    page's embeddings and ``grid`` its (frames, rows, columns) in patches.
    """
    return _digest(b"page", parent, _int64(token_ids), page, _int64(grid))


def _digest(*parts: bytes) -> bytes:
    """SHA-256 over the parts, each behind its length, so that no two lists of parts run together.

    The first part names the kind of key: keys of different kinds never hash the same bytes.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)
    return digest.digest()


def _int64(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


class RecentKeys:
    """A set of keys that forgets the least recently added beyond ``limit``; not thread-safe."""

    def __init__(self, limit: int = REMEMBERED_KEYS) -> None:
        self._limit = limit
        self._keys: dict[bytes, None] = {}  # in order of addition

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: bytes) -> None:
        """Remember ``key``, from now on as the most recent one."""
        self._keys.pop(key, None)
        self._keys[key] = None
        if len(self._keys) > self._limit:
            del self._keys[next(iter(self._keys))]
