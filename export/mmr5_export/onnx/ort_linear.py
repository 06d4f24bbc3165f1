"""Weights of an engine as ONNX Runtime takes them, none of them copied.

Every tensor is a reference into the engine's safetensors files. What has to look otherwise (bf16
as fp32, signed codes as unsigned, fused linears side by side, packed zero points) is said in nodes
over constants, which ONNX Runtime computes once, as it loads the graph. How linears are multiplied:

============== =====================================================================================
dense          ``Gemm`` in fp32
int4           ``MatMulNBits`` (com.microsoft) over the stored words: their bytes are its B
int8 weights   ``MatMulNBits`` with 8 bits; where K is no multiple of 16, dequantized and ``Gemm``
int8 W8A8      tokens to 8 bits, ``MatMulInteger``, scales: the arithmetic of ``linear_int8``
fp8            refused: ONNX Runtime has no product for it on a CPU
============== =====================================================================================

``MatMulNBits`` runs at accuracy level 4: it rounds its input to 8 bits, a block of a row at a time,
and adds up in integers. Level 0 keeps the input and is 150 times slower at 8 bits (docs/LOG.md).
In W8A8 both sides are unsigned with zero point 128: where a processor has no VNNI, ONNX Runtime's
kernel for unsigned by signed adds pairs up in 16 bits and saturates; unsigned by unsigned is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from onnx import TensorProto

from mmr5_export.onnx.graph import Graph, Place, tensor_type
from mmr5_kernels.layout import INT4_OFFSET, INT8_MAX, Format
from mmr5_runtime.spec import ModelSpec, has_bias, linear_shapes, stored_tensors
from mmr5_runtime.types import ExportError

CONTRIB = "com.microsoft"
ACCURACY_LEVEL = 4
ACTIVATION_BLOCK = 128
"""Columns that share a scale when ``MatMulNBits`` rounds its input for int8 weights of one scale a
row, if K is a multiple of it; for int4 it is the group size."""
_SIGN = 0x80  # turns two's complement into code + 128
_ZERO_POINT = 128
_LEAST_BLOCK = 16
_HEAD_MULTIPLE = 8  # of GroupQueryAttention


def refuse(spec: ModelSpec, formats: Mapping[str, Format]) -> None:
    """Raises :class:`ExportError` for a model that ONNX Runtime has no kernels for."""
    if spec.text.head_dim % _HEAD_MULTIPLE:
        raise ExportError(
            f"the decoder has heads of {spec.text.head_dim} values, and ONNX Runtime's attention "
            f"takes a multiple of {_HEAD_MULTIPLE}; leave out --backend onnxruntime."
        )
    for linear, format in formats.items():
        if format.weights == "fp8":
            raise ExportError(
                f"{linear} is stored as {format.name}, which ONNX Runtime does not multiply on a "
                "CPU; export int4, int8 or bf16 for --backend onnxruntime."
            )


def activation_block(format: Format, columns: int) -> int | None:
    """Columns of the input that ``MatMulNBits`` rounds to 8 bits with one scale; None for others.

    ``format`` is that of a weight [N, ``columns``].
    """
    if format.activations or format.weights not in ("int4", "int8"):
        return None
    if format.group_size:
        return format.group_size
    block = ACTIVATION_BLOCK
    while columns % block:
        block //= 2
    return block if block >= _LEAST_BLOCK else None


class GraphWeights:
    """Adds an engine's tensors and linears to a graph.

    ``places`` says where each stored tensor lies.
    """

    dtype = torch.float32  # what the graph computes in: a CPU has fast kernels for nothing narrower

    def __init__(
        self,
        graph: Graph,
        spec: ModelSpec,
        formats: Mapping[str, Format],
        places: Mapping[str, Place],
    ) -> None:
        self._graph, self._places = graph, places
        self._formats, self._shapes = formats, linear_shapes(spec, formats)
        self._stored = stored_tensors(spec, formats)

    def tensor(self, name: str, shape: Sequence[int] | None = None) -> str:
        """A dense tensor in fp32, as stored or seen with another ``shape``."""
        stored, dtype = self._stored[name]
        value = self._graph.external(name, tensor_type(dtype), shape or stored, self._places[name])
        return self._cast(value)

    def linear(self, x: str, *names: str) -> str:
        """x [M, K] -> [M, N], of one linear or of several side by side that share input and format.

        A tied head without a format is the embedding table.
        """
        format = self._formats.get(names[0])
        if any(self._formats.get(name) != format for name in names):
            raise ExportError(
                f"{' and '.join(names)} run as one but are stored differently; export the engine "
                "with one format for them."
            )
        bias = None
        if has_bias(names[0]):
            bias = self._joined([self.tensor(f"{name}.bias") for name in names])
        if format is None:
            weight = self._joined([self.tensor(self._weight_name(name)) for name in names])
            return self._gemm(x, weight, bias)
        rows = [self._shapes[name][0] for name in names]
        columns = self._shapes[names[0]][1]
        scale = self._part(names, "weight_scale", format, columns)
        scale = self._cast(scale)
        if format.activations:
            return self._integer(x, names, scale, bias)
        block = activation_block(format, columns)
        if block is None:
            return self._gemm(x, self._dequantized(names, scale), bias)
        return self._n_bits(x, names, format, (sum(rows), columns, block), scale, bias)

    def _n_bits(
        self,
        x: str,
        names: Sequence[str],
        format: Format,
        size: tuple[int, int, int],
        scale: str,
        bias: str | None,
    ) -> str:
        rows, columns, block = size
        blocks, bits = columns // block, 4 if format.weights == "int4" else 8
        if bits == 4:
            codes = self._part(names, "weight_packed", format, columns, (blocks, block // 2))
        else:
            codes = self._part(names, "weight", format, columns, (blocks, block))
            codes = self._graph.node("BitwiseXor", codes, self._byte(_SIGN))
        if format.group_size is None:
            shape = self._graph.constant([rows, blocks])
            scale = self._graph.node("Expand", scale, shape)
        zero = None if format.symmetric else self._packed_zero_points(names, format, columns)
        return self._graph.node(
            "MatMulNBits",
            x,
            codes,
            scale,
            zero,
            None,
            bias,
            domain=CONTRIB,
            K=columns,
            N=rows,
            bits=bits,
            block_size=block,
            accuracy_level=ACCURACY_LEVEL,
        )

    def _packed_zero_points(self, names: Sequence[str], format: Format, columns: int) -> str:
        """int8 [N, G] in -8..7 -> uint8 [N, ceil(G / 2)], the even group in the low nibble."""
        graph, groups = self._graph, columns // (format.group_size or columns)
        signed = self._part(names, "weight_zero_point", format, columns)
        wide = graph.node("Cast", signed, to=TensorProto.INT32)
        wide = graph.node("Add", wide, graph.constant(INT4_OFFSET, torch.int32))
        if groups % 2:
            padding = graph.constant([0, 0, 0, 1])
            wide = graph.node("Pad", wide, padding, graph.constant(INT4_OFFSET, torch.int32))
        pairs = graph.node("Reshape", wide, graph.constant([0, -1, 2]))
        weights = graph.constant(torch.tensor([1, 16], dtype=torch.int32))
        packed = graph.node(
            "ReduceSum", graph.node("Mul", pairs, weights), graph.constant([2]), keepdims=0
        )
        return graph.node("Cast", packed, to=TensorProto.UINT8)

    def _integer(self, x: str, names: Sequence[str], scale: str, bias: str | None) -> str:
        graph = self._graph
        format = self._formats[names[0]]
        columns = self._shapes[names[0]][1]
        codes = self._part(names, "weight", format, columns, (columns,))
        codes = graph.node("BitwiseXor", codes, self._byte(_SIGN))
        codes = graph.node("Transpose", codes, perm=[1, 0])
        top = graph.node("ReduceMax", graph.node("Abs", x), graph.constant([-1]), keepdims=1)
        step = graph.node("Div", top, graph.constant(float(INT8_MAX)))
        still = graph.node("Equal", step, graph.constant(0.0))
        step = graph.node("Where", still, graph.constant(1.0), step)
        rounded = graph.node("Round", graph.node("Div", x, step))
        shifted = graph.node("Add", rounded, graph.constant(float(_ZERO_POINT)))
        zero = self._byte(_ZERO_POINT)
        inputs = graph.node("Cast", shifted, to=TensorProto.UINT8)
        total = graph.node("MatMulInteger", inputs, codes, zero, zero)
        y = graph.node("Mul", graph.node("Cast", total, to=TensorProto.FLOAT), step)
        y = graph.node("Mul", y, graph.node("Reshape", scale, graph.constant([-1])))
        return y if bias is None else graph.node("Add", y, bias)

    def _dequantized(self, names: Sequence[str], scale: str) -> str:
        format, columns = self._formats[names[0]], self._shapes[names[0]][1]
        codes = self._part(names, "weight", format, columns)
        codes = self._graph.node("Cast", codes, to=tensor_type(self.dtype))
        return self._graph.node("Mul", codes, scale)

    def _gemm(self, x: str, weight: str, bias: str | None) -> str:
        return self._graph.node("Gemm", x, weight, bias, transB=1)

    def _part(
        self,
        names: Sequence[str],
        suffix: str,
        format: Format,
        columns: int,
        seen_as: Sequence[int] | None = None,
    ) -> str:
        """A stored part of several linears side by side, [N, ...].

        With ``seen_as`` its rows are bytes of that shape instead.
        """
        parts = []
        for name in names:
            rows = self._shapes[name][0]
            shape, dtype = format.tensors(rows, columns)[suffix]
            kind = tensor_type(dtype)
            if seen_as is not None:
                shape, kind = (rows, *seen_as), int(TensorProto.UINT8)
            full = f"{name}.{suffix}"
            parts.append(self._graph.external(full, kind, shape, self._places[full]))
        return self._joined(parts)

    def _joined(self, parts: Sequence[str]) -> str:
        return parts[0] if len(parts) == 1 else self._graph.node("Concat", *parts, axis=0)

    def _cast(self, value: str) -> str:
        return self._graph.node("Cast", value, to=tensor_type(self.dtype))

    def _byte(self, value: int) -> str:
        return self._graph.constant(value, torch.uint8)

    def _weight_name(self, linear: str) -> str:
        own = f"{linear}.weight"
        return own if own in self._stored else "model.embed_tokens.weight"
