"""Steps of several threads in the order that a test wants, without anyone waiting for time to pass.

The engine is a gate: a pass says who is in it and what comes of it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from mmr5_runtime.batching import StepBatcher
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.spec import TextSpec
from mmr5_runtime.turns import Turns

SPEC = TextSpec(8, 4, 1, 2, 1, 4, 4, 1e-6, 1e4, (1, 1, 0), 4096, False)
PATIENCE = 30.0  # seconds until a test that hangs fails


class Engine:
    """Logits [B, T, 1] are a function of id and position alone; ``answer`` replaces a pass."""

    device = torch.device("cpu")

    def __init__(self, answer: Callable[[], None] = lambda: None) -> None:
        self.passes: list[list[list[int]]] = []  # ids [B, T] of every pass
        self.inside = threading.Lock()
        self._answer = answer

    def step(self, token_ids: Tensor, positions: Tensor, arenas: Sequence[KVArena]) -> Tensor:
        assert self.inside.acquire(blocking=False), "two passes at once"
        try:
            self.passes.append(token_ids.tolist())
            self._answer()
            for arena, ids in zip(arenas, token_ids, strict=True):
                rows = ids.float().view(1, 1, -1, 1).expand(1, 1, -1, 4)
                arena.load(rows, rows)
        finally:
            self.inside.release()
        return (100 * token_ids + positions).float()[..., None]


def call(work: Callable[[], object]) -> Future[object]:
    """Runs ``work`` in a thread of its own."""
    future: Future[object] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def step(
    batcher: StepBatcher, ids: Sequence[int], arena: KVArena, position: int = 0
) -> list[float]:
    positions = torch.arange(position, position + len(ids))
    logits, _ = batcher.step(torch.tensor([ids]), positions[None], arena)
    found: list[float] = logits[0, :, 0].tolist()
    return found


class Watched(deque[Any]):
    """A queue at whose length a test can wait."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()

    def append(self, item: Any) -> None:
        with self._changed:
            super().append(item)
            self._changed.notify_all()

    def reaches(self, length: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self) == length, PATIENCE)

    def __delitem__(self, cut: Any) -> None:
        for _ in range(len(range(len(self))[cut])):
            self.popleft()

    def __getitem__(self, cut: Any) -> Any:
        return list(self)[cut]


def batch(engine: Engine) -> StepBatcher:
    batcher = StepBatcher(engine, Turns())
    batcher._waiting = Watched()  # type: ignore[assignment]
    return batcher


def waiting(batcher: StepBatcher, count: int) -> None:
    """Returns once ``count`` steps wait."""
    batcher._waiting.reaches(count)  # type: ignore[attr-defined]
