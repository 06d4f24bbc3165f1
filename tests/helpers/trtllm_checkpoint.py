"""Checkpoints for TensorRT-LLM read back, to prove that they hold what they should."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mmr5_export.trtllm.engine_checkpoint import WEIGHTS_NAME
from mmr5_export.trtllm.engine_config import CONFIG_NAME
from mmr5_export.trtllm.modelopt_formats import FP8_TENSOR, W4A16_AWQ
from mmr5_export.trtllm.naming import TrtLinear, dense_tensors, trt_linears
from mmr5_runtime.spec import ModelSpec


def unpack_rows(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_rows`: bytes [N/2, K] int8 -> codes [N, K] int8."""
    # Shifting a signed byte right keeps its sign, so each half becomes a number of its own.
    halves = torch.stack(((packed << 4) >> 4, packed >> 4), dim=1)
    return halves.flatten(0, 1)


@dataclass(frozen=True)
class EngineCheckpoint:
    """A written checkpoint read back under our names."""

    folder: Path
    spec: ModelSpec

    @property
    def config(self) -> dict[str, Any]:
        """``config.json``."""
        found: dict[str, Any] = json.loads((self.folder / CONFIG_NAME).read_text(encoding="utf-8"))
        return found

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name in the file."""
        with safe_open(self.folder / WEIGHTS_NAME, framework="pt") as reader:
            tensor: Tensor = reader.get_tensor(name)
        return tensor

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of a dense model that this one stands for, by our name; weights are fp32.

        Of a quantized linear that is code * scale * factor on the inputs.
        """
        algo = self.config["quantization"]["quant_algo"]
        for linear in trt_linears(self.spec):
            weight = self.tensor(f"{linear.name}.weight")
            if algo == W4A16_AWQ.name:
                weight = unpack_rows(weight)
            wide = weight.float()
            if algo is not None:
                scale = self.tensor(f"{linear.name}.weights_scaling_factor")
                grid = scale if scale.ndim == 2 else scale.expand(len(wide)).unsqueeze(1)
                wide = (wide.unflatten(1, (grid.shape[1], -1)) * grid.unsqueeze(-1)).flatten(1)
            if algo not in (None, FP8_TENSOR.name):
                wide = wide * self.tensor(f"{linear.name}.prequant_scaling_factor").float()
            yield from self._split(linear, "weight", wide)
            if linear.has_bias:
                yield from self._split(linear, "bias", self.tensor(f"{linear.name}.bias"))
        for theirs, (ours, _) in dense_tensors(self.spec).items():
            yield ours, self.tensor(theirs)

    @staticmethod
    def _split(linear: TrtLinear, suffix: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        parts = tensor.split(list(linear.rows))
        for name, part in zip(linear.sources, parts, strict=True):
            yield f"{name}.{suffix}", part
