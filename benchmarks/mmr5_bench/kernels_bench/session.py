"""One run: every linear and every other operation in turn, each row written as it is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmr5_bench.evidence.ceilings import measure_ceilings
from mmr5_bench.evidence.document import Evidence, Skipped, new_evidence, write_evidence
from mmr5_bench.evidence.machine import describe_machine
from mmr5_bench.kernels_bench import ours
from mmr5_bench.kernels_bench.libraries.base import Library
from mmr5_bench.kernels_bench.libraries.every import every_library
from mmr5_bench.kernels_bench.linears import Linears, RunKernel
from mmr5_bench.kernels_bench.operands import FORMATS, TOLERANCES
from mmr5_bench.kernels_bench.other_ops import OTHER_OPS, other_tasks
from mmr5_bench.kernels_bench.shapes import OPS, Shapes, linear_shape, load_shapes, rows_of
from mmr5_bench.kernels_bench.tasks import Task
from mmr5_bench.kernels_bench.timing import (
    MOST_ROUNDS,
    Budget,
    BudgetSpentError,
    Stopwatch,
    last_cache_bytes,
)
from mmr5_bench.kernels_bench.triton_here import allow_interpreter, targets_of
from mmr5_bench.kernels_bench.verdict import keep_verdict
from mmr5_bench.kernels_bench.workload import (
    DTYPE_NAMES,
    Workload,
    best_ceilings,
    measure,
    usable_rates,
    with_floor,
)

_TINY_CACHE = 1 << 16  # a dry run makes few copies: what it measures says nothing
_TINY_ROUNDS = 5
_CEILING_SHARE = 100  # each ceiling takes this part of the budget, a second at most


@dataclass(frozen=True)
class KernelOptions:
    """What is timed: formats by name, M of the decoder's linears, and the seconds for all of it.

    ``shapes`` is ``7b``, ``mini`` or ``tiny``, which is a dry run. ``dtype`` is the compute dtype.
    ``ops`` limits the run to operations whose name begins with one of them. ``every`` times all
    kernels that can do something, not only those that an engine chooses, and ``libraries`` those of
    others; ``vllm`` is the file of vLLM's operators. ``interpret`` lets Triton's interpreter run
    our kernels on a CPU. ValueError for an unknown name and for a number that measures nothing.
    """

    shapes: str = "7b"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    formats: tuple[str, ...] = tuple(FORMATS)
    m: tuple[int, ...] = (1, 4, 8, 17, 256)
    seconds: float = 600.0
    ops: tuple[str, ...] = ()
    every: bool = True
    libraries: bool = True
    vllm: Path | None = None
    interpret: bool = False

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
        if self.interpret and self.shapes != "tiny":
            raise ValueError("--interpret is for --shapes tiny: interpreted kernels take seconds")
        known = [op.name for op in OPS] + list(OTHER_OPS)
        for start in self.ops:
            if not any(name.startswith(start) for name in known):
                raise ValueError(f"--op {start!r} is unknown; pass the start of {', '.join(known)}")

    @property
    def dry_run(self) -> bool:
        """Whether nothing that is measured means anything."""
        return self.shapes == "tiny"

    def wants(self, op: str) -> bool:
        """Whether this operation is part of the run."""
        return not self.ops or op.startswith(self.ops)


def run_kernels(
    options: KernelOptions,
    output: Path,
    *,
    run: RunKernel = ours.run_kernel,
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
    if options.interpret:
        allow_interpreter(device)
    evidence = new_evidence(_title(shapes, options), _NOTE, describe_machine(options.device))
    ceilings = _measure_ceilings(options)
    evidence["ceilings"], evidence["kernels"] = ceilings, []
    cache = _TINY_CACHE if options.dry_run else last_cache_bytes(device)
    targets = targets_of(device, options.dtype, interpret=options.interpret)
    linears = Linears(shapes, device, options.dtype, cache, targets, run)
    tasks = list(_plan(options, shapes, linears, evidence))
    write_evidence(evidence, output)
    watch = Stopwatch(device, graphs=True)
    rounds = _TINY_ROUNDS if options.dry_run else MOST_ROUNDS
    rounds = 1 if options.interpret else rounds
    for done, task in enumerate(tasks, start=1):
        share = budget if options.interpret else budget.share(len(tasks) - done + 1)
        timed = partial(_measured, ceilings, watch, share, rounds)
        row = _timed(task, evidence, budget, timed)
        write_evidence(evidence, output)
        progress(done, len(tasks), row)
    ceilings = evidence["ceilings"] = best_ceilings(ceilings, _measure_ceilings(options))
    evidence["kernels"] = [
        with_floor(row, ceilings) if row["status"] == "ok" else row for row in evidence["kernels"]
    ]
    evidence["verdict"] = keep_verdict(evidence["kernels"], dry_run=options.dry_run)
    write_evidence(evidence, output)
    return evidence


def _measured(
    ceilings: dict[str, Any], watch: Stopwatch, share: Budget, rounds: int, workload: Workload
) -> dict[str, Any]:
    return measure(workload, ceilings, watch, share, most_rounds=rounds)


def _timed(
    task: Task, evidence: Evidence, budget: Budget, timed: Callable[[Workload], dict[str, Any]]
) -> dict[str, Any] | None:
    """The row of ``task``, which is kept in ``evidence``; None where it was skipped."""
    try:
        if budget.left <= 0:
            raise BudgetSpentError("the time of the whole run was over; give more seconds")
        row = timed(task.make())  # drawing a weight takes longer than most rows
    except (ValueError, torch.OutOfMemoryError) as error:
        _skip(evidence, task, str(error))
        return None
    except Exception as error:  # a kernel that cannot be compiled, a library that refuses
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        if task.peer:
            _skip(evidence, task, reason)
            return None
        row = {**task.row, "status": "failed", "reason": reason}
    evidence["kernels"].append(row)
    return row


def _skip(evidence: Evidence, task: Task, reason: str) -> None:
    """Once per reason for a library that refuses everything."""
    entry: Skipped = {"subject": task.peer or task.subject, "reason": reason}
    if entry not in evidence["skipped"]:
        evidence["skipped"].append(entry)


def _measure_ceilings(options: KernelOptions) -> dict[str, Any]:
    formats = [FORMATS[name] for name in options.formats]
    names = [
        usable_rates(options.dtype, format.activations if format else None) for format in formats
    ]
    return measure_ceilings(
        options.device,
        sorted({"bfloat16", "float32"} | {name for some in names for name in some}),
        seconds=min(1.0, options.seconds / _CEILING_SHARE),
        dry_run=options.dry_run,
    )


_NOTE = (
    "Single operations with random operands: how fast a kernel is, not how fast a model answers. "
    "ms and p95_ms are of one call on weights that are not in a cache (where cold is true); method "
    "says by what they were timed: a CUDA graph of launches, events around launches, or the host's "
    "clock. dense_ms is a product in the compute dtype of the same run, alternating, ratio is ms "
    "over dense_ms. floor_memory_ms is bytes over the measured memory rate, floor_compute_ms flops "
    "over the measured matmul rate, both the best of before and after; floor_ms is the larger, and "
    "share is floor_ms over ms, which can exceed 1 where weights were cached or the machine was "
    "busier during the ceilings; copy_share is the bytes per second of a row over those of a copy. "
    "Errors are relative to the plain reference: max_error to its largest output, rms_error by "
    "mean square; a row that exceeds what is allowed is failed and not timed (a kernel called "
    "..._reference is that reference, so its error shows no more than that it is called rightly). "
    "origin is ours or library; chosen is what an engine uses by default. The shape of attention "
    "is new tokens, all tokens, heads x dimension; its dense is torch's own attention."
)


def _title(shapes: Shapes, options: KernelOptions) -> str:
    names = {"7b": "Qwen2.5-VL-7B shapes", "mini": "mini's shapes", "tiny": "dry run, no figures"}
    return f"Kernels on {options.device} in {DTYPE_NAMES[options.dtype]}: {names[shapes.name]}"


def _plan(
    options: KernelOptions, shapes: Shapes, linears: Linears, evidence: Evidence
) -> Iterator[Task]:
    """Every row that can be, in an order that makes each weight once; others go to ``skipped``."""
    libraries = every_library(options.vllm) if options.libraries else ()
    others = other_tasks(
        shapes,
        linears.device,
        options.dtype,
        linears.cache_bytes,
        options.wants,
        interpret=options.interpret,
    )
    for number, name in enumerate(options.formats):
        for op in OPS:
            if not options.wants(op.name):
                continue
            try:
                linear_shape(shapes.spec, op, FORMATS[name])
            except ValueError as error:
                subject = f"{op.name.partition('.')[0]} {name}"
                entry: Skipped = {"subject": subject, "reason": str(error)}
                if entry not in evidence["skipped"]:  # once for all linears of a tower
                    evidence["skipped"].append(entry)
                continue
            for m in rows_of(shapes, op, options.m):
                yield from _linear_tasks(options, linears, op, name, m, libraries)
        if not number:  # behind the format that is asked for first, before all others
            yield from others


def _linear_tasks(
    options: KernelOptions,
    linears: Linears,
    op: Any,
    format_name: str,
    m: int,
    libraries: tuple[Library, ...],
) -> Iterator[Task]:
    row = {"op": op.name, "format": format_name, "shape": [m]}
    subject = f"{op.name} {format_name} M={m}"
    try:
        names = linears.kernels(op, format_name, m)
    except ValueError as error:
        reason = str(error)

        def refuse() -> Any:
            raise ValueError(reason)

        yield Task(subject, refuse, row)
        return
    for name in names if options.every else names[:1]:
        make = partial(linears.workload, op, format_name, m, name)
        yield Task(subject, make, {**row, "kernel": name, "origin": "ours"})
    for library in libraries:
        if library.serves(FORMATS[format_name]):
            make = partial(linears.peer_workload, op, format_name, m, library)
            known = {**row, "kernel": library.name, "origin": "library"}
            yield Task(subject, make, known, library.name)
