"""Runs a call once per list through pytest-benchmark, and makes an entry of what it saw.

Everything that is not the request happens between rounds, off the clock: drawing pages, emptying
or filling the cache. The times are those that pytest-benchmark took; tokens, stages and quality
are of the very same requests.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any, Protocol

from mmr5_bench.evidence.document import Entry, validate_entry
from mmr5_bench.evidence.gpu import GpuSampler
from mmr5_bench.evidence.memory import PeakMemory
from mmr5_bench.evidence.observe import Observation, entry_of, observation, observe
from mmr5_bench.evidence.pace import Pace
from mmr5_bench.evidence.quality import Judged, quality_of
from mmr5_bench.plugin.axes import cell_name, group_name
from mmr5_bench.plugin.case import BenchCase
from mmr5_bench.plugin.recording import Recording
from mmr5_bench.plugin.targets import Call, runnable
from mmr5_runtime.loading import EngineInfo
from mmr5_runtime.types import RerankResult

Judge = Callable[[Sequence[RerankResult]], Sequence[Judged]]


class PedanticBenchmark(Protocol):
    """What is used of pytest-benchmark's fixture."""

    group: str | None
    disabled: bool
    has_error: bool
    extra_info: dict[str, Any]
    stats: Any

    def pedantic(
        self,
        target: Callable[..., Any],
        *,
        setup: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]],
        teardown: Callable[..., None],
        rounds: int,
        warmup_rounds: int,
        iterations: int,
    ) -> Any: ...


class RerankBenchmark:
    """What ``mmr5_benchmark`` gives; measures once.

    Afterwards ``entry`` has what was measured, None with ``--benchmark-disable``, which asks the
    first list once and times nothing.
    """

    def __init__(self, benchmark: PedanticBenchmark, recording: Recording) -> None:
        self._benchmark = benchmark
        self._recording = recording
        self.entry: Entry | None = None

    def __call__(
        self,
        case: BenchCase,
        call: Callable[..., Any] | None = None,
        *,
        base: str = "rerank",
        subject: str | None = None,
    ) -> tuple[RerankResult, ...]:
        """Measures ``case``, one list per round; the results, in the order of its lists.

        ``call`` takes question and pages and returns a RerankResult; ``case.rerank`` unless given.
        An ``async def`` (``case.arerank``) is run to its end on the clock. ``base`` begins the
        entry's name and ``subject`` says who answered.
        """
        self._recording.synthetic = True
        return self.run(
            call or case.rerank,
            name=cell_name(base, case.axes),
            axes=case.axes,
            work=case.work,
            rounds=len(case.lists),
            warmup=len(case.warmup_lists),
            setup=case.prepare,
            subject=subject or f"ours {case.quant}",
            judge=case.judge,
            engine=case.reranker.info,
            note=case.note,
        )

    def run(
        self,
        target: Callable[..., Any],
        *,
        name: str,
        axes: Mapping[str, Any],
        work: str,
        rounds: int,
        warmup: int = 0,
        setup: Callable[[int], tuple[Any, ...]] | None = None,
        subject: str = "own",
        judge: Judge | None = None,
        engine: EngineInfo | None = None,
        note: str = "",
    ) -> tuple[RerankResult, ...]:
        """Measures any ``target`` that returns a RerankResult; its results by round.

        ``setup`` is called before every round, off the clock, with its number (warm-up rounds from
        ``-warmup`` to -1), and returns the arguments of ``target``; without it there are none.
        ``work`` (16 hex digits, see ``evidence.observe.work_id``) stands for what all rounds ask.
        ``judge`` makes quality of the results. ValueError for a target that cannot be timed to its
        end, and for a name that this run already has.
        """
        recording = self._recording
        recording.check_new(name, subject)
        if not self._benchmark.disabled:
            recording.begin()
        self._benchmark.group = group_name(name.partition("[")[0], axes)
        seen: dict[int, Observation] = {}
        paces: dict[int, list[float]] = {}
        try:
            with runnable(target) as call:
                memory, gpu = self._measure(call, setup, rounds, warmup, seen, paces)
        except BaseException as error:
            # Also for Ctrl-C, after which pytest-benchmark would take what is there for the whole.
            self._benchmark.has_error = True
            done = sum(number >= 0 for number in seen)
            reason = f"{type(error).__name__} after {done} of {rounds} rounds"
            if recording.begun:
                recording.skip(f"{subject}: {name}", reason)
            raise
        results = [seen[number].result for number in sorted(seen) if number >= 0]
        if not self._benchmark.disabled:
            seconds: list[float] = self._benchmark.stats.stats.data
            entry = entry_of(
                name,
                subject,
                axes,
                work,
                [observation(1e3 * s, r) for s, r in zip(seconds, results, strict=True)],
                warmup=warmup,
                engine=engine,
                memory_bytes_per_s=(recording.ceilings or {}).get("memory_bytes_per_s"),
                memory=memory.bytes(),
                gpu=gpu.summary(),
                note=note,
            )
            entry["pace_ms"] = [mean(paces[number]) for number in sorted(paces) if number >= 0]
            try:
                if judge is not None:
                    entry["quality"] = quality_of(judge(results))
            finally:  # the times are there, whatever becomes of the reference
                self._keep(entry)
        return tuple(results)

    def _measure(
        self,
        call: Call,
        setup: Callable[[int], tuple[Any, ...]] | None,
        rounds: int,
        warmup: int,
        seen: dict[int, Observation],
        paces: dict[int, list[float]],
    ) -> tuple[PeakMemory, GpuSampler]:
        """Runs all rounds; ``seen`` has them by number, ``paces`` the pace before and after."""
        device, share = self._recording.device, self._recording.settings.slowdown
        pace = Pace(device)
        numbers = itertools.count(0 if self._benchmark.disabled else -warmup)

        def prepare() -> tuple[tuple[Any, ...], dict[str, Any]]:
            number = min(next(numbers), rounds - 1)  # --benchmark-cprofile asks once more
            arguments = () if setup is None else setup(number)
            paces[number] = [pace.time_ms()]
            return (number, arguments), {}

        def after(number: int, arguments: tuple[Any, ...]) -> None:
            paces[number].append(pace.time_ms())

        def timed(number: int, arguments: tuple[Any, ...]) -> None:
            seen[number] = observe(lambda: _slowed(call, arguments, share), device)

        with PeakMemory(device) as memory, GpuSampler(device) as gpu:
            self._benchmark.pedantic(
                timed,
                setup=prepare,
                teardown=after,
                rounds=rounds,
                warmup_rounds=warmup,
                iterations=1,
            )
        return memory, gpu

    def _keep(self, entry: Entry) -> None:
        self.entry = validate_entry(entry)
        self._benchmark.extra_info["mmr5"] = entry
        self._recording.add(entry)


def _slowed(call: Call, arguments: tuple[Any, ...], share: float) -> RerankResult:
    started = time.perf_counter()
    result = call(*arguments)
    if share:
        time.sleep(share * (time.perf_counter() - started))
    return result
