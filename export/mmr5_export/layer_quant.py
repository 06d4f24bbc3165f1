"""Quantizes one decoder layer from its weights and the statistics of its inputs.

Smoothing comes first, for the whole layer: scales of input columns are taken into the weights and
out of whatever produces the input (a norm, or the rows of the linear before). Only then are weights
quantized, in fp32 and never rounded in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from mmr5_export.finite import is_finite
from mmr5_export.gptq import gptq, require_finite_problem, rtn_error
from mmr5_export.layer_pass import GROUPS, InputStats, group_linears
from mmr5_export.quantize import encode, quantize_linear, scale_search
from mmr5_export.smoothing import (
    awq_scales,
    clipped_scales,
    fold_into_norm,
    fold_into_rows,
    smoothquant_scales,
    transform_hessian,
)
from mmr5_kernels.layout import Format
from mmr5_kernels.reference import dequantize, sqnr_db
from mmr5_runtime.spec import ModelSpec
from mmr5_runtime.types import CheckpointError

# What feeds each group: a norm, or the rows of a linear.
_NORMS = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}
_ROWS = {"o_proj": "self_attn.v_proj", "down": "mlp.up_proj"}


@dataclass(frozen=True)
class LinearReport:
    """What quantizing one linear cost.

    ``sqnr_db`` compares weights, ``error`` outputs: tr(dW H dW^T) / tr(W H W^T) over the inputs
    seen. ``input_absmax`` is the largest magnitude among these inputs, as the linear gets them once
    smoothing has divided them: what one scale for all activations has to reach. ``damp`` is what
    GPTQ had to add to the Hessian, relative to its mean diagonal.
    """

    method: str
    format: str
    sqnr_db: float | None
    error: float
    input_absmax: float
    damp: float | None = None


@dataclass(frozen=True)
class QuantizedLayer:
    """``tensors``: by full name, the quantized parts and every dense tensor that changed.

    All of them are on the CPU.
    """

    tensors: Mapping[str, Tensor]
    report: Mapping[str, LinearReport]


def quantize_layer(
    spec: ModelSpec,
    index: int,
    dense: Mapping[str, Tensor],
    stats: Mapping[str, InputStats],
    formats: Mapping[str, Format],
    methods: Mapping[str, str],
    damp: float,
) -> QuantizedLayer:
    """Quantizes layer ``index``.

    ``dense`` holds its tensors by canonical name; ``formats`` and ``methods`` ("rtn", "rtn-mse",
    "gptq", "awq", "smoothquant+gptq") are by linear. Raises :class:`CheckpointError` naming the
    linears whose statistics are not finite, whose outputs are too large to be compared, or whose
    Hessian cannot be made positive definite.
    """
    for group in GROUPS:
        _require_finite_inputs(group_linears(index, group), stats[group])
    layer = _Layer(spec, index, dense, stats)
    for group in GROUPS:
        linears = group_linears(index, group)
        format, method = formats.get(linears[0]), methods.get(linears[0], "rtn")
        if format is None:
            continue
        if method == "awq":
            layer.smooth_awq(group, format)
        elif method.startswith("smoothquant"):
            layer.smooth_activations(group)
    tensors: dict[str, Tensor] = dict(layer.changed)
    report: dict[str, LinearReport] = {}
    for group in GROUPS:
        for name in group_linears(index, group):
            format = formats.get(name)
            if format is None:
                if name in layer.touched:
                    tensors[f"{name}.weight"] = layer.weights[name].to(torch.bfloat16)
                continue
            parts, report[name] = _quantize(
                name,
                layer.weights[name],
                layer.hessians[group],
                float(layer.absmax[group].max()),
                format,
                methods[name],
                damp,
            )
            tensors |= {f"{name}.{suffix}": part for suffix, part in parts.items()}
    return QuantizedLayer({name: tensor.cpu() for name, tensor in tensors.items()}, report)


def _require_finite_inputs(linears: Sequence[str], stats: InputStats) -> None:
    """One check for every method: only some of them notice, and none names the cause."""
    if all(is_finite(found) for found in (stats.hessian, stats.absmax, stats.abs_sum)):
        return
    raise CheckpointError(
        f"the inputs of {' and '.join(linears)} are not finite over the calibration samples, or "
        "too large to be squared; calibrate with --dtype float32 or other samples, and if that "
        "does not help download the checkpoint again."
    )


def _quantize(
    name: str,
    weight: Tensor,
    hessian: Tensor,
    input_absmax: float,
    format: Format,
    method: str,
    damp: float,
) -> tuple[dict[str, Tensor], LinearReport]:
    if method.endswith("gptq"):
        parts, stats = gptq(weight, hessian, format, damp=damp, name=name)
        error, used = stats.error, stats.damp
    else:
        require_finite_problem(name, weight, hessian)
        if method == "awq":
            # Clipping has to weigh errors by the inputs: unweighted it cuts what AWQ enlarged.
            parts = encode(weight, format, *clipped_scales(weight, format, hessian.diagonal()))
        else:
            parts, _ = quantize_linear(weight, format, scale_search(method))
        error, used = rtn_error(weight, hessian, parts, format), None
    decibels = sqnr_db(weight, dequantize(format, parts, torch.float32))
    if not isfinite(error):
        raise CheckpointError(
            f"the outputs of {name} over the calibration samples are too large for their error to "
            "be computed; calibrate with other samples, or leave this linear in bf16."
        )
    known = round(decibels, 3) if isfinite(decibels) else None
    return parts, LinearReport(method, format.name, known, error, input_absmax, used)


class _Layer:
    """The layer while it is being smoothed: fp32 weights, Hessians, changed norms and biases.

    ``hessians`` [K, K] and ``absmax`` [K], the largest |input| by column, are by group.
    """

    def __init__(
        self,
        spec: ModelSpec,
        index: int,
        dense: Mapping[str, Tensor],
        stats: Mapping[str, InputStats],
    ) -> None:
        self._spec, self._index, self._dense, self._stats = spec, index, dense, stats
        device = next(iter(stats.values())).hessian.device
        self.weights = {
            name: dense[f"{name}.weight"].to(device, torch.float32)
            for group in GROUPS
            for name in group_linears(index, group)
        }
        self.hessians = {group: stats[group].hessian for group in GROUPS}
        self.absmax = {group: stats[group].absmax for group in GROUPS}
        self.changed: dict[str, Tensor] = {}
        self.touched: set[str] = set()  # linears whose weight is no longer the checkpoint's

    def smooth_awq(self, group: str, format: Format) -> None:
        """Scales that keep the columns with large inputs exact (AWQ)."""
        if group == "o_proj" and self._spec.text.num_kv_heads != self._spec.text.num_heads:
            return  # a value column serves several query heads: no single scale undoes it
        weights = [self.weights[name] for name in group_linears(self._index, group)]
        stats = self._stats[group]
        scales, _ = awq_scales(stats.hessian, stats.mean_abs, weights, format)
        self._apply(group, scales)

    def smooth_activations(self, group: str) -> None:
        """Scales that move outliers of the activations into the weights (SmoothQuant)."""
        if group not in _NORMS:
            return
        weights = [self.weights[name] for name in group_linears(self._index, group)]
        self._apply(group, smoothquant_scales(self._stats[group].absmax, weights))

    def _apply(self, group: str, scales: Tensor) -> None:
        """Multiplies the group's columns by ``scales`` [K] and divides its producer by them."""
        prefix = f"model.layers.{self._index}."
        if group in _NORMS:
            name = f"{prefix}{_NORMS[group]}.weight"
            norm, scales = fold_into_norm(self._dense[name].to(scales.device), scales)
            self.changed[name] = norm
        else:
            producer = f"{prefix}{_ROWS[group]}"
            self.weights[producer] = fold_into_rows(self.weights[producer], scales)
            self.touched.add(producer)
            bias = f"{producer}.bias"
            if bias in self._dense:
                divided = self._dense[bias].to(scales.device).float() / scales
                self.changed[bias] = divided.to(torch.bfloat16)
        for linear in group_linears(self._index, group):
            self.weights[linear] = self.weights[linear] * scales
            self.touched.add(linear)
        self.hessians[group] = transform_hessian(self.hessians[group], scales)
        self.absmax[group] = self.absmax[group] / scales
