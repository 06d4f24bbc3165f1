"""Wall-clock spans of one request, by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Timings:
    """Adds up milliseconds per stage; on a GPU a span ends when its work has ended."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = time.perf_counter()
        self._spans: dict[str, float] = {}
        self.first_token_ms: float | None = None

    @contextmanager
    def span(self, stage: str) -> Iterator[None]:
        """Times the body and adds it to ``stage``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._spans[stage] = self._spans.get(stage, 0.0) + 1e3 * (time.perf_counter() - start)

    def mark_token(self) -> None:
        """Says that a token of the answer is there; the first one is remembered, in ms."""
        if self.first_token_ms is None:
            self.first_token_ms = 1e3 * (time.perf_counter() - self._started)

    def total(self) -> dict[str, float]:
        """All spans in the order they first ran, and ``total`` since creation, in ms."""
        return {**self._spans, "total": 1e3 * (time.perf_counter() - self._started)}
