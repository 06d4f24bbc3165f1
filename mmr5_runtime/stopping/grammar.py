"""What may come next in a list of distinct page numbers, byte by byte.

    list := space? id space? ("," space? id space?)* "]" anything

``space`` is up to four bytes of blank, newline or tab; ``id`` is a number of 1..N that the list
does not hold yet, in decimal without leading zeros. Schema languages cannot say "not yet held"
without a state per subset, so positions are computed where the decoder stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

SPACE = b" \n\t"
DIGITS = b"0123456789"
MAX_SPACE = 4
ENDS = b","  # the way of every byte that ends an id, see `ListPosition.way`
COMMA, BRACKET = b",]"


@dataclass(frozen=True)
class ListPosition:
    """A place inside the list: ``used`` ids, the ``digits`` of the one being written, and how many
    bytes of white space stand since the last delimiter or digit (at most ``MAX_SPACE``)."""

    num_pages: int
    used: frozenset[int]
    digits: bytes
    spaces: int

    @cached_property
    def free(self) -> tuple[bytes, ...]:
        """The digits of every unused id, ascending."""
        numbers = range(1, self.num_pages + 1)
        return tuple(b"%d" % number for number in numbers if number not in self.used)

    @cached_property
    def names_free(self) -> bool:
        """Whether ``digits`` are an unused id, so that a delimiter may follow."""
        longest = len(str(self.num_pages))
        if not 0 < len(self.digits) <= longest or self.digits.startswith(b"0"):
            return False
        number = int(self.digits)
        return number <= self.num_pages and number not in self.used

    @cached_property
    def goes_on(self) -> bool:
        """Whether a further digit may follow ``digits``."""
        if self.spaces or len(self.used) == self.num_pages:
            return False
        if not self.digits:
            return True
        if self.digits.startswith(b"0") or len(self.digits) >= len(str(self.num_pages)):
            return False
        first = last = int(self.digits)
        while (first := 10 * first) <= self.num_pages:
            last = 10 * last + 9
            numbers = range(first, min(last, self.num_pages) + 1)
            if not self.used.issuperset(numbers):
                return True
        return False

    @property
    def _stuck(self) -> bool:
        """Digits that lead to no unused id. The grammar never gets here by itself, but a token that
        also holds the opening bracket may have written anything; then a delimiter leads out."""
        return bool(self.digits) and not self.names_free and not self.goes_on

    def allows(self, data: bytes) -> bool:
        """Whether ``data`` may come next; what follows a ``]`` in it is free, nothing is not."""
        position: ListPosition | None = self
        for byte in data:
            assert position is not None
            if byte == BRACKET:
                return position.may_close()
            position = position.after(byte)
            if position is None:
                return False
        return bool(data)

    def fork(self, byte: int) -> bytes | None:
        """The way of ``byte``, if this is a fork and it comes next; see :meth:`way`."""
        if byte in DIGITS:
            return bytes([byte])
        return ENDS if self.digits and self.goes_on else None

    def way(self, data: bytes) -> bytes | None:
        """Which way ``data`` goes at the first fork it meets; None when it meets none.

        What is not allowed before it comes to a fork has no way.

        A fork is the beginning of an id (the ways are first digits), or digits that may go on (the
        ways are the next digits, and ``ENDS`` for white space and delimiters).
        """
        position: ListPosition | None = self
        for byte in data:
            if position is None:
                return None
            if (way := position.fork(byte)) is not None:
                return way
            if byte == BRACKET:
                return None
            position = position.after(byte)
        return None

    def after(self, byte: int) -> ListPosition | None:
        """The position behind one more byte other than ``]``; None where it may not stand."""
        if byte in SPACE:
            fits = self.spaces < MAX_SPACE and (not self.digits or self.names_free)
            return self._with(self.used, self.digits, self.spaces + 1) if fits else None
        if byte in DIGITS:
            if self.digits and self.spaces:
                return None
            digits = self.digits + bytes([byte])
            longer = self._with(self.used, digits, 0)
            return longer if longer.names_free or longer.goes_on else None
        if byte == COMMA and (self.names_free or self._stuck):
            used = self.used | {int(self.digits)} if self.names_free else self.used
            left = len(used) < self.num_pages
            return self._with(used, b"", 0) if left else None
        return None

    def _with(self, used: frozenset[int], digits: bytes, spaces: int) -> ListPosition:
        return ListPosition(self.num_pages, used, digits, spaces)

    def may_close(self) -> bool:
        """Whether ``]`` may come next."""
        if self.digits:
            return self.names_free or (self._stuck and bool(self.used))
        return len(self.used) == self.num_pages
