"""Forward passes of one answer: launched when their tokens are known, or ahead of that.

On a device that works while the host goes on, the pass over a token can be queued with the token as
the device chose it, before the host has read it. Whether it was needed turns out later: it is
taken, or taken back as if it had never been.

A pass says how long steps take, which a deadline has to know: from its launch to the moment the
token that came of it was read, without the time that the caller took meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from torch import Tensor

from mmr5_runtime.choosing import Choosing
from mmr5_runtime.cursor import Cursor
from mmr5_runtime.deadline import Deadline
from mmr5_runtime.replies import Step
from mmr5_runtime.timing import Timings


class Passes:
    """The passes of one cursor while an answer is decoded; at most one is ahead."""

    def __init__(self, cursor: Cursor, timings: Timings, deadline: Deadline) -> None:
        self._cursor, self._timings, self._deadline = cursor, timings, deadline
        self._ahead: Tensor | None = None  # logits [1, V] of the pass launched ahead
        self._launched: float | None = None  # when the pass whose logits are next was launched
        self._resumed = 0.0  # when the caller came back for more

    def run(self, tokens: Sequence[int], wait: bool = False) -> Tensor:
        """Logits [T, V] after ``tokens``; with ``wait`` the device is done when this returns."""
        began = self._launched = perf_counter()
        with self._timings.span("decode", wait=wait):
            rows = self._cursor.step(tokens)
        if wait:  # nobody else will see it end, and whether there is time left is asked next
            self._launched = None
            self._observe(began)
        return rows

    def read(self, choosing: Choosing, ahead: bool) -> Step | None:
        """What was chosen; with ``ahead`` the pass over it is launched before anyone knows."""
        launched, self._launched = self._launched, None
        if ahead:
            began = perf_counter()
            self._ahead = self._cursor.step(choosing.token)
            self._launched = began
        step = choosing.read()
        self._observe(launched)
        return step

    def take(self) -> Tensor | None:
        """Logits [1, V] of the pass that was launched ahead, if there is one."""
        rows, self._ahead = self._ahead, None
        return rows

    def take_back(self) -> None:
        """Undo the pass that was launched ahead, if there is one."""
        if self._ahead is not None:
            self._ahead = self._launched = None
            self._cursor.take_back()

    def resume(self) -> None:
        """The caller comes back for more: what passed until now was his time."""
        self._resumed = perf_counter()

    def _observe(self, launched: float | None) -> None:
        """A pass launched then has ended now."""
        if launched is not None:
            self._deadline.observe(perf_counter() - max(launched, self._resumed))
