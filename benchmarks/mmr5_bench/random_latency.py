"""How long whole reranks take at a true shape, measured with random weights.

Data flow: shape and format -> random engine -> for every case (pages, tokens written, memory) a
warm-up and some rounds -> an entry each, written as soon as it is there. Every round is another
list of the workload that peers are given as well. ``cold`` keeps nothing from one request to the
next; ``warm`` has met the pages of the list with another question, outside the clock, and remembers
what a default engine remembers. The length of the answer is forced: random models never stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from mmr5_bench.evidence.ceilings import measure_ceilings
from mmr5_bench.evidence.document import (
    Entry,
    Evidence,
    load_evidence,
    new_evidence,
    write_evidence,
)
from mmr5_bench.evidence.gpu import GpuSampler
from mmr5_bench.evidence.machine import describe_machine
from mmr5_bench.evidence.memory import PeakMemory
from mmr5_bench.evidence.observe import Observation, entry_of, observe
from mmr5_bench.peers.base import Answer, ListWork
from mmr5_bench.peers.names import CELLS, WorkloadName
from mmr5_bench.peers.prompts import PromptReader
from mmr5_bench.peers.rounds import Round, work_of
from mmr5_bench.peers.workloads import Workload
from mmr5_bench.random_engine import Quant, Shape, random_engine, reranker_of
from mmr5_bench.random_weights.shapes import stored_bytes
from mmr5_runtime import OutOfMemoryError, Reranker
from mmr5_runtime.loading import LoadedEngine
from mmr5_runtime.reuse.config import CacheConfig
from mmr5_runtime.types import RerankResult

Cache = Literal["cold", "warm"]
CACHES: tuple[Cache, ...] = get_args(Cache)
OTHER_QUESTION = "Which page was shown before?"
_OTHERS = 9000  # lists from here on warm up: none of their questions is asked again
NOTE = (
    "Random weights of the shape, no trained model: what is answered means nothing, how long it "
    "takes and what it occupies does. The length of the answer is forced, and of the prompt only "
    "the text differs by a few tokens from what Qwen's own vocabulary gives."
)


@dataclass(frozen=True)
class RandomOptions:
    """What to measure: every combination of ``pages``, ``generated`` and ``caches``, in that order.

    ``seconds`` is for all of it; a case that time is too short for is skipped (see
    :func:`why_no_time`), and one whose share of it is over has fewer than ``rounds``, but at least
    one. Raises ValueError for a number
    below one or an unknown workload or cache.
    """

    shape: Shape
    quant: Quant
    workload: WorkloadName = "mmdocir"
    pages: tuple[int, ...] = (10,)
    generated: tuple[int, ...] = (110,)
    caches: tuple[Cache, ...] = ("cold",)
    rounds: int = 10
    warmup: int = 1
    seconds: float = 600.0
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.workload not in CELLS:
            known = ", ".join(CELLS)
            raise ValueError(f"workload {self.workload!r} is unknown; pass one of {known}")
        if unknown := set(self.caches) - set(CACHES):
            raise ValueError(f"cache {min(unknown)!r} is unknown; pass {' or '.join(CACHES)}")
        if min((self.rounds, self.warmup, *self.generated)) < 1 or min(self.pages) < 2:
            raise ValueError(
                "rounds, warm-up and generated tokens are at least 1, pages at least 2; a single "
                "page is never shown to the model"
            )

    @property
    def cases(self) -> list[Case]:
        """In the order they are measured."""
        return [
            Case(pages, generated, cache)
            for pages in self.pages
            for generated in self.generated
            for cache in self.caches
        ]


@dataclass(frozen=True)
class Case:
    """Lists of ``pages``, answers of ``generated`` tokens, and what is remembered before."""

    pages: int
    generated: int
    cache: Cache


@dataclass
class _Run:
    options: RandomOptions
    loaded: LoadedEngine
    evidence: Evidence
    output: Path
    say: Callable[[str], None]
    ends: float  # of time.perf_counter
    drawn: dict[tuple[int, int], list[ListWork]] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return str(self.loaded.engine.device)

    def workload(self, case: Case) -> Workload:
        reader = PromptReader.from_loaded(self.loaded)
        options = self.options
        return Workload(
            options.workload, case.pages, case.generated, reader, options.seed, forced=True
        )

    def lists(self, case: Case, ends: float) -> list[ListWork]:
        """As many as there are rounds, and at least one if it is ``ends`` before; once drawn, the
        same ones for every cache."""
        workload = self.workload(case)
        key = (case.pages, case.generated)
        if key not in self.drawn:
            self.drawn.clear()  # of the case before; pages of many lists are large
            found = self.drawn[key] = [workload.list(0)]
            while len(found) < self.options.rounds and time.perf_counter() < ends:
                found.append(workload.list(len(found)))
        return self.drawn[key]

    def write(self) -> None:
        write_evidence(self.evidence, self.output)


def measure_random(
    options: RandomOptions,
    output: Path,
    ceilings: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Evidence:
    """Measures every case and writes ``output`` after each; returns the whole document.

    ``ceilings`` is a result file of this machine that has them. A case that the device cannot hold
    is skipped with the reason; what was measured of a case that is interrupted is kept, and the
    interruption goes on. Raises ValueError for a result file without ceilings.
    """
    began = time.perf_counter()
    ceiling = None if ceilings is None else _read_ceilings(ceilings)
    loaded = random_engine(options.shape, options.quant, options.device, options.dtype)
    device = str(loaded.engine.device)
    say(f"{options.shape} {options.quant} on {device} after {time.perf_counter() - began:.1f} s")
    title = f"Whole reranks at the {options.shape} shape with random {options.quant} weights"
    evidence = new_evidence(title, NOTE, describe_machine(device))
    if ceiling is None:
        quick = options.shape == "tiny"
        ceiling = measure_ceilings(device, (), seconds=0.5, dry_run=quick)
    evidence["ceilings"] = ceiling
    run = _Run(options, loaded, evidence, output, say, began + options.seconds)
    run.write()
    cases, per_round = options.cases, 0.0
    for index, case in enumerate(cases):
        left = run.ends - time.perf_counter()
        reason = why_no_time(left, per_round, options.seconds) if evidence["entries"] else None
        if reason is None:
            try:
                per_round = _measure_case(run, case, left / (len(cases) - index))
                continue
            except (torch.OutOfMemoryError, OutOfMemoryError) as error:
                reason = next(iter(str(error).splitlines()), "out of memory")
            # Not in the handler: until its end the error holds on to what is to be freed.
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
        _skip(run, case, reason)
        run.write()
    return evidence


def why_no_time(left: float, per_round: float, seconds: float) -> str | None:
    """Why no case begins with ``left`` of ``seconds``; None when it may.

    A case has one untimed and one timed list at least; ``per_round`` are seconds of one before.
    """
    if left <= 0:
        return f"the {seconds:g} seconds were over"
    if left < 2 * per_round:
        return f"{left:.1f} of {seconds:g} seconds were left, and a list took {per_round:.1f}"
    return None


def _measure_case(run: _Run, case: Case, seconds: float) -> float:
    """Seconds per list, untimed ones too."""
    options, workload = run.options, run.workload(case)
    began = time.perf_counter()
    # Before the clock: clocks, power and memory are to be those of requests.
    lists = run.lists(case, began + seconds / 2)
    ends, asking = began + seconds, time.perf_counter()
    # Never closed: the engine belongs to the next case as well.
    reranker = reranker_of(run.loaded, CacheConfig.off() if case.cache == "cold" else CacheConfig())
    seen: list[Observation] = []
    gpu, memory = GpuSampler(run.device), PeakMemory(run.device)
    try:
        for number in range(options.warmup):
            _ask(reranker, workload.warmup(_OTHERS + number), case)
        with gpu, memory:
            for work in lists:
                if seen and time.perf_counter() >= ends:
                    break
                if case.cache == "warm":
                    reranker.rerank(OTHER_QUESTION, work.pages, max_new_tokens=1, plan="single")
                seen.append(observe(partial(_ask, reranker, work, case), run.device))
    finally:
        if seen:
            entry = _entry(run, case, lists[0], seen, gpu, memory)
            run.evidence["entries"].append(entry)
            run.write()
            run.say(f"{entry['name']}: {entry['latency_ms']['p50']['value']:.0f} ms, {len(seen)}x")
        reranker.cache.clear()
    return (time.perf_counter() - asking) / (options.warmup + len(seen))


def _ask(reranker: Reranker, work: ListWork, case: Case) -> RerankResult:
    result = reranker.rerank(
        work.question,
        work.pages,
        max_new_tokens=case.generated,
        stop="eos",
        constrain=False,
        plan="single",
    )
    if result.usage.completion_tokens != case.generated:
        raise ValueError(
            f"{result.usage.completion_tokens} tokens were written instead of {case.generated}; "
            "the model ended by itself"
        )
    return result


def _round(work: ListWork, seen: Observation) -> Round:
    """The first list as contenders of ``mmr5-bench peers`` have answered it."""
    result = seen.result
    answer = Answer(result.text, result.order, result.status, result.usage.completion_tokens)
    return Round.of(0, work, seen.ms, answer)


def _entry(
    run: _Run,
    case: Case,
    first: ListWork,
    seen: Sequence[Observation],
    gpu: GpuSampler,
    memory: PeakMemory,
) -> Entry:
    options, info = run.options, run.loaded.info
    ceilings = run.evidence.get("ceilings", {})
    axes: dict[str, Any] = {
        "pages": case.pages,
        "workload": options.workload,
        "generated": case.generated,
        "quant": options.quant,
        "cache": case.cache,
    }
    name = ",".join(f"{key}={value}" for key, value in axes.items())
    stored = stored_bytes(options.shape, options.quant)
    return entry_of(
        f"rerank[{name}]",
        f"ours {options.quant}",
        {**axes, "shape": options.shape, "stop": "eos", "think": "full", "dtype": info.dtype},
        work_of(run.workload(case), _round(first, seen[0])),
        seen,
        warmup=options.warmup,
        engine=info,
        memory_bytes_per_s=ceilings["memory_bytes_per_s"],
        memory={**memory.bytes(), "stored_bytes": stored},
        gpu=gpu.summary(),
        note=f"GPU was not sampled: {gpu.missing}." if gpu.missing else "",
    )


def _skip(run: _Run, case: Case, reason: str) -> None:
    subject = f"ours {run.options.quant}, {case.pages} pages, {case.generated} tokens, {case.cache}"
    run.evidence.setdefault("skipped", []).append({"subject": subject, "reason": reason})
    run.say(f"{subject}: skipped, {reason}")


def _read_ceilings(path: Path) -> dict[str, Any]:
    found = load_evidence(path).get("ceilings")
    if not found or "memory_bytes_per_s" not in found:
        raise ValueError(f"{path} has no ceilings; leave --ceilings out to measure them")
    return found
