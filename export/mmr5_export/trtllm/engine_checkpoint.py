"""The decoder of a finished engine as a checkpoint that trtllm-build of 1.2.1 reads.

``config.json`` and ``rank0.safetensors``, one linear in memory at a time::

    int4, int8   the engine's own codes and scales, laid out as theirs; nothing is rounded again
    fp8          rounded anew from the original weights: TensorRT-LLM takes one scale per weight
                 where the engine has one per row
    16 bits      norms and biases from the engine, where smoothing may have changed them; head from
                 the original where it is at hand, since ModelOpt leaves it in 16 bits as well

The vision tower is not part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmr5_export.finished import FinishedEngine
from mmr5_export.finite import require_finite
from mmr5_export.options import OptionError
from mmr5_export.plan import Stored
from mmr5_export.trtllm.compared import compared
from mmr5_export.trtllm.engine_config import engine_config
from mmr5_export.trtllm.modelopt_formats import (
    DTYPES,
    FP8_TENSOR,
    W4A16_AWQ,
    QuantAlgo,
    require_supported,
)
from mmr5_export.trtllm.naming import TrtLinear, dense_tensors, trt_linears
from mmr5_export.trtllm.pack import fp8_codes, fp8_scale, pack_rows
from mmr5_export.write import TensorWriter
from mmr5_kernels.layout import FP8_MAX, INT8_MAX, unpack_int4
from mmr5_kernels.reference import dequantize
from mmr5_runtime.spec import ModelSpec

WEIGHTS_NAME = "rank0.safetensors"
_HEAD = "lm_head.weight"


def write_engine_checkpoint(
    engine: FinishedEngine, folder: Path, dtype: str = "float16"
) -> dict[str, Any]:
    """Writes the checkpoint of an engine into ``folder``, which is there, and says what it is.

    ``dtype`` "float16" or "bfloat16" is that of everything that is not quantized. Returns facts for
    the manifest: ``quant_algo``, ``dtype``, ``head`` (where its weight came from), ``activations``
    and ``verified``.

    Raises :class:`OptionError` as :func:`require_supported`, and naming a linear whose scales or
    inputs float16 cannot hold, before anything is written; and :class:`CheckpointError` naming a
    weight that it cannot hold.
    """
    spec = engine.spec
    algo = require_supported(
        spec,
        engine.formats,
        calibrated=bool(engine.input_absmax),
        original=engine.original is not None,
        dtype=dtype,
    )
    source = _Source(engine, algo, DTYPES[dtype])
    source.check()
    with TensorWriter(folder, plan_engine_checkpoint(spec, algo, dtype)) as writer:
        for linear in trt_linears(spec):
            for suffix, tensor in source.linear(linear):
                writer.write(f"{linear.name}.{suffix}", tensor)
        for theirs, (ours, _) in dense_tensors(spec).items():
            writer.write(theirs, source.head() if ours == _HEAD else source.dense(ours))
        writer.finish()
    engine_config(spec, algo, dtype).write(folder)
    return {
        "quant_algo": algo.name,
        "dtype": dtype,
        "head": source.head_from,
        "activations": "one static scale per linear" if algo.static_inputs else "16 bits",
        "verified": compared(algo.name, "Qwen2", "config keys but for those of mrope and Qwen2-VL"),
    }


def plan_engine_checkpoint(spec: ModelSpec, algo: QuantAlgo, dtype: str) -> tuple[Stored, ...]:
    """Every tensor of the checkpoint; the sum of their ``num_bytes`` is what it takes on disk."""
    target = DTYPES[dtype]
    linears = (
        Stored(f"{linear.name}.{suffix}", kind, shape, WEIGHTS_NAME)
        for linear in trt_linears(spec)
        for suffix, (shape, kind) in algo.tensors(linear, target).items()
    )
    dense = dense_tensors(spec).items()
    return (*linears, *(Stored(name, target, shape, WEIGHTS_NAME) for name, (_, shape) in dense))


class _Source:
    """The tensors of a checkpoint, made from a finished engine one at a time."""

    def __init__(self, engine: FinishedEngine, algo: QuantAlgo, dtype: torch.dtype) -> None:
        self._engine, self._algo, self._dtype = engine, algo, dtype

    @property
    def head_from(self) -> str:
        """Where the weight of the head comes from."""
        if "lm_head" not in self._engine.formats:
            return "the engine, where it is bf16"
        if self._engine.original is not None:
            return "the original checkpoint"
        return f"the engine, dequantized from {self._engine.formats['lm_head'].name}"

    def check(self) -> None:
        """Raises :class:`OptionError` for scales and inputs that the checkpoint cannot have."""
        method = self._engine.manifest.quant.method
        if self._algo is FP8_TENSOR and method != "rtn":
            # Smoothing would have changed norms and weights, and these weights are the original's.
            raise OptionError(
                f"--trt-target engine rounds fp8 anew from the original weights, which fit an "
                f"engine made by rtn only and not by {method}; pass --method rtn."
            )
        for linear in trt_linears(self._engine.spec):
            if self._algo.static_inputs:
                self._check_input(linear)
            if self._algo is W4A16_AWQ and self._dtype == torch.float16:
                for name in linear.sources:
                    self._check_scales(name)

    def _check_input(self, linear: TrtLinear) -> None:
        for name in linear.sources:
            largest = self._engine.input_absmax.get(name)
            if largest is None or not 0 <= largest < float("inf"):
                raise OptionError(
                    f"{name} has no largest input to make a scale of (calibration says {largest}); "
                    "calibrate with samples that reach it, or use int4 or bf16."
                )
            if self._dtype == torch.float16 and largest > torch.finfo(torch.float16).max:
                raise OptionError(
                    f"inputs of {name} reach {largest:.3g}, which float16 cannot hold; make the "
                    "checkpoint bfloat16."
                )

    def _check_scales(self, name: str) -> None:
        # The file has fp32 scales, but a build converts them to the dtype of the model.
        scale = self._engine.get(f"{name}.weight_scale").float()
        half = scale.half()
        if bool(half.isinf().any()) or bool(((half == 0) & (scale != 0)).any()):
            raise OptionError(
                f"scales of {name} lie between {float(scale.abs().min()):.3g} and "
                f"{float(scale.abs().max()):.3g}, not all of which float16 can hold; make the "
                "checkpoint bfloat16."
            )

    def linear(self, linear: TrtLinear) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of a linear by suffix."""
        sources = linear.sources
        if self._algo is FP8_TENSOR:
            scale = fp8_scale([self._original(name) for name in linear.scaled_with])
            codes = [fp8_codes(self._original(name), scale) for name in sources]
            # torch joins no fp8 tensors everywhere, but it does join their bytes.
            joined = torch.cat([part.view(torch.uint8) for part in codes])
            yield "weight", joined.view(torch.float8_e4m3fn)
            yield "weights_scaling_factor", scale
        elif self._algo.name is None:
            yield "weight", torch.cat([self.dense(f"{name}.weight") for name in sources])
        else:
            yield "weight", self._codes(linear)
            scales = torch.cat([self._engine.get(f"{name}.weight_scale") for name in sources])
            grouped = self._algo.group_size is not None
            yield "weights_scaling_factor", (scales if grouped else scales[:, 0]).float()
        if self._algo.static_inputs:
            largest = max(self._engine.input_absmax[name] for name in sources)
            steps = FP8_MAX if self._algo is FP8_TENSOR else float(INT8_MAX)
            # An input that was always zero has no range; any scale keeps it zero.
            yield "activation_scaling_factor", torch.tensor([largest or steps]) / steps
        if self._algo.prequant:
            yield "prequant_scaling_factor", torch.ones(linear.columns, dtype=self._dtype)
        if linear.has_bias:
            yield "bias", torch.cat([self.dense(f"{name}.bias") for name in sources])

    def _codes(self, linear: TrtLinear) -> Tensor:
        if self._algo is W4A16_AWQ:
            packed = (self._engine.get(f"{name}.weight_packed") for name in linear.sources)
            return pack_rows(torch.cat([unpack_int4(part) for part in packed]))
        return torch.cat([self._engine.get(f"{name}.weight") for name in linear.sources])

    def dense(self, name: str) -> Tensor:
        """A dense tensor of the engine by our name, in the dtype of the checkpoint."""
        return self._narrow(name, self._engine.get(name))

    def head(self) -> Tensor:
        """The weight of the head [V, hidden] in the dtype of the checkpoint."""
        format = self._engine.formats.get("lm_head")
        if format is None:
            return self.dense(_HEAD)
        if self._engine.original is not None:
            return self._narrow(_HEAD, self._engine.original(_HEAD))
        text = self._engine.spec.text
        suffixes = format.tensors(text.vocab_size, text.hidden_size)
        parts = {suffix: self._engine.get(f"lm_head.{suffix}") for suffix in suffixes}
        return self._narrow(_HEAD, dequantize(format, parts, torch.float32))

    def _original(self, linear: str) -> Tensor:
        assert self._engine.original is not None  # require_supported has seen to it
        name = f"{linear}.weight"
        weight = self._engine.original(name)
        require_finite(name, weight)
        return weight

    def _narrow(self, name: str, tensor: Tensor) -> Tensor:
        narrow = tensor.to(self._dtype)
        require_finite(name, narrow, f"{self._dtype} cannot hold it; make the checkpoint bfloat16")
        return narrow
