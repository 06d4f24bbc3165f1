"""One timed rerank, and many of them put together as an entry.

Only what the caller passes is inside the clock: a call that draws its pages or clears a cache has
to do so before. On a GPU the clock starts when earlier work is done and stops when this work is.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmr5_bench.evidence.document import Entry
from mmr5_bench.evidence.statistics import latency_summary
from mmr5_runtime.loading import EngineInfo
from mmr5_runtime.types import RerankResult

_CLOCK_MS = 0.1  # what reading two clocks may differ by


@dataclass(frozen=True)
class Observation:
    """Wall time of one request in ms, and what the result says of itself.

    ``stages_ms`` adds up to ``ms``: ``other`` is what lies between the stages and around them.
    """

    ms: float
    ttft_ms: float | None
    stages_ms: Mapping[str, float]
    result: RerankResult

    @property
    def per_token_ms(self) -> float | None:
        """Mean time from one token to the next; None for fewer than two tokens."""
        tokens = self.result.usage.completion_tokens
        if self.ttft_ms is None or tokens < 2:
            return None
        return max(self.ms - self.ttft_ms, 0.0) / (tokens - 1)


def observe(call: Callable[[], RerankResult], device: str = "cpu") -> Observation:
    """Times one request on ``device``."""
    where = torch.device(device)
    _wait(where)
    start = time.perf_counter()
    result = call()
    _wait(where)
    return observation(1e3 * (time.perf_counter() - start), result)


def observation(ms: float, result: RerankResult) -> Observation:
    """What a request of ``ms`` that was timed elsewhere says of itself.

    ValueError when its stages take longer than all of it: then they were counted twice.
    """
    stages = {name: value for name, value in result.timings_ms.items() if name != "total"}
    other = ms - sum(stages.values())
    if other < -0.01 * ms - _CLOCK_MS:
        raise ValueError(f"stages of {sum(stages.values()):.1f} ms in a request of {ms:.1f} ms")
    stages["other"] = max(other, 0.0)
    return Observation(ms, result.first_token_ms, stages, result)


def work_id(*deciding: Any) -> str:
    """16 hex digits over everything that decides what is asked, given as JSON values."""
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]


def entry_of(
    name: str,
    subject: str,
    axes: Mapping[str, Any],
    work: str,
    observations: Sequence[Observation],
    *,
    warmup: int,
    engine: EngineInfo | None = None,
    memory_bytes_per_s: float | None = None,
    memory: Mapping[str, int] | None = None,
    gpu: Mapping[str, Any] | None = None,
    quality: Mapping[str, Any] | None = None,
    note: str = "",
) -> Entry:
    """An entry of the measured rounds, warm-up left out; ValueError for none.

    With ``engine`` and the rate at which the machine reads memory (see ``ceilings``) it says how
    far decoding is from the floor: the time it takes to read the weights and the KV once per step.
    """
    samples = [one.ms for one in observations]
    entry: Entry = {
        "name": name,
        "subject": subject,
        "axes": dict(axes),
        "work": work,
        "samples_ms": samples,
        "warmup": warmup,
        "latency_ms": latency_summary(samples),
        "stages_ms": _mean_stages(observations),
        "tokens": _mean_tokens([one.result for one in observations]),
    }
    first = [one.ttft_ms for one in observations if one.ttft_ms is not None]
    if first:
        entry["ttft_ms"] = latency_summary(first)
    between = [value for one in observations if (value := one.per_token_ms) is not None]
    if between:
        entry["per_token_ms"] = latency_summary(between)
    if engine is not None:
        entry["rates"] = decode_rates(observations, engine, memory_bytes_per_s)
    if memory:
        entry["memory"] = dict(memory)
    if gpu is not None:
        entry["gpu"] = dict(gpu)
    if quality:
        entry["quality"] = dict(quality)
    if note:
        entry["note"] = note
    return entry


def decode_rates(
    observations: Sequence[Observation], engine: EngineInfo, memory_bytes_per_s: float | None
) -> dict[str, float]:
    """Bytes that decoding had to read, how fast it did, and how near the machine's rate that is.

    Per step: the weights once, and keys and values of the prompt and of half the answer. Empty when
    nothing was decoded. Prompts read from several windows count the tokens of all of them, so the
    rate is for single prompts only and left out for others.
    """
    results = [one.result for one in observations]
    steps = sum(result.usage.decode_steps for result in results)
    seconds = sum(one.stages_ms.get("decode", 0.0) for one in observations) / 1e3
    if not steps or seconds <= 0 or any(result.plan.name != "single" for result in results):
        return {}
    kv_bytes = sum(
        result.usage.decode_steps
        * (result.usage.prompt_tokens + result.usage.completion_tokens / 2)
        * engine.token_kv_bytes
        for result in results
    )
    read = steps * engine.step_bytes + kv_bytes
    rates = {
        "bytes_per_step": read / steps,
        "step_ms": 1e3 * seconds / steps,
        "decode_bytes_per_s": read / seconds,
    }
    if memory_bytes_per_s:
        rates["floor_ms_per_step"] = 1e3 * read / steps / memory_bytes_per_s
        rates["memory_share"] = read / seconds / memory_bytes_per_s
    return rates


def _mean_stages(observations: Sequence[Observation]) -> dict[str, float]:
    names = dict.fromkeys(name for one in observations for name in one.stages_ms)
    count = len(observations)
    means = {name: sum(o.stages_ms.get(name, 0.0) for o in observations) / count for name in names}
    other = means.pop("other")
    return {**means, "other": other}


def _mean_tokens(results: Sequence[RerankResult]) -> dict[str, float]:
    count = len(results)
    return {
        "prompt": sum(r.usage.prompt_tokens for r in results) / count,
        "image": sum(r.usage.image_tokens for r in results) / count,
        "completion": sum(r.usage.completion_tokens for r in results) / count,
        "decode_steps": sum(r.usage.decode_steps for r in results) / count,
        "replayed": sum(r.cache.replayed_tokens for r in results) / count,
        "remembered": sum(r.cache.tokens_remembered for r in results) / count,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
