"""Goals of whole lists: reranks cold and with pages seen, transformers on them too, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from mmr5_bench.evidence.observe import Observation, observe
from mmr5_bench.evidence.statistics import ratio_interval
from mmr5_bench.peers.base import ListWork, Setting, check
from mmr5_bench.peers.huggingface import REFERENCE_TEMPERATURE, TransformersPeer
from mmr5_bench.peers.prompts import PromptReader
from mmr5_bench.peers.workloads import Workload
from mmr5_bench.random_engine import reranker_of
from mmr5_bench.random_weights.shapes import Shape, stored_bytes
from mmr5_bench.targets.clock import Sizes, wait
from mmr5_bench.targets.results import Figure, figure
from mmr5_bench.targets.work import ModelWork, floor_ms
from mmr5_runtime import Reranker
from mmr5_runtime.loading import LoadedEngine
from mmr5_runtime.reuse.config import CacheConfig
from mmr5_runtime.types import RerankResult

OTHER_QUESTION = "Which page was shown before?"
TRANSFORMERS = "transformers bf16"


def draw_lists(shape: Shape, sizes: Sizes) -> list[ListWork]:
    """A list to warm up with and ``sizes.rounds`` to be timed, the same for everybody.

    A single one, which means nothing, is its own warm-up.
    """
    workload = _workload(shape, sizes.workload, sizes.pages, sizes.written)
    timed = [workload.list(number) for number in range(sizes.rounds)]
    return timed if len(timed) == 1 else [workload.warmup(0), *timed]


def rerank(
    loaded: LoadedEngine,
    configuration: str,
    work: ModelWork,
    ceilings: dict[str, Any],
    lists: Sequence[ListWork],
    *,
    seen: bool,
    dry_run: bool,
    ends: float,
) -> Figure:
    """Seconds per list from its files to its order, ``written`` tokens forced.

    With ``seen`` the pages were met with another question before, and their embeddings are kept.
    No second list is timed after ``ends`` of ``time.monotonic``.
    """
    reranker = reranker_of(loaded, CacheConfig() if seen else CacheConfig.off())
    found: list[Observation] = []
    try:
        for number, one in enumerate(lists):
            if found and time.monotonic() >= ends:
                break
            if seen:
                reranker.rerank(OTHER_QUESTION, one.pages, max_new_tokens=1, plan="single")
            timed = observe(partial(ask, reranker, one), str(loaded.engine.device))
            if number or len(lists) == 1:  # the first one warms up
                found.append(timed)
    finally:
        reranker.cache.clear()
    floor = floor_ms(_parts(work, lists[0], seen=seen), ceilings) / 1e3
    firsts = [one.ttft_ms for one in found if one.ttft_ms is not None]
    between = [one.per_token_ms for one in found if one.per_token_ms is not None]
    stages = {name for one in found for name in one.stages_ms}
    details = {
        "stages_ms": {
            name: statistics.mean(one.stages_ms.get(name, 0.0) for one in found)
            for name in sorted(stages)
        },
        "first_token_ms": statistics.median(firsts) if firsts else None,
        "ms_per_token": statistics.median(between) if between else None,
        "prompt_tokens": len(lists[0].prompt_ids),
    }
    return figure(
        "rerank-seen" if seen else "rerank-cold",
        configuration,
        [one.ms / 1e3 for one in found],
        dry_run=dry_run,
        floor=floor,
        details=details,
    )


def ask(reranker: Reranker, work: ListWork) -> RerankResult:
    """One list, decoded to exactly the forced length; ValueError when it was another."""
    result = reranker.rerank(
        *(work.question, work.pages),
        max_new_tokens=work.max_new_tokens,
        stop="eos",
        constrain=False,
        plan="single",
    )
    if result.usage.completion_tokens != work.max_new_tokens:
        raise ValueError(
            f"{result.usage.completion_tokens} tokens were written, not {work.max_new_tokens}"
        )
    return result


def transformers_seconds(
    shape: Shape, device: torch.device, lists: Sequence[ListWork], *, ends: float
) -> list[float]:
    """Seconds of the reference's way on the same lists: dense bf16, growing cache, sampled at 0.3.

    No second list is timed after ``ends``.

    ValueError with the reason where it cannot run, WorkMismatchError when it read something else.
    """
    setting = Setting(random=shape, device=str(device), dtype="bfloat16")
    peer = TransformersPeer(temperature=REFERENCE_TEMPERATURE)
    if reason := peer.why_not(setting):
        raise ValueError(reason)
    found: list[float] = []
    with peer.open(setting) as session:
        for number, work in enumerate(lists):
            if found and time.monotonic() >= ends:
                break
            session.forget()
            wait(device)
            start = time.perf_counter()
            answer = session.answer(work)
            wait(device)
            seconds = time.perf_counter() - start
            check(work, answer, session.reading(work, pixels=False), None)
            if number or len(lists) == 1:
                found.append(seconds)
    return found


def against(ours: Figure, theirs: Sequence[float], *, dry_run: bool) -> Figure:
    """How many times as long transformers took for the lists of ``ours``, list by list."""
    count = min(len(theirs), len(ours["samples"]))
    mine, other = ours["samples"][:count], list(theirs[:count])
    found = figure(
        "against-transformers",
        ours["configuration"],
        [b / a for a, b in zip(mine, other, strict=True)],
        dry_run=dry_run,
        details={"transformers_s": statistics.median(other), "ours_s": statistics.median(mine)},
        note=f"against {TRANSFORMERS}, sampled at {REFERENCE_TEMPERATURE}",
    )
    found["interval"] = ratio_interval(mine, other, "p50", paired=True)
    return found


def memory(
    loaded: LoadedEngine, configuration: str, shape: Shape, sizes: Sizes, *, dry_run: bool
) -> Figure:
    """Gigabytes that torch took of the GPU for one cold list, weights included.

    What it reserved, not only what was in tensors; the driver's own context comes on top. On a CPU
    there is nothing to read: the value is that of the stored weights.
    """
    device = loaded.engine.device
    work = _workload(shape, sizes.memory_workload, sizes.memory_pages, sizes.written).list(0)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    ask(reranker_of(loaded, CacheConfig.off()), work)
    stored = stored_bytes(shape, "int4")
    reserved = torch.cuda.max_memory_reserved(device) if on_gpu else stored
    allocated = torch.cuda.max_memory_allocated(device) if on_gpu else stored
    details = {"allocated_gb": allocated / 1e9, "prompt_tokens": len(work.prompt_ids)}
    return figure("memory", configuration, [reserved / 1e9], dry_run=dry_run, details=details)


def _workload(shape: Shape, name: str, pages: int, written: int) -> Workload:
    reader = PromptReader.from_random(shape)
    return Workload(name, pages, written, reader, forced=True)  # type: ignore[arg-type]


def _parts(work: ModelWork, first: ListWork, *, seen: bool) -> list[Any]:
    grids = [(rows, columns) for _, rows, columns in first.grids]
    return list(work.rerank(grids, len(first.prompt_ids), first.max_new_tokens, seen=seen))
