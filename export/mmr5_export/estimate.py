"""What an export will need, worked out before its first byte: disk, memory and, roughly, time.

Memory is the largest of the stages, since each frees what the one before held:

=========== ====================================================================================
writing     the largest tensor, as it is and as it is stored
answering   the whole model, to write the calibration answers (skipped when they are known)
embedding   vision tower and embedding table
layer       one layer in the compute dtype and in fp32, the statistics of its inputs, and GPTQ's
            working copies of the largest linear and of its Hessian
verifying   the engine itself
=========== ====================================================================================

Times come from the speed of one matrix product and one copy on the device, measured on the spot.
They are right to a factor, not to a minute, and say so.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from mmr5_export.layer_pass import GROUPS, group_linears
from mmr5_runtime.spec import ModelSpec, decoder_linear_shapes, tensor_shapes
from mmr5_runtime.types import ExportError

_OVERHEAD = 512 << 20  # interpreter, torch, one sample's activations at small sizes
_ACTIVATION_COPIES = 6  # of [T, widest] that are alive inside one layer
_GPTQ_HESSIANS = 3  # the statistics, the damped working copy, and one more while permuting
_GPTQ_WEIGHTS = 5  # fp32 weight, working weight, codes and the error of a block, of one linear


class ResourceError(ExportError):
    """Memory or disk is too small for the export."""


@dataclass(frozen=True)
class Workload:
    """How much there is to run: prompts and their tokens (answers included), and answer tokens.

    ``longest`` is the longest prompt with its answer. ``to_answer`` answer tokens are still to be
    decoded. ``gptq`` and ``awq`` say whether any linear uses the method, ``verify`` whether the
    engine is run at the end.
    """

    prompts: int
    tokens: int
    longest: int
    to_answer: int
    gptq: bool
    awq: bool
    verify: bool


@dataclass(frozen=True)
class Needs:
    """Peak bytes by stage, bytes on disk beside the engine while working, and rough seconds."""

    memory: Mapping[str, int]
    spill_bytes: int
    seconds: float

    @property
    def peak(self) -> int:
        return max(self.memory.values())


def estimate(
    spec: ModelSpec,
    work: Workload,
    engine_bytes: int,
    answering_bytes: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Needs:
    """What the export of a model needs on ``device`` when it computes in ``dtype``.

    ``engine_bytes`` is what the engine takes when it is loaded, ``answering_bytes`` the model that
    writes the answers. Measures the device for about half a second.
    """
    size, text = dtype.itemsize, spec.text
    shapes = tensor_shapes(spec)
    vision = sum(prod(s) for name, s in shapes.items() if name.startswith("visual."))
    table = text.vocab_size * text.hidden_size
    layer = sum(prod(s) for name, s in shapes.items() if name.startswith("model.layers.0."))
    linears = {n: s for n, s in decoder_linear_shapes(spec).items() if ".layers.0." in n}
    columns = [linears[group_linears(0, group)[0]][1] for group in GROUPS]
    widest = max(max(s) for s in linears.values())
    hessians = 4 * sum(k * k for k in columns)
    working = 4 * (_GPTQ_HESSIANS - 1) * max(columns) ** 2 + 4 * _GPTQ_WEIGHTS * max(
        prod(s) for s in linears.values()
    )
    activations = _ACTIVATION_COPIES * work.longest * widest * 4
    cache = 2 * work.longest * text.num_layers * text.kv_size * size
    largest = max(prod(shape) for shape in shapes.values())
    memory = {"writing": 2 * 2 * largest + _OVERHEAD}
    if work.verify:
        memory["verifying"] = engine_bytes + cache + activations + _OVERHEAD
        memory["verifying"] += table * size  # the original's head, to compare with
    if work.prompts:
        memory["embedding"] = (vision + table) * size + activations + _OVERHEAD
        memory["layer"] = layer * (size + 4) + hessians + working + activations + _OVERHEAD
    if work.to_answer:
        memory["answering"] = answering_bytes + cache + activations + _OVERHEAD
    flops = 2 * 2 * work.tokens * layer * text.num_layers  # observed once, passed on once
    flops += 2 * work.tokens * sum(k * k for k in columns) * text.num_layers
    if work.gptq:
        each = sum(4 / 3 * k**3 + n * k * k for n, k in linears.values())
        flops += int(each) * text.num_layers
    if work.awq:
        flops += 20 * 2 * sum(n * k * k for n, k in linears.values()) * text.num_layers
    flops_per_second, bytes_per_second = _speed(dtype, device)
    seconds = flops / flops_per_second + work.to_answer * answering_bytes / bytes_per_second
    if work.to_answer:
        seconds += 2 * work.tokens * layer * text.num_layers / flops_per_second
    return Needs(memory, 2 * work.tokens * text.hidden_size * size, seconds)


def available_memory(device: torch.device) -> int | None:
    """Free bytes on ``device``; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _reclaimable()
    except (ValueError, OSError):
        return None


def check_memory(needs: Needs, device: torch.device, available: int | None = None) -> None:
    """Raises :class:`ResourceError` naming the stage that does not fit on ``device``.

    ``available`` replaces the free bytes found.
    """
    available = available_memory(device) if available is None else available
    if available is None or needs.peak <= available:
        return
    stage = max(needs.memory, key=lambda name: needs.memory[name])
    remedies = {
        "answering": "give the answers in the calibration data, or use a larger device",
        "verifying": "pass --no-verify, or use a larger device",
        "writing": "free some memory, or use a larger machine",
    }
    remedy = remedies.get(stage, "pass fewer or smaller pages, or use a larger device")
    raise ResourceError(
        f"the {stage} stage needs about {needs.memory[stage] / 1e9:.1f} GB on {device} but "
        f"{available / 1e9:.1f} GB are free; {remedy}."
    )


def check_disk(folder: Path, needed: int, free: int | None = None) -> None:
    """Raises :class:`ResourceError` unless ``needed`` bytes fit on the disk of ``folder``.

    ``free`` replaces the free bytes found.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free if free is None else free
    if free < needed:
        raise ResourceError(
            f"the export needs {gigabytes(needed)} but the disk of {folder} has "
            f"{gigabytes(free)} free; make room or choose another --output."
        )


def gigabytes(size: int) -> str:
    """A size for people: GB, or MB when small."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _reclaimable() -> int:
    """Bytes of page cache the system would give back, which "available pages" leaves out."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = dict(line.split(":", 1) for line in lines)
        kilobytes = {key: int(found[key].split()[0]) for key in ("MemAvailable", "MemFree")}
    except (OSError, KeyError, ValueError):
        return 0
    return max(0, kilobytes["MemAvailable"] - kilobytes["MemFree"]) << 10


def _speed(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Multiply-adds (as two operations) and bytes copied per second."""
    side = 4096 if device.type == "cuda" else 768
    square = torch.ones(side, side, dtype=dtype, device=device)
    product = _timed(lambda: square @ square, device)
    large = torch.ones(
        (256 if device.type == "cuda" else 64) << 20, dtype=torch.int8, device=device
    )
    copy = _timed(lambda: large.clone(), device)
    return 2 * side**3 / product, 2 * large.nbytes / copy


def _timed(run: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(4):  # the first one warms up, and is never the best
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
