"""Pages on their way to the vision tower: decoded and cut into patches a few pages ahead.

On a GPU, the CPU's part of page i + 1 costs about as long as the GPU's part of page i, so it runs
in threads meanwhile (decoding, resizing and cutting release the interpreter). On a CPU both would
want the same cores, and every page is prepared when it is asked for.

At most ``ahead`` pages are being prepared or ready beside the one that is used. An error of a page
is kept and raised when that page is asked for, where it appears without threads as well.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
from PIL import Image

Patches = TypeVar("Patches")
Result = TypeVar("Result")

MOST_AHEAD = 8  # pages; a decoded page of a 300 dpi scan takes 26 MB


def pages_ahead(device: torch.device) -> int:
    """How many pages are prepared ahead for a model on ``device``: one per core, none on a CPU."""
    if device.type == "cpu":
        return 0
    return min(MOST_AHEAD, os.cpu_count() or 1)


class Preparation(Generic[Patches]):
    """One page from its stored bytes to patches, in two steps that each run once.

    ``was_decoded``: the first step has nothing to do.
    """

    def __init__(
        self,
        decode: Callable[[], Image.Image],
        cut: Callable[[Image.Image], Patches],
        was_decoded: bool,
    ) -> None:
        self._image: Future[Image.Image] = Future()
        self._patches: Future[Patches] = Future()
        self._decode, self._cut = decode, cut
        self.was_decoded = was_decoded
        self.in_thread = False

    def run(self) -> None:
        """Both steps; errors are kept for those who ask for the results."""
        _settle(self._image, self._decode)
        _settle(self._patches, lambda: self._cut(self._image.result()))

    def decoded(self) -> None:
        """The first step: waits for the thread that has it, or takes it now. Raises its error."""
        if not self.in_thread:
            _settle(self._image, self._decode)
        self._image.result()

    def patches(self) -> Patches:
        """The second step, after :meth:`decoded`; raises like it."""
        if not self.in_thread:
            _settle(self._patches, lambda: self._cut(self._image.result()))
        return self._patches.result()


def _settle(future: Future[Result], step: Callable[[], Result]) -> None:
    try:
        future.set_result(step())
    except BaseException as error:
        future.set_exception(error)


class Prefetch(Generic[Patches]):
    """Preparations of a request's pages by index; for the one thread that serves the request.

    ``prepare(index)`` makes one, not started. A page is prepared by one thread at a time.
    """

    def __init__(self, prepare: Callable[[int], Preparation[Patches]], ahead: int) -> None:
        self._prepare = prepare
        self.ahead = ahead
        self._expected: deque[int] = deque()
        self._started: dict[int, Preparation[Patches]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def expect(self, indices: Sequence[int]) -> None:
        """The pages that will be taken next, each once and in this order, unless time runs out."""
        if self.ahead:
            self._expected = deque(index for index in indices if index not in self._started)
            self._start_some()

    def take(self, index: int) -> Preparation[Patches]:
        """The preparation of page ``index``, under way where it was expected."""
        if index in self._expected:
            self._expected.remove(index)
        taken = self._started.pop(index, None)
        self._start_some()
        return self._prepare(index) if taken is None else taken

    def close(self) -> None:
        """Drop what was not taken; returns when no thread is at work any more."""
        self._expected.clear()
        self._started.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _start_some(self) -> None:
        while self._expected and len(self._started) < self.ahead:
            index = self._expected.popleft()
            preparation = self._prepare(index)
            preparation.in_thread = True
            self._started[index] = preparation
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.ahead, thread_name_prefix="mmr5-page")
            self._pool.submit(preparation.run)
