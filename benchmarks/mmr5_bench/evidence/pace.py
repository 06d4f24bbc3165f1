"""How fast the machine is at this moment: a fixed piece of work, timed around every round.

A shared processor is slower for seconds or minutes when its neighbours are busy, and a GPU when it
is hot. That slows a fixed piece of work by about as much as a request, so a comparison of two runs
divides by it, and what is left is the code. The work never changes: paces of two runs would not
compare otherwise.
"""

from __future__ import annotations

import time
from statistics import median

import torch
from torch.nn.functional import linear, silu

_REPEATS = 3
_STEPS = {"cpu": 40, "cuda": 20}
_ROWS = {"cpu": 8, "cuda": 2048}
_WIDTH = {"cpu": 512, "cuda": 2048}
_COPY_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}


class Pace:
    """The work, ready on ``device``: small products and a copy, as decoding is made of both.

    Holds 33 MiB, on CUDA 544 MiB, which an entry's peak memory includes.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = torch.device(device)
        kind = self._device.type
        width = _WIDTH[kind]
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(width, width, generator=generator) / width**0.5
        self._weight = drawn.to(self._device)
        self._input = torch.randn(_ROWS[kind], width, generator=generator).to(self._device)
        self._source = torch.ones(_COPY_BYTES[kind] // 4, device=self._device)
        self._target = torch.empty_like(self._source)
        self._work()

    def time_ms(self) -> float:
        """Median time of the work now, about a hundredth of a second."""
        return median(self._once() for _ in range(_REPEATS))

    def _once(self) -> float:
        start = time.perf_counter()
        self._work()
        return 1e3 * (time.perf_counter() - start)

    def _work(self) -> None:
        x = self._input
        for _ in range(_STEPS[self._device.type]):
            x = silu(linear(x, self._weight)) + self._input
        self._target.copy_(self._source)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
