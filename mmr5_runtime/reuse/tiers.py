"""A byte-bounded map that lets go of what was used longest ago; one tier of a cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Tier(Generic[Value]):
    """Values by key, at most ``limit_bytes`` of them; not thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.num_bytes = 0
        self.hits = 0
        self.evictions = 0
        self._entries: OrderedDict[bytes, tuple[Value, int]] = OrderedDict()  # least recent first

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._entries)

    def get(self, key: bytes) -> Value | None:
        """The value of ``key``, from now on the one used last; does not count as a hit."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def fits(self, key: bytes, size: int, kept: Container[bytes] = ()) -> bool:
        """Whether ``size`` bytes find room for ``key`` when everything outside ``kept`` may go."""
        if size > self.limit_bytes:
            return False
        stays = (entry[1] for name, entry in self._entries.items() if name in kept and name != key)
        return sum(stays) + size <= self.limit_bytes

    def put(
        self, key: bytes, value: Value, size: int, kept: Container[bytes] = ()
    ) -> list[bytes] | None:
        """Store ``value`` of ``size`` bytes; returns the keys that had to go, none of ``kept``.

        None, and no change, if it does not fit. A value that is there under ``key`` is replaced.
        """
        if not self.fits(key, size, kept):
            return None
        self.drop(key)
        gone = []
        for name in list(self._entries):
            if self.num_bytes + size <= self.limit_bytes:
                break
            if name not in kept:
                self.drop(name)
                gone.append(name)
        self.evictions += len(gone)
        self._entries[key] = (value, size)
        self.num_bytes += size
        return gone

    def drop(self, key: bytes) -> None:
        """Forget ``key`` if it is there; this is no eviction."""
        if (entry := self._entries.pop(key, None)) is not None:
            self.num_bytes -= entry[1]

    def clear(self) -> None:
        """Forget everything; the counters stay."""
        self._entries.clear()
        self.num_bytes = 0
