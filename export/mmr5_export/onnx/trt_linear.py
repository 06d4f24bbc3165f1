"""Weights of an engine as TensorRT takes them: typed constants, dequantized before a product.

Every stored format becomes one pattern. M x N x K are rows, outputs and inputs of a linear:

============= ======================== ================= ==========================================
stored        constant                 scale             nodes
============= ======================== ================= ==========================================
dense         [N, K]                   none              Gemm (transB)
w8a16         int8 [N, K]              [N]               DequantizeLinear, Gemm (transB)
w8a8 int8/fp8 codes [N, K]             [N], and one of x the same, and x through QuantizeLinear and
                                                         DequantizeLinear
w4a16-g       int4 [K, N]              [K / g, N]        DequantizeLinear (axis 0, block g), MatMul
============= ======================== ================= ==========================================

int4 weights are stored [K, N] with blocks along axis 0, the layout that NVIDIA's own ONNX quantizer
writes; two neighbours along N share a byte, the first in the low half, and a code is in two's
complement where the engine has code + 8. Blocks are of 64 or 128 codes (NVIDIA's "Quantization
Schemes"), and of int4 alone (TensorRT 10's reference of its Dequantize operator): groups of int8,
which a checkpoint of others may have, are refused. TensorRT-RTX 1.7.1 keeps all of these at their
stored size.

Two things differ from the native engine. TensorRT quantizes activations with one constant per
linear (the largest input of calibration / 127, or / 448 for fp8), not with one per token. And in a
strongly typed network a scale has the dtype of the activations (TensorRT-RTX refuses to infer
another for int4), so that scales stored in a wider dtype are rounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from onnx import TensorProto
from torch import Tensor

from mmr5_export.finished import FinishedEngine
from mmr5_export.onnx.graph import DataFile, Graph, tensor_type
from mmr5_export.options import OptionError
from mmr5_kernels.layout import FP8_MAX, INT8_MAX, Format, unpack_int4
from mmr5_runtime.types import ExportError

_CHECKED_ROWS = 4096
_CODES = {"int8": (torch.int8, INT8_MAX), "fp8": (torch.float8_e4m3fn, FP8_MAX)}
_BLOCKS = (64, 128)


def refuse_formats(
    formats: Mapping[str, Format],
    input_absmax: Mapping[str, float],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Raises :class:`OptionError` for the first linear that no pattern above computes.

    ``formats`` by canonical linear name, as the engine stores them; ``input_absmax`` is that of
    :class:`FinishedEngine`; ``dtype`` that of activations, and so of their scales.
    """
    for name, format in formats.items():
        if not format.symmetric:
            raise OptionError(
                f"{name} is stored as {format.name}, but TensorRT dequantizes without zero points; "
                "export with --sym for TensorRT."
            )
        if format.group_size and (format.weights != "int4" or format.group_size not in _BLOCKS):
            raise OptionError(
                f"{name} is stored as {format.name}, but TensorRT dequantizes int4 in groups of 64 "
                "or 128 and int8 by whole rows; export the bf16 checkpoint with --group-size 128, "
                "or as int8-weight-only."
            )
        if format.activations and name not in input_absmax:
            raise OptionError(
                f"{name} is stored as {format.name}, for which TensorRT needs one constant scale "
                "of its input, and calibration, which is of decoder layers, has not seen that "
                "input; export with calibration, or with a weight-only or bf16 format for this "
                "linear."
            )
        if format.activations:
            scale = float(_input_scale(input_absmax[name], format, dtype))
            if not 0 < scale < math.inf:
                raise OptionError(
                    f"the inputs of {name} reached {input_absmax[name]} in calibration, which "
                    f"gives no scale in {_name(dtype)}; calibrate with other samples or choose a "
                    "weight-only format."
                )


def signed_nibbles(codes: Tensor) -> Tensor:
    """Codes -8..7 int8 [K, N], N even -> ONNX's INT4 bytes uint8 [K * N / 2].

    In the order of the tensor, the first of two codes in the low half of a byte; two's complement.
    """
    pairs = codes.flatten().view(torch.uint8).bitwise_and(0x0F).view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


