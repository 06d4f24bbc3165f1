"""Time of whole calls on a device, and the time that is left for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sizes:
    """What is asked of every goal: true sizes, or such that a CPU is done in a moment.

    ``cached`` tokens before a decode step, ``attention`` keys (of the 4k and the 16k goal),
    ``prompt`` tokens to read, pages of ``workload`` in a list, tokens ``written``, and the list
    that memory is measured with. ``rounds`` is how often each is timed at most.
    """

    cached: int
    attention: tuple[int, int]
    prompt: int
    workload: str
    pages: int
    written: int
    memory_workload: str
    memory_pages: int
    rounds: int
    steps: int


TRUE = Sizes(8192, (4096, 16384), 13220, "mmdocir", 20, 110, "dense", 10, 5, 32)
TINY = Sizes(70, (24, 40), 70, "small", 2, 2, "small", 2, 1, 1)


def wait(device: torch.device) -> None:
    """Until everything that was launched on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_ms(call: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Wall time of ``rounds`` calls after one untimed, the device idle at both ends of each."""
    call()
    found = []
    for _ in range(rounds):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        found.append(1e3 * (time.perf_counter() - start))
    return found


def free_memory(device: torch.device) -> None:
    """Gives back what nothing holds any more, for the next engine."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
