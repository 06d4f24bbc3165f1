"""Wall-clock spans of one request, by stage.

On a GPU the host queues work and goes on, so a span says how long its work took only if it waits
for that work. Stages that run a few times (vision, prefill, copies of keys and values) wait: a few
times 10 us. Of ``decode`` there is a span for every token: it ends when the token has been read,
which is later than everything that made it, and where passes are launched ahead it has the launch
of the next one within. Otherwise each launch is a span of its own, which does not wait, and so is
each pass over text that is forced, which does. Their sum is the time from the first choice to the
last token, without what the caller and the bookkeeping did meanwhile; what a forward pass that was
launched ahead and not needed takes on the device is in none of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch


class Timings:
    """Adds up milliseconds per stage; spans may come from several threads, each stage adds up."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = time.perf_counter()
        self._lock = Lock()
        self._spans: dict[str, float] = {}
        self.first_token_ms: float | None = None

    @contextmanager
    def span(self, stage: str, wait: bool = True) -> Iterator[None]:
        """Times the body and adds it to ``stage``.

        With ``wait`` the span ends, on a GPU, when the work that this thread has queued has ended;
        without, when the body has.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            if wait:
                self._wait()
            took = 1e3 * (time.perf_counter() - start)
            with self._lock:
                self._spans[stage] = self._spans.get(stage, 0.0) + took

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def mark_token(self) -> None:
        """Says that a token of the answer is there; the first one is remembered, in ms."""
        if self.first_token_ms is None:
            self.first_token_ms = 1e3 * (time.perf_counter() - self._started)

    def total(self) -> dict[str, float]:
        """All spans in the order they first ended, and ``total`` since creation, in ms."""
        with self._lock:
            return {**self._spans, "total": 1e3 * (time.perf_counter() - self._started)}
