"""What an export will need, worked out before its first byte: disk, memory and, roughly, time.

Memory is the largest of the stages, since each frees what the one before held:

=========== ====================================================================================
writing     the largest tensor, as it is and as it is stored
answering   the whole model, to write the calibration answers (skipped when they are known)
embedding   vision tower and embedding table
layer       one layer in the compute dtype and in fp32, the statistics of its inputs, and GPTQ's
            working copies of the largest linear and of its Hessian
verifying   the engine, the original's head, and the logits of both along one answer
(graphs)    the same with ONNX Runtime, which folds constants as it loads and keeps its own copies
(backends)  a few copies of the largest tensor, in each layout that is written; what compiles
            takes a multiple of the weights
=========== ====================================================================================

On a GPU every stage is counted twice: what lies there, and what main memory holds meanwhile.

Times come from the speed of one matrix product and one copy on the device, measured on the spot.
They are right to a factor, not to a minute, and say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import torch

from mmr5_export.layer_pass import GROUPS, group_linears
from mmr5_export.machine import Speed, available_memory, free_disk, main_memory
from mmr5_export.mixed import layer_groups
from mmr5_kernels.layout import Format
from mmr5_runtime.spec import (
    ModelSpec,
    decoder_linear_shapes,
    linear_shapes,
    stored_tensors,
    tensor_shapes,
)
from mmr5_runtime.types import ExportError

_OVERHEAD = 512 << 20  # interpreter, torch, one sample's activations at small sizes
_CUDA_OVERHEAD = 2 << 30  # what torch's CUDA libraries take of main memory
_SOURCE_BYTES = 4  # of a value in a checkpoint, at most
_ACTIVATION_COPIES = 6  # of [T, widest] that are alive inside one layer
_GPTQ_HESSIANS = 3  # the statistics, the damped working copy, and one for a GPU's factorization
_GPTQ_WEIGHTS = 5  # fp32 weight, working weight, codes and the error of a block, of one linear
_LOGITS = 3  # [R, V] fp32: the engine's, the original's, and one being put together
# Bytes that ONNX Runtime takes per stored byte of a quantized linear while it loads: its constants
# are folded, then packed for its kernels. For a whole 7B at most 9.9 GB (3.9 of int4 linears and an
# 8-bit head) and 19.3 GB (6.5 of W8A8, 0.5 of the head) were measured; less 4.3 GB for tower, table
# and process that is 1.4 and 2.2 bytes. Rounded up, since it was measured on one machine
# (benchmarks/results/onnxruntime-7b-*.json).
_GRAPH_W8A8, _GRAPH_WEIGHT_ONLY = 2.5, 2.0
_GRAPH_DENSE = 4  # bytes of a value: they compute in fp32
_SCORES = 3  # [H, T, T] fp32 of attention that no fused kernel computes: scores, mask, weights
_TABLE = "model.embed_tokens.weight"
GRAPH_STAGE = "verifying with ONNX Runtime"


class ResourceError(ExportError):
    """Memory or disk is too small for the export."""


@dataclass(frozen=True)
class Workload:
    """How much there is to run: prompts and their tokens (answers included), and answer tokens.

    ``longest`` is the longest prompt with the longest answer it can get, ``answer`` the longest
    answer. ``to_answer`` answer tokens are still to be decoded. ``gptq`` and ``awq`` say whether
    any linear uses the method, ``verify`` whether the engine is run at the end.
    """

    prompts: int
    tokens: int
    longest: int
    answer: int
    to_answer: int
    gptq: bool
    awq: bool
    verify: bool


@dataclass(frozen=True)
class Loaded:
    """A model in memory: bytes of its tensors there, and formats by linear."""

    bytes: int
    formats: Mapping[str, Format]


@dataclass(frozen=True)
class Needs:
    """Peak bytes by stage, bytes on disk beside the engine while working, and rough seconds.

    ``memory`` is that of the device, ``host`` main memory beside a GPU (empty on a CPU, whose
    memory it is).
    """

    memory: Mapping[str, int]
    spill_bytes: int
    seconds: float
    host: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return max(self.memory.values(), default=0)


def estimate(
    spec: ModelSpec,
    work: Workload,
    engine: Loaded,
    answering: Loaded,
    dtype: torch.dtype,
    device: torch.device,
    speed: Speed,
) -> Needs:
    """What the export of a model needs on ``device`` when it computes in ``dtype``.

    ``engine`` is what it makes, ``answering`` the model that writes answers (without tensors where
    there are none to write).
    """
    size, text = dtype.itemsize, spec.text
    shapes = tensor_shapes(spec)
    vision = sum(prod(s) for name, s in shapes.items() if name.startswith("visual."))
    table = text.vocab_size * text.hidden_size
    layer = sum(prod(s) for name, s in shapes.items() if name.startswith("model.layers.0."))
    linears = {n: s for n, s in decoder_linear_shapes(spec).items() if ".layers.0." in n}
    columns = [linears[group_linears(0, group)[0]][1] for group in GROUPS]
    widest = max(max(s) for s in linears.values())
    hessians = 4 * sum(k * k for k in columns) * (2 if work.awq else 1)  # before and after scaling
    working = 4 * (_GPTQ_HESSIANS - 1) * max(columns) ** 2 + 4 * _GPTQ_WEIGHTS * max(
        prod(s) for s in linears.values()
    )
    activations = _ACTIVATION_COPIES * work.longest * widest * 4
    if device.type == "cuda" and dtype == torch.float32:
        # Grouped queries have a fused kernel there in 16 bits only.
        activations += _SCORES * 4 * text.num_heads * work.longest**2
    cache = 2 * work.longest * text.num_layers * text.kv_size * size
    largest = max(prod(shape) for shape in shapes.values())
    # Patches of all pages of a list, [P, patch_dim] fp32; a token is a square of patches.
    pixels = work.longest * spec.vision.spatial_merge_size**2 * spec.vision.patch_dim * 4
    running = activations + _OVERHEAD

    def kernels(model: Loaded) -> int:
        return max(_kernel_bytes(spec, model.formats, work, dtype, device), default=0)

    writing = {"writing": 2 * 2 * largest + _OVERHEAD}
    memory: dict[str, int] = {}
    if work.verify:
        logits = _LOGITS * 4 * work.answer * text.vocab_size
        memory["verifying"] = engine.bytes + kernels(engine) + cache + running
        memory["verifying"] += table * size + logits  # the original's head, and what it gives
    if work.prompts:
        memory["embedding"] = (vision + table) * size + running
        fitting = max(hessians + working, kernels(engine))
        memory["layer"] = layer * (size + 4) + fitting + running
    if work.to_answer:
        memory["answering"] = answering.bytes + kernels(answering) + cache + running
    host: dict[str, int] = {}
    if device.type == "cuda":
        streamed = largest * (_SOURCE_BYTES + size) + pixels + _CUDA_OVERHEAD
        host = {stage: streamed for stage in memory}
        if "layer" in host:  # the layer as it was, what was made of it, and one sample
            host["layer"] = layer * (_SOURCE_BYTES + 2) + _CUDA_OVERHEAD
            host["layer"] += 2 * work.longest * text.hidden_size * size
        host |= writing
    else:
        memory = {stage: needed + pixels for stage, needed in memory.items()} | writing
    flops = 2 * 2 * work.tokens * layer * text.num_layers  # observed once, passed on once
    flops += 2 * work.tokens * sum(k * k for k in columns) * text.num_layers
    if work.gptq:
        each = sum(4 / 3 * k**3 + n * k * k for n, k in linears.values())
        flops += int(each) * text.num_layers
    if work.awq:
        flops += 20 * 2 * sum(n * k * k for n, k in linears.values()) * text.num_layers
    seconds = flops / speed.flops + work.to_answer * answering.bytes / speed.bytes
    if work.to_answer:
        seconds += 2 * work.tokens * layer * text.num_layers / speed.flops
    return Needs(memory, 2 * work.tokens * text.hidden_size * size, seconds, host)


def with_graphs(
    needs: Needs, spec: ModelSpec, formats: Mapping[str, Format], work: Workload
) -> Needs:
    """``needs`` with the stage that verifies the graphs of ONNX Runtime, on a CPU."""
    text, weights = spec.text, 0.0
    shared = text.tie_word_embeddings and "lm_head" not in formats  # the table is the head, too
    for name, (shape, dtype) in stored_tensors(spec, formats).items():
        format = formats.get(name.rpartition(".")[0])
        if name == _TABLE and not shared:
            continue
        if format is None or name.endswith(".bias"):
            weights += _GRAPH_DENSE * prod(shape)
        else:
            factor = _GRAPH_WEIGHT_ONLY if format.activations is None else _GRAPH_W8A8
            weights += factor * prod(shape) * dtype.itemsize
    table = 2 * text.vocab_size * text.hidden_size
    cache = 2 * work.longest * text.num_layers * text.kv_size * _GRAPH_DENSE
    logits = _LOGITS * 4 * work.answer * text.vocab_size
    widest = max(max(shape) for shape in decoder_linear_shapes(spec).values())
    activations = _ACTIVATION_COPIES * work.longest * widest * 4
    # The table of embeddings, and the original's head for the comparison.
    total = int(weights) + 2 * table + cache + logits + activations + _OVERHEAD
    return replace(needs, memory={**needs.memory, GRAPH_STAGE: total})


def with_backends(needs: Needs, stages: Sequence[Mapping[str, int]], device: torch.device) -> Needs:
    """``needs`` with the stages that write files for other engines: bytes of main memory each.

    They compute nothing on a GPU, so its memory is not asked for.
    """
    added = {name: size + _OVERHEAD for found in stages for name, size in found.items()}
    if device.type == "cuda":
        return replace(needs, host={**needs.host, **added})
    return replace(needs, memory={**needs.memory, **added})


def _kernel_bytes(
    spec: ModelSpec,
    formats: Mapping[str, Format],
    work: Workload,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[int]:
    """Temporaries of every quantized product; CPU kernels work in blocks of rows and have none.

    CUDA takes the reference's way: it widens a whole weight, for W8A8 the activations and results
    as well, int8 to fp64 and fp8 to fp32 (see :mod:`mmr5_kernels.reference`).
    """
    if device.type != "cuda":
        return
    shapes = linear_shapes(spec, formats)
    fused = [*layer_groups(spec).values()]
    alone = [(name,) for name in formats if not name.startswith("model.layers.")]
    for linears in (*fused, *alone):
        format = formats.get(linears[0])
        if format is None:
            continue
        rows, columns = sum(shapes[name][0] for name in linears), shapes[linears[0]][1]
        tokens = work.longest
        if linears[0] == "lm_head":
            tokens = work.answer
        elif linears[0].startswith("visual."):
            # A list has two pages or more, and a token is made of several patches.
            tokens = tokens * spec.vision.spatial_merge_size**2 // 2
        if format.activations is None:
            yield rows * columns * (4 + dtype.itemsize)
        else:
            wide = 8 if format.activations == "int8" else 4
            yield wide * (rows * columns + tokens * columns) + (wide + 8) * tokens * rows


def check_memory(
    needs: Needs, device: torch.device, available: int | None = None, host: int | None = None
) -> None:
    """Raises :class:`ResourceError` naming the stage that does not fit on ``device``.

    Beside a GPU main memory is checked as well. ``available`` and ``host`` replace the free bytes
    found on the device and in main memory.
    """
    available = available_memory(device) if available is None else available
    _check_stages(needs.memory, available, f"on {device}")
    if needs.host:
        _check_stages(needs.host, main_memory() if host is None else host, "of main memory")


def _check_stages(stages: Mapping[str, int], available: int | None, where: str) -> None:
    if not stages:
        return
    stage = max(stages, key=lambda name: stages[name])
    if available is None or stages[stage] <= available:
        return
    remedies = {
        "answering": "give the answers in the calibration data, or use a larger device",
        "verifying": "pass --no-verify or a smaller --max-new-tokens, or use a larger device",
        "writing": "free some memory, or use a larger machine",
    }
    remedy = remedies.get(stage, "pass fewer or smaller pages, or use a larger device")
    if stage.startswith("writing "):
        remedy = "free some memory, or leave out its --backend or --trt-target"
    elif stage.startswith("compiling "):
        remedy = "leave out --aot, and compile on a larger machine"
    raise ResourceError(
        f"the {stage} stage needs about {gigabytes(stages[stage])} {where} but "
        f"{gigabytes(available)} are free there; {remedy}."
    )


def check_disk(
    folder: Path, needed: int, free: int | None = None, option: str = "--output"
) -> None:
    """Raises :class:`ResourceError` unless ``needed`` bytes fit on the disk of ``folder``.

    ``free`` replaces the free bytes found; ``option`` is what chooses the folder.
    """
    free = free_disk(folder) if free is None else free
    if free < needed:
        raise ResourceError(
            f"the export needs {gigabytes(needed)} but the disk of {folder} has "
            f"{gigabytes(free)} free; make room or choose another {option}."
        )


def gigabytes(size: int) -> str:
    """A size for people: GB, or MB when small."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