class EngineWeights:
    """Puts tensors of an engine into ``data`` and the nodes that use them into ``graph``.

    ``dtype`` is that of all activations: bfloat16 or float16, or float32 for comparisons with the
    torch engine. One tensor is in memory at a time.
    """

    def __init__(
        self, graph: Graph, data: DataFile, engine: FinishedEngine, dtype: torch.dtype
    ) -> None:
        self.graph, self.dtype = graph, dtype
        self._data, self._engine = data, engine

    def tensor(self, name: str, flat: bool = False) -> str:
        """A dense tensor in the activations' dtype; ``flat`` joins all dimensions but the first.

        Raises :class:`ExportError` when a value is too large for that dtype.
        """
        tensor = self._engine.get(name)
        return self._dense(name, tensor.flatten(1) if flat else tensor)

    def linear(self, name: str, x: str) -> str:
        """x [M, K] -> [M, N], with the bias where the engine has one."""
        format = self._engine.formats.get(name)
        bias = f"{name}.bias" if f"{name}.bias" in self._engine.manifest.tensors else None
        bias = None if bias is None else self.tensor(bias)
        if format is not None and format.activations:
            x = self._quantized_input(name, x, format)
        if format is not None and format.group_size:
            product = self.graph.node("MatMul", x, self._blocked(name, format.group_size))
            return product if bias is None else self.graph.node("Add", product, bias)
        weight = self.tensor(f"{name}.weight") if format is None else self._per_row(name)
        return self.rows_product(x, weight, bias)

    def rows_product(self, x: str, weight: str, bias: str | None = None) -> str:
        """x [M, K] times the rows of a weight [N, K], plus a bias [N] -> [M, N]."""
        # TensorRT's parser takes a last input left out, but not one that is named "".
        inputs = (x, weight) if bias is None else (x, weight, bias)
        return self.graph.node("Gemm", *inputs, transB=1)

    def _dense(self, name: str, tensor: Tensor) -> str:
        made = tensor.to(self.dtype)
        # In parts: the head of the 7B is a gigabyte, and the check of all of it two more.
        if not all(bool(part.isfinite().all()) for part in made.split(_CHECKED_ROWS)):
            raise ExportError(
                f"{name} holds values that {_name(self.dtype)} cannot; write the graphs in "
                "bfloat16."
            )
        place = self._data.add(made)
        return self.graph.external(name, tensor_type(self.dtype), list(made.shape), place)

    def _per_row(self, name: str) -> str:
        codes = self._engine.get(f"{name}.weight")
        place = self._data.add(codes)
        weight = self.graph.external(
            f"{name}.weight", tensor_type(codes.dtype), list(codes.shape), place
        )
        scale_name = f"{name}.weight_scale"
        scale = self._dense(scale_name, self._engine.get(scale_name).flatten())
        return self.graph.node("DequantizeLinear", weight, scale, axis=0)

    def _blocked(self, name: str, size: int) -> str:
        codes = unpack_int4(self._engine.get(f"{name}.weight_packed")).T.contiguous()
        place = self._data.add(signed_nibbles(codes))
        kind = int(TensorProto.INT4)
        weight = self.graph.external(f"{name}.weight", kind, list(codes.shape), place)
        scale_name = f"{name}.weight_scale"
        scale = self._dense(scale_name, self._engine.get(scale_name).T)
        return self.graph.node("DequantizeLinear", weight, scale, axis=0, block_size=size)

    def _quantized_input(self, name: str, x: str, format: Format) -> str:
        top = self._engine.input_absmax[name]
        scale = self.graph.constant(_input_scale(top, format, self.dtype))
        zero = self.graph.constant(torch.zeros((), dtype=_CODES[format.weights][0]))
        codes = self.graph.node("QuantizeLinear", x, scale, zero)
        return self.graph.node("DequantizeLinear", codes, scale)


def _input_scale(top: float, format: Format, dtype: torch.dtype) -> Tensor:
    """The constant [] by which inputs of up to ``top`` are divided."""
    largest = _CODES[format.weights][1]
    # An input that was always zero has no range; any scale keeps it zero.
    return torch.tensor((top or largest) / largest, dtype=dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
