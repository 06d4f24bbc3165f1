"""One run: every linear and attention in turn, each row written as soon as it is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmr5_bench.evidence.ceilings import measure_ceilings
from mmr5_bench.evidence.document import Evidence, Skipped, new_evidence, write_evidence
from mmr5_bench.evidence.machine import describe_machine
from mmr5_bench.kernels_bench.attention import attention_sizes, attention_workload
from mmr5_bench.kernels_bench.linears import Linears, RunLinear
from mmr5_bench.kernels_bench.operands import FORMATS, TOLERANCES
from mmr5_bench.kernels_bench.shapes import OPS, Shapes, linear_shape, load_shapes, rows_of
from mmr5_bench.kernels_bench.timing import (
    MOST_ROUNDS,
    Budget,
    BudgetSpentError,
    Stopwatch,
    last_cache_bytes,
)
from mmr5_bench.kernels_bench.workload import (
    DTYPE_NAMES,
    Workload,
    best_ceilings,
    measure,
    usable_rates,
    with_floor,
)
from mmr5_kernels import dispatch

_TINY_CACHE = 1 << 16  # a dry run makes few copies: what it measures says nothing
_TINY_ROUNDS = 5
_CEILING_SHARE = 100  # each ceiling takes this part of the budget, a second at most


@dataclass(frozen=True)
class KernelOptions:
    """What is timed: formats by name, M of the decoder's linears, and the seconds for all of it.

    ``shapes`` is ``7b``, ``mini`` or ``tiny``, which is a dry run. ``dtype`` is the compute dtype.
    ``ops`` limits the run to operations whose name begins with one of them.
    ValueError for an unknown name and for a number that measures nothing.
    """

    shapes: str = "7b"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    formats: tuple[str, ...] = tuple(FORMATS)
    m: tuple[int, ...] = (1, 4, 8, 17, 256)
    seconds: float = 600.0
    ops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.formats:
            if name not in FORMATS:
                raise ValueError(f"--format {name!r} is unknown; pass {', '.join(FORMATS)}")
        if not self.formats or not self.m or min(self.m) < 1:
            raise ValueError("--format and --m need a value each, and rows count from 1")
        if self.seconds <= 0:
            raise ValueError(f"--seconds {self.seconds:g} leaves no time; give more than 0")
        if self.dtype not in TOLERANCES:
            raise ValueError(f"--dtype {self.dtype} is not computed in; pass bfloat16 or float32")
        known = [op.name for op in OPS] + ["attention.decode", "attention.prefill"]
        for start in self.ops:
            if not any(name.startswith(start) for name in known):
                raise ValueError(f"--op {start!r} is unknown; pass the start of {', '.join(known)}")

    def wants(self, op: str) -> bool:
        """Whether this operation is part of the run."""
        return not self.ops or op.startswith(self.ops)


@dataclass(frozen=True)
class _Task:
    """A row to be: what it is called when it is skipped, and how its operands are made."""

    subject: str
    make: Callable[[], Workload]


def run_kernels(
    options: KernelOptions,
    output: Path,
    *,
    run: RunLinear = dispatch.run,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[int, int, dict[str, Any] | None], None] = lambda done, total, row: None,
) -> Evidence:
    """Times everything ``options`` names and returns what stands in ``output``.

    The file is written anew after every row, so that an interrupted run keeps them. Ceilings are
    measured before, and again after, which comes on top of the budget by some seconds at most.
    ``run`` is the linear under test, ``clock`` counts seconds for the budget, ``progress`` is told
    rows done, rows planned and the new row, None for one that was skipped.
    """
    shapes, device = load_shapes(options.shapes), torch.device(options.device)
    budget = Budget(clock() + options.seconds, clock)
    dry_run = shapes.name == "tiny"
    evidence = new_evidence(_title(shapes, options), _NOTE, describe_machine(options.device))
    ceilings = _measure_ceilings(options)
    evidence["ceilings"], evidence["kernels"] = ceilings, []
    cache = _TINY_CACHE if dry_run else last_cache_bytes(device)
    linears = Linears(shapes, device, options.dtype, cache, run)
    tasks = list(_plan(options, shapes, linears, evidence))
    write_evidence(evidence, output)
    for done, task in enumerate(tasks, start=1):
        row = None
        try:
            if budget.left <= 0:
                raise BudgetSpentError("the time of the whole run was over; give more seconds")
            workload = task.make()  # drawing a weight takes longer than most rows
            row = measure(
                workload,
                ceilings,
                Stopwatch(device),
                budget.share(len(tasks) - done + 1),
                most_rounds=_TINY_ROUNDS if dry_run else MOST_ROUNDS,
            )
            evidence["kernels"].append(row)
        except (ValueError, torch.OutOfMemoryError) as error:
            evidence["skipped"].append({"subject": task.subject, "reason": str(error)})
        write_evidence(evidence, output)
        progress(done, len(tasks), row)
    ceilings = evidence["ceilings"] = best_ceilings(ceilings, _measure_ceilings(options))
    evidence["kernels"] = [
        with_floor(row, ceilings) if row["status"] == "ok" else row for row in evidence["kernels"]
    ]
    write_evidence(evidence, output)
    return evidence


def _measure_ceilings(options: KernelOptions) -> dict[str, Any]:
    formats = [FORMATS[name] for name in options.formats]
    names = [
        usable_rates(options.dtype, format.activations if format else None) for format in formats
    ]
    return measure_ceilings(
        options.device,
        sorted({name for some in names for name in some}),
        seconds=min(1.0, options.seconds / _CEILING_SHARE),
        dry_run=options.shapes == "tiny",
    )


_NOTE = (
    "Single operations with random operands: how fast a kernel is, not how fast a model answers. "
    "ms and p95_ms are of one call on weights that are not in a cache (where cold is true); "
    "dense_ms is a product in the compute dtype of the same run, alternating, ratio is ms over "
    "dense_ms. floor_ms is the larger of bytes over the measured memory rate and flops over the "
    "measured matmul rate, both the best of before and after; share is floor_ms over ms and can "
    "exceed 1 where weights were cached or the machine was busier during those. Errors are "
    "relative to the plain reference: max_error to its largest output, rms_error by mean square; a "
    "row that exceeds what is allowed is failed and not timed (a kernel called ..._reference is "
    "that reference, so its error shows no more than that it is called rightly). The shape of "
    "attention is new tokens, all tokens, heads x dimension; its dense is the same torch kernel "
    "with keys repeated for every head."
)


def _title(shapes: Shapes, options: KernelOptions) -> str:
    names = {"7b": "Qwen2.5-VL-7B shapes", "mini": "mini's shapes", "tiny": "dry run, no figures"}
    return f"Kernels on {options.device} in {DTYPE_NAMES[options.dtype]}: {names[shapes.name]}"


def _plan(
    options: KernelOptions, shapes: Shapes, linears: Linears, evidence: Evidence
) -> Iterator[_Task]:
    """Every row that can be, in an order that makes each weight once; others go to ``skipped``."""
    for op in OPS:
        for name in options.formats if options.wants(op.name) else ():
            try:
                linear_shape(shapes.spec, op, FORMATS[name])
            except ValueError as error:
                subject = f"{op.name.partition('.')[0]} {name}"
                entry: Skipped = {"subject": subject, "reason": str(error)}
                if entry not in evidence["skipped"]:  # once for all linears of a tower
                    evidence["skipped"].append(entry)
                continue
            for m in rows_of(shapes, op, options.m):
                yield _Task(f"{op.name} {name} M={m}", partial(linears.workload, op, name, m))
    for tokens, cached in attention_sizes(shapes):
        name = "attention.decode" if tokens == 1 else "attention.prefill"
        if options.wants(name):
            make = partial(
                attention_workload,
                shapes,
                tokens,
                cached,
                options.dtype,
                linears.device,
                linears.cache_bytes,
            )
            yield _Task(f"{name} T={tokens} S={cached}", make)


def kernels_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text in columns, for people."""
    head = ("op", "format", "kernel", "M x N x K", "ms", "dense", "ratio", "floor", "share", "off")
    lines = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 4 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    shape = " x ".join(str(size) for size in row["shape"])
    named = (row["op"], row["format"], row["kernel"], shape)
    error = "wrong" if row["max_error"] is None else f"{row['max_error']:.1e}"
    if row["status"] != "ok":
        return (*named, "failed", "", "", "", "", error)
    return (
        *named,
        f"{row['ms']['value']:.3f}",
        f"{row['dense_ms']['value']:.3f}",
        f"{row['ratio']['value']:.2f}",
        f"{row['floor_ms']:.3f}",
        f"{row['share']:.0%}",
        error,
    )
