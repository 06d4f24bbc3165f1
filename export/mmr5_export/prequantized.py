"""A checkpoint that is quantized already, opened for streaming into an engine.

Codes, scales and zero points go into the engine as they are; nothing is quantized again. Which
linears are quantized is seen from the tensors that are there, how, from the config
(:mod:`mmr5_export.quant_config`): lists of ignored modules are written in too many namings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmr5_export.checkpoint import (
    FLOATS,
    StoredTensor,
    read_json,
    read_spec,
    read_tensor,
    scan,
)
from mmr5_export.convert import (
    Grid,
    engine_group_size,
    from_awq,
    from_gptq,
    from_modelopt,
    from_pack_quantized,
    to_engine,
)
from mmr5_export.quant_config import Scheme, read_schemes
from mmr5_kernels.layout import Format
from mmr5_runtime.spec import ModelSpec, has_bias, linear_shapes, tensor_shapes
from mmr5_runtime.types import CheckpointError, EngineError

_MODELOPT = "hf_quant_config.json"
_SCALE_NAMES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_SCALES = ("weight_scale", "scales")
_MARKS = ("weight_packed", "qweight", "weight_scale")  # any of them: the linear is quantized
_OPTIONAL = ("g_idx", "pre_quant_scale")  # not every writer stores them for every linear
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

Shapes = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]
"""Shape and possible dtypes, as safetensors names them, of the tensors of a linear by suffix."""


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A checked checkpoint; ``formats`` has the format of every quantized linear in an engine."""

    folder: Path
    spec: ModelSpec
    tensors: Mapping[str, StoredTensor]
    formats: Mapping[str, Format]
    schemes: Mapping[str, Scheme]

    @property
    def weight_files(self) -> list[str]:
        """Names of the safetensors files, sorted."""
        return sorted({stored.file for stored in self.tensors.values()})

    def read(self, name: str) -> Tensor:
        """A tensor that is not part of a quantized weight, by canonical name, in its own dtype."""
        return read_tensor(self.folder, self.tensors[name])

    def parts(self, linear: str) -> dict[str, Tensor]:
        """The stored tensors of a quantized linear, as ``formats[linear].tensors`` lists them.

        A vision MLP is padded as the engine keeps it. Raises :class:`CheckpointError` naming the
        linear when its tensors do not keep what the config says (a zero point of a symmetric
        weight, columns in another order, scales of the input).
        """
        scheme, format = self.schemes[linear], self.formats[linear]
        rows, columns = linear_shapes(self.spec)[linear]
        suffixes = _file_shapes(scheme, rows, columns)
        found = {
            suffix: self.read(f"{linear}.{suffix}")
            for suffix in suffixes
            if f"{linear}.{suffix}" in self.tensors
        }
        shape = found.get("weight_shape")
        if shape is not None and shape.tolist() != [rows, columns]:
            raise CheckpointError(
                f"{linear}.weight_shape is {shape.tolist()} but config.json says "
                f"{[rows, columns]}; download the checkpoint again."
            )
        if scheme.layout == "plain":
            stored = linear_shapes(self.spec, self.formats)[linear]
            scale = found["weight_scale"]
            return {
                "weight": _padded(found["weight"], stored, 0),
                "weight_scale": _padded(scale, (stored[0], scale.shape[1]), 1),
            }
        try:
            return to_engine(_grid(scheme, found), format)
        except ValueError as error:
            raise CheckpointError(
                f"{linear} cannot be taken over as it is quantized ({_reason(error)}); export from "
                "the original bf16 checkpoint."
            ) from error


def is_quantized(folder: Path) -> bool:
    """Whether a checkpoint folder says that it is quantized already."""
    config = folder / "config.json"
    stated = config.is_file() and bool(read_json(config).get("quantization_config"))
    return stated or (folder / _MODELOPT).is_file()


