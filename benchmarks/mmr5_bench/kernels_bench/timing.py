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
GRAPH_BELOW_MS = 0.5  # a launch takes the host some 0.01 ms; above this it is hidden
GRAPH_LAUNCHES = 20
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
class Sampler:
    """Ready to be timed: ``sample(turn)`` gives milliseconds per call.

    ``method`` says by what: ``host`` clock, CUDA ``events`` around launches, or a CUDA ``graph`` of
    launches. ``note`` says why it is not a graph where one was asked for.
    """

    sample: Callable[[int], float]
    method: str
    note: str = ""


@dataclass(frozen=True)
class Stopwatch:
    """Milliseconds per call on one device.

    On a CPU every call is timed by itself. On CUDA a sample is the mean of one launch per call,
    between two events, after the cache was overwritten. With ``graphs``, calls that take less than
    :data:`GRAPH_BELOW_MS` are captured into one CUDA graph, at least :data:`GRAPH_LAUNCHES` of
    them, and its replay is timed: a kernel of a few microseconds would otherwise be timed by how
    fast the host launches it. What cannot be captured is timed by events, with the reason noted.
    """

    device: torch.device
    graphs: bool = False

    def ready(self, calls: Sequence[Call]) -> Sampler:
        """Prepares ``calls``, which do the same work on different memory, to be timed in turn.

        Each must have run before: what is compiled at its first call is not to be captured.
        """
        if self.device.type != "cuda":
            return Sampler(lambda turn: self._host(calls[turn % len(calls)]), "host")
        note = ""
        if self.graphs:
            ms = min(self._events(calls, flush=True) for _ in range(2))  # the first may compile
            if ms < GRAPH_BELOW_MS:
                try:
                    return self._captured(calls)
                except RuntimeError as error:
                    note = f"not captured: {next(iter(str(error).splitlines()), 'no reason given')}"
            else:
                note = f"{ms:.2f} ms a call: launches are hidden without a graph"
        return Sampler(lambda turn: self._events(calls, flush=True), "events", note)

    def hot(self, call: Call) -> Sampler:
        """The same memory again and again, as long as it stays in the cache (CUDA only)."""
        if self.graphs:
            try:
                return self._captured([call], flush=False)
            except RuntimeError:
                pass
        return Sampler(lambda turn: self._events([call] * GRAPH_LAUNCHES, flush=False), "events")

    def _host(self, call: Call) -> float:
        start = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - start) / 1e6

    def _captured(self, calls: Sequence[Call], *, flush: bool = True) -> Sampler:
        """RuntimeError when something of it cannot be captured, or needs memory of its own."""
        launches = list(calls) * -(-GRAPH_LAUNCHES // len(calls))
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for call in calls:
                    call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for call in launches:
                    call()
            graph.replay()
            torch.cuda.synchronize()
        return Sampler(
            lambda turn: self._between(graph.replay, flush=flush) / len(launches), "graph"
        )

    def _events(self, calls: Sequence[Call], *, flush: bool) -> float:
        def launch() -> None:
            for call in calls:
                call()

        return self._between(launch, flush=flush) / len(calls)

    def _between(self, work: Callable[[], object], *, flush: bool) -> float:
        with torch.cuda.device(self.device):
            if flush:
                torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=self.device).zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end))


@dataclass(frozen=True)
class Samples:
    """What was measured of one subject: ms per call, one per round, and how (see Sampler)."""

    ms: list[float]
    method: str
    note: str = ""


def alternate(
    subjects: Mapping[str, Sequence[Call]],
    watch: Stopwatch,
    budget: Budget,
    *,
    most_rounds: int = MOST_ROUNDS,
) -> dict[str, Samples]:
    """Samples of every subject, one per round; each round begins with another subject.

    The first call of each runs once untimed; the memory of the others was written just before.
    Rounds go on until the budget is spent or there are ``most_rounds``; none is begun after the
    end. Raises :class:`BudgetSpentError` when that is before :data:`LEAST_ROUNDS`.
    """
    ready: dict[str, Sampler] = {}
    for name, calls in subjects.items():
        _check(budget)
        calls[0]()
        ready[name] = watch.ready(calls)
    names = list(subjects)
    samples = {name: Samples([], ready[name].method, ready[name].note) for name in names}
    for number in range(most_rounds):
        if budget.left <= 0:
            if number >= min(LEAST_ROUNDS, most_rounds):
                break
            _check(budget)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].ms.append(ready[name].sample(number))
    return samples


def _check(budget: Budget) -> None:
    if budget.left <= 0:
        raise BudgetSpentError(f"its time was over before {LEAST_ROUNDS} rounds; give more seconds")
