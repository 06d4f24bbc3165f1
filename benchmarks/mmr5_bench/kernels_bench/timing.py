"""Times of calls that alternate: what is compared runs in the same minutes, in changing order.

A *subject* is a name with the calls that do the same work on different memory. Weights that stay
in a cache from one call to the next are read faster than a model ever reads them, so the calls of a
subject take turns, and together their weights are larger than the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Call = Callable[[], Tensor]

LEAST_ROUNDS = 5
MOST_ROUNDS = 200
_FLUSH_BYTES = 256 << 20
_UNKNOWN_CACHE = 64 << 20
_MOST_COPIES = 32
_MOST_BYTES = 4 << 30


class BudgetSpentError(ValueError):
    """The time that was given ended before there were enough rounds."""


@dataclass(frozen=True)
class Budget:
    """A point in time after which nothing new is begun; ``clock`` counts seconds."""

    ends: float
    clock: Callable[[], float] = time.monotonic

    @property
    def left(self) -> float:
        """Seconds; not below zero."""
        return max(0.0, self.ends - self.clock())

    def share(self, parts: int) -> Budget:
        """One of ``parts`` equal pieces of what is left."""
        return Budget(self.clock() + self.left / parts, self.clock)


def last_cache_bytes(device: torch.device) -> int:
    """The largest cache between ``device`` and its memory; 64 MB where nothing tells."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found = [_UNKNOWN_CACHE]
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for path in sizes:
        text = path.read_text(encoding="utf-8").strip()
        if text[:-1].isdigit() and text[-1:] in units:
            found.append(int(text[:-1]) * units[text[-1]])
    return max(found[1:], default=found[0])


def copies_needed(nbytes: int, cache: int) -> int:
    """How many copies of ``nbytes`` it takes to be twice ``cache``, within bounds of memory."""
    wanted = -(-2 * cache // max(1, nbytes))
    return max(1, min(wanted, _MOST_COPIES, _MOST_BYTES // max(1, nbytes)))


@dataclass(frozen=True)
class Stopwatch:
    """Milliseconds per call on one device.

    On a CPU every call is timed by itself. On CUDA a sample is the mean of one launch per call,
    between two events, after the cache was overwritten; calls are queued without waiting for each
    other, so a kernel that takes less time than its launch is timed by its launches, as it would
    be in a model.
    """

    device: torch.device

    def time(self, calls: Sequence[Call], turn: int) -> float:
        """One sample of ``calls``; ``turn`` says whose turn it is where one call is timed."""
        if self.device.type == "cuda":
            return self._events(calls, flush=True)
        call = calls[turn % len(calls)]
        start = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - start) / 1e6

    def time_hot(self, call: Call, launches: int = 20) -> float:
        """The same weight again and again, as long as it stays in the cache (CUDA only)."""
        return self._events([call] * launches, flush=False)

    def _events(self, calls: Sequence[Call], *, flush: bool) -> float:
        with torch.cuda.device(self.device):
            if flush:
                torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=self.device).zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for call in calls:
                call()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / len(calls)


def alternate(
    subjects: Mapping[str, Sequence[Call]],
    watch: Stopwatch,
    budget: Budget,
    *,
    most_rounds: int = MOST_ROUNDS,
) -> dict[str, list[float]]:
    """Samples in ms of every subject, one per round; each round begins with another subject.

    The first call of each runs once untimed; the memory of the others was written just before.
    Rounds go on until the budget is spent or there are ``most_rounds``; none is begun after the
    end. Raises :class:`BudgetSpentError` when that is before :data:`LEAST_ROUNDS`.
    """
    for calls in subjects.values():
        _check(budget)
        calls[0]()
    names = list(subjects)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(most_rounds):
        if budget.left <= 0:
            if number >= min(LEAST_ROUNDS, most_rounds):
                break
            _check(budget)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(watch.time(subjects[name], number))
    return samples


def _check(budget: Budget) -> None:
    if budget.left <= 0:
        raise BudgetSpentError(f"its time was over before {LEAST_ROUNDS} rounds; give more seconds")
