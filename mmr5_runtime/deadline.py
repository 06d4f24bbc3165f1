"""How much time a request has left."""

from __future__ import annotations

import time


class Deadline:
    """Counts down from its creation; without a limit it never ends."""

    def __init__(self, limit_ms: float | None) -> None:
        self._end = None if limit_ms is None else time.perf_counter() + limit_ms / 1e3
        self._slowest_s = 0.0

    def observe(self, seconds: float) -> None:
        """A step took so long; the slowest so far is what another one may take."""
        self._slowest_s = max(self._slowest_s, seconds)

    def passed(self, steps_needed: int = 0) -> bool:
        """Whether the time is over, or would be after ``steps_needed`` more steps."""
        if self._end is None:
            return False
        return time.perf_counter() + steps_needed * self._slowest_s >= self._end
