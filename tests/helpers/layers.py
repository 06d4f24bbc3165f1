"""One random decoder layer and the statistics of random inputs to it."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from helpers.tiny import tiny_configs
from mmr5_export.layer_pass import GROUPS, InputStats, group_linears
from mmr5_export.layer_quant import QuantizedLayer, quantize_layer
from mmr5_kernels.layout import INT4, INT8, Format
from mmr5_runtime.spec import ModelSpec, tensor_shapes

SPEC = ModelSpec.from_hf_config(json.loads(tiny_configs()["int4"].to_json_string(use_diff=False)))
METHODS = [
    (INT4, "rtn"), (INT4, "rtn-mse"), (INT4, "awq"), (INT4, "gptq"), (INT8, "smoothquant+gptq"),
]  # fmt: skip


def dense(seed: int = 0) -> dict[str, Tensor]:
    """The tensors of layer 0 with random values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(torch.bfloat16)
        for name, shape in tensor_shapes(SPEC).items()
        if name.startswith("model.layers.0.")
    }


def statistics(scale: float = 1.0, device: str = "cpu") -> dict[str, InputStats]:
    """Inputs of every group: 300 random tokens, all times ``scale``."""
    stats = {}
    for group in GROUPS:
        columns = tensor_shapes(SPEC)[f"{group_linears(0, group)[0]}.weight"][1]
        tokens = torch.randn(300, columns, generator=torch.Generator().manual_seed(columns))
        stats[group] = InputStats.empty(columns, torch.device(device))
        stats[group].add((tokens * scale).to(device), torch.ones(300, device=device))
    return stats


def quantize(format: Format, method: str, *groups: str, **more: Any) -> QuantizedLayer:
    """Layer 0 with the linears of ``groups`` (all, unless given) as ``format``."""
    names = [name for group in groups or GROUPS for name in group_linears(0, group)]
    return quantize_layer(
        SPEC,
        0,
        more.get("dense") or dense(),
        more.get("stats") or statistics(),
        dict.fromkeys(names, format),
        dict.fromkeys(names, method),
        0.01,
    )
