"""Who may go: a counted lock that serves in the order of asking.

``threading.Lock`` promises no order. A thread that reads a long prompt page by page gives its lock
back after every page and, as a rule, gets it again at once; those that decode would wait for the
whole prompt. Here whoever asked first is next.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """At most ``count`` holders at a time."""

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._free = count
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def take(self, places: int = 1) -> Iterator[None]:
        """Wait until it is one's turn and so many places are free, and hold them for the body.

        With all of them, nobody else holds any: later ones wait until the body is over.
        """
        ticket, held = object(), 0
        try:
            with self._changed:
                self._queue.append(ticket)
                self._changed.wait_for(lambda: self._queue[0] is ticket and self._free >= places)
                self._free -= places
                held = places
                self._queue.remove(ticket)
                self._changed.notify_all()  # the next one may fit in as well
            yield
        finally:  # wherever it was interrupted: those behind it must get their turn
            with self._changed:
                if ticket in self._queue:
                    self._queue.remove(ticket)
                self._free += held
                self._changed.notify_all()
