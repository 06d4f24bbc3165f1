"""One decoder layer on the device: running samples through it, and what its linears are fed.

Calibration runs the runtime's own layer, so what is observed and passed on is what the engine will
compute, kernel by kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmr5_kernels.layout import Format
from mmr5_runtime.attention import causal_attention
from mmr5_runtime.decoder import DecoderLayer
from mmr5_runtime.rope import TextRotary
from mmr5_runtime.spec import ModelSpec
from mmr5_runtime.weights import Weights

# Linears of a layer that read the same input, by the module that runs them as one.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
_HESSIAN_ROWS = 2048  # tokens added at a time: an fp32 copy of 2048 x 18944 is 155 MB


def group_linears(index: int, group: str) -> tuple[str, ...]:
    """Canonical names of the linears of a group of layer ``index``."""
    return tuple(f"model.layers.{index}.{member}" for member in GROUPS[group])


@dataclass
class InputStats:
    """What the tokens that enter one group of linears look like, over all samples.

    hessian: [K, K] fp32, the sum of w x x^T over tokens x of weight w; absmax, abs_sum: [K] fp32,
    the largest and the weighted sum of |x|; weight: the sum of w.
    """

    hessian: Tensor
    absmax: Tensor
    abs_sum: Tensor
    weight: float = 0.0

    @classmethod
    def empty(cls, columns: int, device: torch.device) -> InputStats:
        return cls(
            torch.zeros(columns, columns, device=device),
            torch.zeros(columns, device=device),
            torch.zeros(columns, device=device),
        )

    @property
    def mean_abs(self) -> Tensor:
        """Weighted mean of |x| by input column, [K] fp32."""
        return self.abs_sum / max(self.weight, 1e-30)

    def add(self, x: Tensor, weights: Tensor) -> None:
        """Adds tokens x [T, K] of any float dtype with weights [T] fp32."""
        for rows, row_weights in zip(
            x.split(_HESSIAN_ROWS), weights.split(_HESSIAN_ROWS), strict=True
        ):
            wide = rows.float()
            self.absmax = torch.maximum(self.absmax, wide.abs().amax(dim=0))
            self.abs_sum += row_weights @ wide.abs()
            wide = wide * row_weights.sqrt()[:, None]
            self.hessian.addmm_(wide.T, wide)
        self.weight += float(weights.sum())


class LayerPass:
    """Decoder layer ``index`` made of ``tensors``, stored as ``formats`` says.

    ``tensors`` holds every stored tensor of the layer by canonical name; ``dtype`` is the compute
    dtype of its activations.
    """

    def __init__(
        self,
        spec: ModelSpec,
        index: int,
        tensors: Mapping[str, Tensor],
        formats: Mapping[str, Format],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        prefix = f"model.layers.{index}."
        own = {name: format for name, format in formats.items() if name.startswith(prefix)}
        weights = Weights(spec, tensors.__getitem__, own, dtype, device)
        self._layer = DecoderLayer(spec.text, weights, index)
        self._rotary = TextRotary(spec.text, device)
        self._dtype, self._device = dtype, device

    @torch.no_grad()
    def run(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """hidden [T, hidden_size], positions [3, T] int64, any device -> [T, hidden_size]."""
        x = hidden.to(self._device, self._dtype)
        cos, sin = (table.to(x.dtype) for table in self._rotary(positions.to(self._device)))
        out: Tensor = self._layer(x, cos, sin, _attend)
        return out

    @torch.no_grad()
    def observe(self, samples: Iterable[tuple[Tensor, Tensor, Tensor]]) -> dict[str, InputStats]:
        """Statistics of every group's input over ``samples``: (hidden, positions, weights [T])."""
        stats: dict[str, InputStats] = {}
        for hidden, positions, weights in samples:
            with self._hooked(stats, weights.to(self._device)):
                self.run(hidden, positions)
        return stats

    @contextmanager
    def _hooked(self, stats: dict[str, InputStats], weights: Tensor) -> Iterator[None]:
        def hook(group: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
            def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                (x,) = inputs
                if group not in stats:
                    stats[group] = InputStats.empty(x.shape[1], x.device)
                stats[group].add(x, weights)

            return module.register_forward_pre_hook(add)

        layer = self._layer
        modules = {
            "qkv": layer.qkv,
            "o_proj": layer.o_proj,
            "gate_up": layer.mlp.gate_up,
            "down": layer.mlp.down,
        }
        handles = [hook(group, module) for group, module in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A whole prompt at once, with nothing before it."""
    return causal_attention(q, k.transpose(0, 1), v.transpose(0, 1))
