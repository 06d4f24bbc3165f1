"""Evidence as a run would have written it, made up from a seed: for tests of reports and compares.

Figures are invented; nothing here was measured.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from typing import Any

from mmr5_bench.evidence.document import KIND, SCHEMA, Entry, Evidence
from mmr5_bench.evidence.statistics import Interval, latency_summary

MACHINE = {
    "id": "00112233445566aa",
    "host_cpu": "Imaginary 9000",
    "cores": 2,
    "threads": 1,
    "instructions": "AVX2",
    "gpu": None,
    "driver": None,
    "cuda": None,
    "torch": "2.13.0",
    "python": "3.11.9",
    "os": "Linux 6.1",
}
# Of a request: how its time is shared between stages, with nothing kept.
STAGES = {
    "load_pages": 0.01,
    "image_decode": 0.06,
    "preprocess": 0.05,
    "vision": 0.28,
    "kv_load": 0.002,
    "prefill": 0.24,
    "kv_save": 0.003,
    "decode": 0.33,
    "parse": 0.001,
    "other": 0.024,
}
SUBJECTS = {
    "ours int4": (1.0, 0.948),
    "ours int8": (1.12, 0.950),
    "ours bf16": (1.4, 0.949),
    "transformers float32": (3.1, 0.949),
}


def make_entry(name: str, subject: str, samples_ms: Sequence[float], **more: Any) -> Entry:
    """A whole entry of given times; work follows from the name unless it is given."""
    entry: dict[str, Any] = {
        "name": name,
        "subject": subject,
        "axes": {},
        "work": hashlib.sha256(name.encode()).hexdigest()[:16],
        "samples_ms": list(samples_ms),
        "latency_ms": latency_summary(samples_ms, resamples=200),
    }
    return {**entry, **more}  # type: ignore[typeddict-item]


def make_evidence(entries: Sequence[Entry], **more: Any) -> Evidence:
    """A document of ``entries`` on the imaginary machine."""
    evidence: dict[str, Any] = {
        "kind": KIND,
        "schema": SCHEMA,
        "title": "Mini on held-out synthetic lists",
        "note": "Mini, a checkpoint of 4.5 M parameters, on a CPU. These figures say nothing "
        "about MM-R5.",
        "created": "2026-01-31T12:00:00+00:00",
        "machine": MACHINE,
        "provenance": {"commit": "abc1234", "command": "mmr5-bench latency", "torch": "2.13.0"},
        "entries": list(entries),
        "skipped": [],
    }
    return {**evidence, **more}  # type: ignore[typeddict-item]


def noisy_rounds(
    bases: Sequence[float], generator: random.Random, *, outliers: float = 0.04
) -> list[float]:
    """Times about ``bases`` in ms: 5 % noise, and now and then one that took half as long again."""
    return [
        base * math.exp(generator.gauss(0, 0.05)) * (1.5 if generator.random() < outliers else 1)
        for base in bases
    ]


def realistic_run(seed: int = 0, *, rounds: int = 20, slower: float = 1.0) -> Evidence:
    """Four subjects, two list sizes, cold and warm, with stages, rates and quality.

    ``seed`` draws the noise only: runs of different seeds have the same lists. ``slower``
    multiplies every time.
    """
    generator = random.Random(seed)
    entries = []
    for pages in (5, 10):
        for cache in ("cold", "warm"):
            lists = random.Random(f"{pages}")
            bases = [18.0 * pages * lists.uniform(0.7, 1.5) for _ in range(rounds)]
            name = f"rerank[pages={pages},cache={cache},stop=determined]"
            for subject, (factor, recall) in SUBJECTS.items():
                if cache == "warm" and not subject.startswith("ours"):
                    continue
                scale = slower * factor * (0.55 if cache == "warm" else 1.0)
                samples = noisy_rounds([base * scale for base in bases], generator)
                quality = _quality(recall - (0.02 if pages == 10 else 0.0))
                entries.append(
                    _entry_of(name, subject, {"pages": pages, "cache": cache}, samples, quality)
                )
    reason = "needs a CUDA device; run it on a machine that has one"
    return make_evidence(
        entries,
        skipped=[{"subject": "vllm bfloat16", "reason": reason}],
        ceilings={"copy_bytes_per_s": 1.2e10, "matmul_flops": {"float32": 8e10}},
        kernels=[_kernel("int4", 1, 0.71), _kernel("int4", 64, 0.42), _kernel("int8", 1, 0.83)],
    )


def interval(value: float, reach: float) -> Interval:
    """``value`` with as much on both sides."""
    return {"value": value, "low": value - reach, "high": value + reach}


def _entry_of(
    name: str, subject: str, axes: dict[str, Any], samples: list[float], quality: dict[str, Any]
) -> Entry:
    mean = math.fsum(samples) / len(samples)
    more: dict[str, Any] = {
        "axes": {**axes, "workload": "minidocs", "stop": "determined", "think": "full"},
        "warmup": 2,
        "quality": quality,
    }
    if subject.startswith("ours"):
        warm = axes["cache"] == "warm"
        shares = {k: (0.0 if warm and k == "vision" else v) for k, v in STAGES.items()}
        total = math.fsum(shares.values())
        more["stages_ms"] = {k: mean * v / total for k, v in shares.items()}
        more["tokens"] = {"prompt": 412.0, "image": 240.0, "completion": 31.5, "decode_steps": 28.0}
        more["ttft_ms"] = latency_summary([0.6 * s for s in samples], resamples=200)
        more["per_token_ms"] = latency_summary([0.012 * s for s in samples], resamples=200)
        share = {"ours int4": 0.37, "ours int8": 0.52, "ours bf16": 0.71}[subject]
        more["rates"] = {
            "memory_share": share,
            "step_ms": 0.0118 * mean,
            "floor_ms_per_step": 0.0118 * mean * share,
        }
        more["memory"] = {"peak_rss_bytes": 612_000_000}
    return make_entry(name, subject, samples, **more)


def _quality(recall: float) -> dict[str, Any]:
    return {
        "cases": 300,
        "recall@1": interval(recall, 0.02),
        "recall@3": interval(min(recall + 0.028, 0.985), 0.012),
        "recall@5": interval(min(recall + 0.036, 0.99), 0.008),
        "macro_recall@1": interval(recall - 0.01, 0.025),
        "ndcg@5": interval(recall + 0.01, 0.015),
        "mrr": interval(recall + 0.015, 0.015),
        "kendall_tau": interval(0.97, 0.01),
        "top1_agreement": interval(0.98, 0.012),
        "ok": interval(0.98, 0.01),
        "repaired": interval(0.015, 0.01),
        "fallback": interval(0.005, 0.005),
    }


def _kernel(name: str, rows: int, share: float) -> dict[str, Any]:
    floor = 0.02 * rows**0.5
    return {
        "op": "gate_up",
        "format": name,
        "kernel": "cpu",
        "shape": [rows, 1024, 256],
        "ms": interval(floor / share, 0.05 * floor),
        "floor_ms": floor,
        "share": share,
        "dense_ms": interval(1.9 * floor / share, 0.1 * floor),
        "ratio": interval(0.53, 0.03),
    }
