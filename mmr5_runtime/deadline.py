"""How much time a request has left."""

from __future__ import annotations

import time


class Deadline:
    """Counts down from its creation; without a limit it never ends."""

    def __init__(self, limit_ms: float | None) -> None:
        self._end = None if limit_ms is None else time.perf_counter() + limit_ms / 1e3
        self._slowest_s = 0.0
        self._last = time.perf_counter()

    def tick(self) -> None:
        """A step has ended; the slowest step so far is what closing an answer will take."""
        now = time.perf_counter()
        self._slowest_s, self._last = max(self._slowest_s, now - self._last), now

    def start_steps(self) -> None:
        """Steps begin now: what came before says nothing about how long one takes."""
        self._slowest_s, self._last = 0.0, time.perf_counter()

    def passed(self, steps_needed: int = 0) -> bool:
        """Whether the time is over, or would be after ``steps_needed`` more steps."""
        if self._end is None:
            return False
        return time.perf_counter() + steps_needed * self._slowest_s >= self._end
