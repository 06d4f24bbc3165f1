"""humming (``humming-kernels``): int4 and int8 weights with bfloat16 activations.

It reads compressed-tensors' layout, which is ours for symmetric int4. Written after its version
0.1.19; never run here.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mmr5_bench.kernels_bench.libraries.base import Case, Library, RunRows, on_gpu
from mmr5_kernels.layout import Format


class Humming(Library):
    """``humming.layer.HummingLayer``."""

    @property
    def name(self) -> str:
        return "humming"

    def serves(self, format: Format | None) -> bool:
        return format is not None and format.weights == "int4"

    def why_not(self, case: Case, m: int) -> str | None:
        assert case.format is not None
        if reason := on_gpu(case, self.name, (8, 0)):
            return reason
        if not case.format.symmetric:
            return "humming is given symmetric weights only: its zero points lie along N"
        for module in ("humming", "tabulate"):
            if find_spec(module) is None:
                return f"{module} is not installed; pip install humming-kernels tabulate"
        return None

    def prepare(self, case: Case) -> RunRows:
        assert case.format is not None
        humming: Any = import_module("humming.layer")
        layer = humming.HummingLayer(
            shape_n=case.n,
            shape_k=case.k,
            weight_config={
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "type": "int",
                "num_bits": 4,
                "strategy": "group",
                "group_size": case.format.group_size,
                "symmetric": True,
            },
            has_bias=case.bias is not None,
            torch_dtype=case.dtype,
        ).to(case.device)
        tensors = {name: case.tensors[name] for name in ("weight_packed", "weight_scale")}
        if case.bias is not None:
            tensors["bias"] = case.bias
        layer.load_from_tensors(tensors)
        layer.transform()

        @torch.no_grad()
        def run(x: Tensor) -> Tensor:
            y: Tensor = layer(x)
            return y

        return run