def open_quantized(folder: Path) -> QuantizedCheckpoint:
    """Reads configs and headers, and checks every name, shape and dtype.

    Raises :class:`CheckpointError` for what :func:`mmr5_export.checkpoint.open_checkpoint` refuses
    and for a quantization that an engine cannot hold exactly, with the reason.
    """
    config, spec = read_spec(folder)
    quantization: dict[str, Any] = config.get("quantization_config") or {}
    if (folder / _MODELOPT).is_file() and quantization.get("quant_method") in (None, "modelopt"):
        quantization = {**read_json(folder / _MODELOPT), "quant_method": "modelopt"}
    scheme_of = read_schemes(quantization)
    tensors, headers = scan(folder)
    schemes, formats = {}, {}
    for linear, (_, columns) in linear_shapes(spec).items():
        if not any(f"{linear}.{mark}" in tensors for mark in _MARKS):
            continue
        scheme = scheme_of(linear)
        if scheme is None:
            raise CheckpointError(
                f"{linear} is stored quantized but no config group targets it; download the "
                "checkpoint again."
            )
        schemes[linear] = scheme
        formats[linear] = _format(linear, scheme, columns, headers)
    if not formats:
        raise CheckpointError(
            f"{folder} says it is quantized but holds no quantized linear; remove "
            "quantization_config from config.json if the weights are dense."
        )
    _check_fused(formats, spec)
    tensors = _without_idle_biases(folder, tensors, schemes)
    opened = QuantizedCheckpoint(folder, spec, tensors, formats, schemes)
    _check_tensors(opened, headers)
    return opened


def _format(linear: str, scheme: Scheme, columns: int, headers: Mapping[str, Any]) -> Format:
    """The engine's format of a linear with K ``columns``; its scales keep the dtype they have."""
    scales = (headers.get(f"{linear}.{suffix}", (None, None))[1] for suffix in _SCALES)
    scale = next((_SCALE_NAMES[dtype] for dtype in scales if dtype in _SCALE_NAMES), "bf16")
    try:
        group = None
        if scheme.weights != "fp8":
            group = engine_group_size(scheme.bits, scheme.group_size, columns)
        elif scheme.group_size:
            raise ValueError("fp8 weights take no group.")
        if linear.startswith("visual.") and not scheme.activations:
            raise ValueError("a linear of the vision tower takes no weight-only format.")
        return Format(scheme.weights, group, scheme.symmetric, scheme.activations, scale)
    except ValueError as error:
        raise CheckpointError(
            f"{linear} cannot be taken over as it is quantized ({_reason(error)}); export from the "
            "original bf16 checkpoint."
        ) from error


def _check_fused(formats: Mapping[str, Format], spec: ModelSpec) -> None:
    """Linears that an engine runs as one, or pads as one, must be stored alike."""
    for linear in linear_shapes(spec):
        parent, _, part = linear.rpartition(".")
        for members in _FUSED:
            kinds = {formats.get(f"{parent}.{member}") for member in members}
            if part == members[0] and len(kinds) > 1:
                raise CheckpointError(
                    f"{', '.join(members)} of {parent} are stored differently, but they run as "
                    "one; export from the original bf16 checkpoint."
                )
    try:
        linear_shapes(spec, formats)
    except EngineError as error:
        raise CheckpointError(str(error)) from error


