"""Quantized checkpoints in the layouts of other tools, made from a dense one by rounding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers.tiny import read_spec, read_tensors
from mmr5_export.convert import (
    from_engine,
    to_awq,
    to_gptq,
    to_modelopt,
    to_pack_quantized,
)
from mmr5_export.quantize import quantize_linear
from mmr5_kernels.layout import Format
from mmr5_runtime.spec import decoder_linear_shapes

Parts = dict[str, dict[str, Tensor]]


def rtn(folder: Path, formats: Mapping[str, Format]) -> Parts:
    """Stored tensors of every linear of a dense checkpoint that ``formats`` holds."""
    tensors = read_tensors(folder)
    return {
        name: quantize_linear(tensors[f"{name}.weight"], format)[0]
        for name, format in formats.items()
    }


def decoder(folder: Path, format: Format) -> dict[str, Format]:
    """One format for every linear of the decoder layers."""
    return dict.fromkeys(decoder_linear_shapes(read_spec(folder)), format)


def file_tensors(layout: str, linear: str, format: Format, parts: dict[str, Tensor]) -> Any:
    """The tensors in which ``layout`` keeps a linear, by suffix."""
    if layout == "plain":
        return parts
    grid = from_engine(format, parts)
    if layout == "modelopt":
        return to_modelopt(grid, pre_quant_scale=linear.endswith(("o_proj", "down_proj")))
    write = {"pack-quantized": to_pack_quantized, "gptq": to_gptq, "awq": to_awq}
    return to_gptq(grid, 0) if layout == "gptq_v2" else write[layout](grid)


def write_quantized(
    source: Path,
    folder: Path,
    layout: str,
    quantization: Mapping[str, Any],
    formats: Mapping[str, Format],
    parts: Parts,
    change: Mapping[str, Tensor | None] | None = None,
) -> Path:
    """Copies a dense checkpoint, its quantized linears stored in ``layout``; returns the folder.

    ``change`` replaces tensors of the file by name, or takes them out where it has None.
    """
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = read_tensors(source)
    for linear, stored in parts.items():
        del tensors[f"{linear}.weight"]
        for suffix, part in file_tensors(layout, linear, formats[linear], stored).items():
            tensors[f"{linear}.{suffix}"] = part.contiguous()
    for name, changed in (change or {}).items():
        tensors.pop(name, None)
        if changed is not None:
            tensors[name] = changed
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = dict(quantization)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def gptq_config(bits: int, group_size: int, symmetric: bool, **other: Any) -> dict[str, Any]:
    base = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": symmetric}
    return {**base, "desc_act": False, "checkpoint_format": "gptq", **other}


def awq_config(group_size: int, **other: Any) -> dict[str, Any]:
    base = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm"}
    return {**base, "zero_point": True, "modules_to_not_convert": ["visual"], **other}


def packed_config(
    bits: int, group_size: int | None, symmetric: bool = True, **other: Any
) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    weights |= {"strategy": "group" if group_size else "channel", "group_size": group_size}
    return compressed_config("pack-quantized", weights, None, **other)


def w8a8_config(kind: str, **other: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": kind, "strategy": "channel", "symmetric": True}
    tokens = {"num_bits": 8, "type": kind, "strategy": "token", "symmetric": True, "dynamic": True}
    return compressed_config(f"{kind}-quantized", weights, tokens, **other)


def compressed_config(
    format: str, weights: Mapping[str, Any], activations: Any, **other: Any
) -> dict[str, Any]:
    """As llmcompressor writes it, its names of ignored modules included."""
    group = {"targets": ["Linear"], "weights": dict(weights), "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "output_activations": None}},
        "ignore": ["visual.blocks.0.attn.qkv", "lm_head"],
        **other,
    }


def coarse(parts: Parts, zeros: bool) -> Parts:
    """The same codes with fp16 scales that bf16 cannot hold, and perhaps with zero points."""
    made: Parts = {}
    for linear, stored in parts.items():
        scale = stored["weight_scale"].to(torch.float16)
        made[linear] = {**stored, "weight_scale": scale * (1 + 2**-9)}
        if zeros:
            steps = torch.arange(scale.numel(), dtype=torch.int16).view(scale.shape)
            made[linear]["weight_zero_point"] = (steps % 15 - 7).to(torch.int8)
    return made
