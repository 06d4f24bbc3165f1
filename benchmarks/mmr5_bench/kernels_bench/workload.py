"""Something to time: its calls, those of what it is compared with, and the least it has to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mmr5_bench.evidence.statistics import latency_summary, ratio_interval
from mmr5_bench.kernels_bench.operands import TOLERANCES, Deviation
from mmr5_bench.kernels_bench.timing import Budget, Call, Stopwatch, alternate

Origin = Literal["ours", "library"]
DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


@dataclass(frozen=True)
class Workload:
    """One row of the result.

    ``shape`` is M, N, K of a linear; of attention new tokens, all tokens, and H * D. ``calls`` and
    ``dense`` do the same work, one call per copy of what they read. ``nbytes`` is the least that
    goes through memory: what is stored and read, the input and the output, each once. ``flops``
    counts a multiply-add as two. ``rates`` names the ceilings whose fastest bounds the arithmetic.
    ``cold`` says whether the copies together are larger than the last cache. ``origin`` is ``ours``
    or ``library``; ``chosen`` says whether the engine would take this kernel for this size.
    ``allowed`` is how far it may be from the reference, by dtype unless given.
    """

    op: str
    format: str
    kernel: str
    dtype: torch.dtype
    shape: tuple[int, int, int]
    calls: Sequence[Call]
    dense: Sequence[Call]
    nbytes: int
    flops: int
    rates: tuple[str, ...]
    cold: bool
    error: Deviation
    origin: Origin = "ours"
    chosen: bool = True
    allowed: Deviation | None = None

    @property
    def tolerance(self) -> Deviation:
        """The largest deviation of a right kernel."""
        return self.allowed or TOLERANCES[self.dtype]

    @property
    def is_right(self) -> bool:
        """Whether outputs are as near to the reference as they have to be."""
        allowed = self.tolerance
        return self.error.largest <= allowed.largest and self.error.rms <= allowed.rms

    def row(self) -> dict[str, Any]:
        """What is known before anything is timed."""
        finite = self.error.largest < float("inf")
        return {
            "op": self.op,
            "format": self.format,
            "kernel": self.kernel,
            "origin": self.origin,
            "chosen": self.chosen,
            "dtype": DTYPE_NAMES[self.dtype],
            "shape": list(self.shape),
            "bytes": self.nbytes,
            "flops": self.flops,
            "rates": list(self.rates),
            "max_error": self.error.largest if finite else None,
            "rms_error": self.error.rms if finite else None,
        }


def usable_rates(dtype: torch.dtype, activations: str | None) -> tuple[str, ...]:
    """Ceilings a kernel may come near to: of its codes, of ``dtype``, and of fp32.

    The last because a kernel may widen its operands: without bf16 instructions torch's own product
    in bf16 is slower than one in fp32, and no bound for anything.
    """
    names = [activations, DTYPE_NAMES[dtype], "float32"]
    return tuple(dict.fromkeys(name for name in names if name))


def floors_ms(
    nbytes: int, flops: int, rates: Sequence[str], ceilings: dict[str, Any]
) -> dict[str, float]:
    """Least time by "memory" and by "compute" at the measured ceilings, in ms.

    ``ceilings`` is from :func:`mmr5_bench.evidence.ceilings.measure_ceilings`. ValueError when it
    has none of ``rates``.
    """
    reached = [ceilings["matmul_flops"][rate] for rate in rates if rate in ceilings["matmul_flops"]]
    if not reached:
        raise ValueError(f"no matmul ceiling of {' or '.join(rates)} was measured; measure one")
    return {
        "memory": 1e3 * nbytes / ceilings["memory_bytes_per_s"],
        "compute": 1e3 * flops / max(reached),
    }


def floor_ms(
    nbytes: int, flops: int, rates: Sequence[str], ceilings: dict[str, Any]
) -> tuple[float, str]:
    """The larger of :func:`floors_ms`, and its name."""
    floors = floors_ms(nbytes, flops, rates, ceilings)
    bound = max(floors, key=lambda name: floors[name])
    return floors[bound], bound


def measure(
    workload: Workload,
    ceilings: dict[str, Any],
    watch: Stopwatch,
    budget: Budget,
    *,
    most_rounds: int,
) -> dict[str, Any]:
    """The finished row; one that computes something wrong is marked ``failed`` and not timed.

    Raises :class:`~mmr5_bench.kernels_bench.timing.BudgetSpentError`.
    """
    row = workload.row()
    if not workload.is_right:
        allowed = workload.tolerance
        reason = (
            f"differs from the reference by {workload.error.largest:.2g} of its largest output "
            f"and {workload.error.rms:.2g} by mean square; {allowed.largest:g} and "
            f"{allowed.rms:g} are allowed"
        )
        return {**row, "status": "failed", "reason": reason}
    samples = alternate(
        {"ours": workload.calls, "dense": workload.dense}, watch, budget, most_rounds=most_rounds
    )
    mine, theirs = samples["ours"].ms, samples["dense"].ms
    ours, dense = latency_summary(mine), latency_summary(theirs)
    row |= {
        "status": "ok",
        "rounds": len(mine),
        "cold": workload.cold,
        "method": samples["ours"].method,
        "timing_note": samples["ours"].note,
        "ms": ours["p50"],
        "p95_ms": ours["p95"],
        "dense_ms": dense["p50"],
        "ratio": ratio_interval(theirs, mine, "p50", paired=False),
    }
    if watch.device.type == "cuda":
        again = watch.hot(workload.calls[0])
        hot = [again.sample(number) for number in range(min(10, most_rounds))]
        row["hot_ms"] = latency_summary(hot)["p50"]
    return with_floor(row, ceilings)


def with_floor(row: dict[str, Any], ceilings: dict[str, Any]) -> dict[str, Any]:
    """A timed row held against ``ceilings``.

    ``floor_ms`` is the larger of ``floor_memory_ms`` and ``floor_compute_ms``, ``bound`` its name,
    ``share`` floor over median. ``copy_share`` is how fast the row's bytes went by, over how fast a
    copy moves bytes.
    """
    floors = floors_ms(row["bytes"], row["flops"], row["rates"], ceilings)
    bound = max(floors, key=lambda name: floors[name])
    ms = row["ms"]["value"]
    copied = ceilings.get("copy_bytes_per_s", ceilings["memory_bytes_per_s"])
    return {
        **row,
        **{f"floor_{name}_ms": value for name, value in floors.items()},
        "floor_ms": floors[bound],
        "bound": bound,
        "share": floors[bound] / ms,
        "copy_share": 1e3 * row["bytes"] / ms / copied,
    }


def best_ceilings(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The faster of two measurements, rate by rate: what else runs only ever hides a capability."""
    names = dict.fromkeys((*before["matmul_flops"], *after["matmul_flops"]))
    flops = {
        name: max(found["matmul_flops"].get(name, 0.0) for found in (before, after))
        for name in names
    }
    rates = {name: max(before[name], after[name]) for name in before if name.endswith("_per_s")}
    return {**before, **rates, "matmul_flops": flops}