def _file_shapes(scheme: Scheme, rows: int, columns: int) -> Shapes:
    """The tensors that hold a weight [N, K] in the files."""
    size = scheme.group_size or columns
    groups, per_word = columns // size, 32 // scheme.bits
    scale = (rows, groups), FLOATS
    if scheme.layout == "plain":
        code = "F8_E4M3" if scheme.weights == "fp8" else "I8"
        return {"weight": ((rows, columns), (code,)), "weight_scale": scale}
    if scheme.layout == "pack-quantized":
        zero = {"weight_zero_point": ((-(-rows // per_word), groups), ("I32",))}
        return {
            "weight_packed": ((rows, -(-columns // per_word)), ("I32",)),
            "weight_scale": scale,
            "weight_shape": ((2,), ("I64", "I32")),
            **({} if scheme.symmetric else zero),
        }
    if scheme.layout == "modelopt":
        return {
            "weight": ((rows // 2, columns), ("U8",)),
            "weight_scale": scale,
            "pre_quant_scale": ((columns,), FLOATS),
        }
    packed = (columns, rows // per_word) if scheme.layout == "awq" else (columns // per_word, rows)
    return {
        "qweight": (packed, ("I32",)),
        "qzeros": ((groups, rows // per_word), ("I32",)),
        "scales": ((groups, rows), FLOATS),
        **({} if scheme.layout == "awq" else {"g_idx": ((columns,), ("I32", "I64"))}),
    }


def _check_tensors(opened: QuantizedCheckpoint, headers: Mapping[str, Any]) -> None:
    """Every name, shape and dtype: of dense tensors, and of those of quantized linears."""
    expected: Shapes = {name: (shape, FLOATS) for name, shape in tensor_shapes(opened.spec).items()}
    shapes = linear_shapes(opened.spec)
    for linear, scheme in opened.schemes.items():
        expected.pop(f"{linear}.weight", None)
        for suffix, part in _file_shapes(scheme, *shapes[linear]).items():
            if suffix not in _OPTIONAL or f"{linear}.{suffix}" in opened.tensors:
                expected[f"{linear}.{suffix}"] = part
    if missing := sorted(expected.keys() - opened.tensors.keys()):
        raise CheckpointError(
            f"the weights lack {missing[0]} ({len(missing)} tensors in all); download every file "
            "again."
        )
    if left_over := sorted(opened.tensors.keys() - expected.keys()):
        raise CheckpointError(
            f"the weights hold {left_over[0]} ({len(left_over)} tensors in all), which this "
            "Qwen2.5-VL, quantized as config.json says, does not have; check that it belongs to "
            "these files."
        )
    for name, (shape, dtypes) in expected.items():
        found, dtype = headers[name]
        if found != shape:
            raise CheckpointError(
                f"{name} has shape {list(found)} but config.json says {list(shape)}; check that "
                f"config.json belongs to the weights in {opened.folder}."
            )
        if dtype not in dtypes:
            raise CheckpointError(
                f"{name} is stored as {dtype} but the quantization that config.json states keeps "
                f"{' or '.join(dtypes)}; check that it belongs to the weights."
            )


def _without_idle_biases(
    folder: Path, tensors: Mapping[str, StoredTensor], schemes: Mapping[str, Scheme]
) -> dict[str, StoredTensor]:
    """Leaves out biases of zeros: AutoGPTQ gives one to every linear it quantizes."""
    idle = {
        name
        for linear in schemes
        if (name := f"{linear}.bias") in tensors
        and not has_bias(linear)
        and not read_tensor(folder, tensors[name]).any()
    }
    return {name: stored for name, stored in tensors.items() if name not in idle}


def _grid(scheme: Scheme, tensors: Mapping[str, Tensor]) -> Grid:
    match scheme.layout:
        case "pack-quantized":
            return from_pack_quantized(tensors, scheme.bits)
        case "awq":
            return from_awq(tensors)
        case "modelopt":
            return from_modelopt(tensors)
        case _:
            shift = 0 if scheme.layout == "gptq_v2" else 1
            return from_gptq(tensors, scheme.bits, shift)


def _padded(part: Tensor, shape: tuple[int, int], value: int) -> Tensor:
    """``part`` [n, k], and ``value`` in the rows and columns that ``shape`` has beyond it."""
    if tuple(part.shape) == shape:
        return part
    padded = torch.full(shape, value, dtype=part.dtype)
    padded[: part.shape[0], : part.shape[1]] = part
    return padded


def _reason(error: ValueError) -> str:
    return str(error).rstrip(".")
