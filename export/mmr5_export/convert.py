"""Exact conversion of integer weights between the layouts that int4 and int8 checkpoints come in.

Every layout stores the same three things, so each is read into and written from one neutral form:
:class:`Grid` holds a weight [N, K] as integer codes with a scale, and perhaps a zero point, for
every K/G columns. Nothing here rounds: codes and zero points keep their values, and a scale changes
its dtype only where the new one holds it exactly (:func:`exact_scale`).

================== =========================== =============== =======================
layout             codes                       scales          zero points
================== =========================== =============== =======================
engine int4        i32 [N, K/8] along K        [N, G]          i8 [N, G]
engine int8        i8 [N, K]                   [N, G]          none
pack-quantized     i32 [N, K*b/32] along K     [N, G]          i32 [N*b/32, G]
GPTQ v1            i32 [K*b/32, N] along K     f16 [G, N]      i32 [G, N*b/32], less 1
AutoAWQ gemm       i32 [K, N/8] along N, mixed f16 [G, N]      i32 [G, N/8], mixed
ModelOpt W4A16_AWQ u8 [N/2, K] along N, signed f32 [N, G]      none
ORT MatMulNBits    u8 [N, G, K/G*b/8] along K  f32, f16 [N, G] u8 [N, G*b/8]
================== =========================== =============== =======================

b is 4 or 8 bits. "along K" means that the bits of a word, from the lowest, hold neighbouring
columns, "along N" neighbouring rows. Except for ModelOpt, packed values are shifted up by half of
their range, so that they are unsigned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmr5_kernels.layout import GROUP_SIZES, SCALE_DTYPES, Format, pack_int4, unpack_int4

GPTQ_V1_ZERO_SHIFT = 1  # v1 stores zero points less one; v2 as they are
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # row that each nibble of a word holds, lowest nibble first


@dataclass(frozen=True)
class Grid:
    """A weight [N, K] as integers: w = (code - zero) * scale, one scale for K/G columns.

    ``codes`` [N, K] int8, -8..7 when ``bits`` is 4; ``scale`` [N, G] floating; ``zero`` [N, G]
    int8 in the range of the codes, or None for a symmetric grid. Raises ``ValueError`` for
    anything else.
    """

    bits: int
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"weights of {self.bits} bits are not supported; use 4 or 8.")
        if self.codes.dtype != torch.int8 or self.codes.dim() != 2:
            raise ValueError(f"codes must be int8 [N, K], not {_describe(self.codes)}.")
        _require_range("codes", self.codes, self.bits)
        rows, columns = self.codes.shape
        if self.scale.dim() != 2 or self.scale.shape[0] != rows or columns % self.groups:
            raise ValueError(
                f"scales {list(self.scale.shape)} do not divide a weight {[rows, columns]}."
            )
        if self.zero is not None:
            if self.zero.dtype != torch.int8 or self.zero.shape != self.scale.shape:
                raise ValueError(f"zero points must be int8 [N, G], not {_describe(self.zero)}.")
            _require_range("zero points", self.zero, self.bits)

    @property
    def groups(self) -> int:
        return max(1, self.scale.shape[1])

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return int(self.codes.shape[1]) // self.groups


def exact_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` of any shape as ``dtype``; ``ValueError`` where that would change a value."""
    found = scale.to(dtype)
    # Every dtype a scale comes in is exact in float32; NaN is unequal to itself, so it is refused.
    changed = found.float() != scale.float()
    if changed.any():
        before, after = scale[changed][0].item(), found[changed][0].item()
        raise ValueError(
            f"the scale {before:.9g} ({_name(scale.dtype)}) becomes {after:.9g} as {_name(dtype)}; "
            "keep the scales in their own dtype."
        )
    return found


def engine_group_size(bits: int, group_size: int | None, columns: int) -> int | None:
    """Group size under which an engine keeps groups of ``group_size`` columns, exactly.

    None is one scale for all ``columns`` of a row. A scale of more columns than an engine's groups
    have, which a row of 4 bits is too, is repeated for each of them. ``ValueError`` when the groups
    do not divide the columns, or no engine group divides them.
    """
    if bits == 8 and group_size is None:
        return None
    size = group_size or columns
    if columns % size:
        raise ValueError(f"{columns} columns are no multiple of the group size {size}.")
    fitting = [engine for engine in GROUP_SIZES if size % engine == 0]
    if not fitting:
        raise ValueError(
            f"groups of {size} columns are not made of groups of {_listed(GROUP_SIZES)}."
        )
    return max(fitting)


def from_engine(format: Format, parts: Mapping[str, Tensor]) -> Grid:
    """The grid of an engine's stored tensors (see :mod:`mmr5_kernels.layout`)."""
    if format.weights == "int4":
        codes = unpack_int4(parts["weight_packed"])
        return Grid(4, codes, parts["weight_scale"], parts.get("weight_zero_point"))
    if format.weights == "int8":
        return Grid(8, parts["weight"], parts["weight_scale"])
    raise ValueError(f"{format.weights} weights are no integers.")


def to_engine(grid: Grid, format: Format) -> dict[str, Tensor]:
    """Stored tensors of ``grid`` in ``format``.

    A scale is repeated where the format's groups are smaller. ``ValueError`` when the format cannot
    hold the grid exactly: other bits, larger groups, zero points, another scale dtype.
    """
    rows, columns = grid.codes.shape
    groups = format.groups(columns)
    if format.weights != f"int{grid.bits}" or groups % grid.groups:
        raise ValueError(
            f"{grid.bits}-bit groups of {grid.group_size} columns are no {format.name} weight."
        )
    repeats = groups // grid.groups
    scale = exact_scale(grid.scale, SCALE_DTYPES[format.scale]).repeat_interleave(repeats, 1)
    if format.symmetric and grid.zero is not None and grid.zero.any():
        raise ValueError(f"{format.name} weights have no zero points, but some are not zero.")
    if format.weights == "int8":
        return {"weight": grid.codes.contiguous(), "weight_scale": scale}
    zero = {}
    if not format.symmetric:
        zero = {"weight_zero_point": _zero(grid).repeat_interleave(repeats, 1)}
    return {
        "weight_packed": pack_int4(grid.codes),
        "weight_scale": scale,
        **zero,
        "weight_shape": torch.tensor([rows, columns], device=grid.codes.device),
    }


def from_pack_quantized(tensors: Mapping[str, Tensor], bits: int) -> Grid:
    """compressed-tensors ``pack-quantized``, 4 or 8 bits.

    ``weight_packed``, ``weight_scale``, ``weight_shape`` and, when asymmetric,
    ``weight_zero_point``, which is packed along the rows.
    """
    rows, columns = (int(size) for size in tensors["weight_shape"])
    scale, zero = tensors["weight_scale"], tensors.get("weight_zero_point")
    if zero is not None:
        zero = _signed(_unpack(zero.T, bits, rows), bits).T.contiguous()
    return Grid(bits, _signed(_unpack(tensors["weight_packed"], bits, columns), bits), scale, zero)


def to_pack_quantized(grid: Grid) -> dict[str, Tensor]:
    """The inverse of :func:`from_pack_quantized`; the scales keep their dtype."""
    tensors = {
        "weight_packed": _pack(_unsigned(grid.codes, grid.bits), grid.bits),
        "weight_scale": grid.scale,
        "weight_shape": torch.tensor(grid.codes.shape, device=grid.codes.device),
    }
    if grid.zero is not None:
        packed = _pack(_unsigned(grid.zero, grid.bits).T, grid.bits)
        tensors["weight_zero_point"] = packed.T.contiguous()
    return tensors


def from_gptq(
    tensors: Mapping[str, Tensor], bits: int, zero_shift: int = GPTQ_V1_ZERO_SHIFT
) -> Grid:
    """GPTQ as AutoGPTQ and GPTQModel store it: ``qweight``, ``qzeros``, ``scales``, ``g_idx``.

    ``zero_shift`` is 1 for checkpoint format "gptq" (v1), 0 for "gptq_v2". The grid keeps zero
    points even where all are zero. ``ValueError`` when ``g_idx`` reorders the columns, or for a
    zero point of v1 that does not fit in its bits, which readers take for different numbers.
    """
    scale = tensors["scales"].T.contiguous()
    codes = _signed(_unpack(tensors["qweight"].T, bits), bits)
    index = tensors.get("g_idx")
    if index is not None:
        size = codes.shape[1] // max(1, scale.shape[1])
        plain = torch.arange(codes.shape[1], device=index.device) // max(1, size)
        if not torch.equal(index.long(), plain):
            raise ValueError(
                "g_idx reorders the columns (act-order, desc_act), which no kernel here does; "
                "quantize without it or with static groups."
            )
    zero = _unpack(tensors["qzeros"], bits).T.to(torch.int16) + zero_shift - _offset(bits)
    if zero.numel() and zero.max() >= _offset(bits):
        raise ValueError(f"a zero point is {2**bits}, which {bits} bits cannot hold.")
    return Grid(bits, codes, scale, zero.to(torch.int8).contiguous())


def to_gptq(grid: Grid, zero_shift: int = GPTQ_V1_ZERO_SHIFT) -> dict[str, Tensor]:
    """The inverse of :func:`from_gptq`, with a ``g_idx`` that keeps the columns in order.

    ``ValueError`` for scales that fp16 does not hold, for the lowest zero point in v1 (there is no
    number below it), and where rows do not fill the words of the zero points.
    """
    zero = _zero(grid).to(torch.int16) + _offset(grid.bits) - zero_shift
    if zero.numel() and zero.min() < 0:
        raise ValueError("GPTQ v1 cannot store the lowest zero point; write gptq_v2.")
    columns = torch.arange(grid.codes.shape[1], dtype=torch.int32, device=grid.codes.device)
    codes = _whole_words(_unsigned(grid.codes, grid.bits), grid.bits)
    return {
        "qweight": _pack(codes, grid.bits).T.contiguous(),
        "qzeros": _pack(_whole_words(zero.to(torch.uint8).T, grid.bits), grid.bits),
        "scales": exact_scale(grid.scale, torch.float16).T.contiguous(),
        "g_idx": columns // grid.group_size,
    }


def from_awq(tensors: Mapping[str, Tensor]) -> Grid:
    """AutoAWQ's ``gemm`` layout, 4 bits: ``qweight``, ``qzeros``, ``scales``."""
    places = sorted(range(8), key=_AWQ_ORDER.__getitem__)
    codes, zero = (
        _signed(_unpack(tensors[name], 4).unflatten(1, (-1, 8))[..., places].flatten(1).T, 4)
        for name in ("qweight", "qzeros")
    )
    return Grid(4, codes.contiguous(), tensors["scales"].T.contiguous(), zero.contiguous())


def to_awq(grid: Grid) -> dict[str, Tensor]:
    """The inverse of :func:`from_awq`; a symmetric grid gets its zero points written out.

    ``ValueError`` for 8 bits, scales that fp16 does not hold, and rows not a multiple of 8.
    """
    _require_bits(grid, 4, "AutoAWQ")
    codes, zero = (
        _pack(
            _whole_words(_unsigned(part, 4).T, 4).unflatten(1, (-1, 8))[..., _AWQ_ORDER].flatten(1),
            4,
        )
        for part in (grid.codes, _zero(grid))
    )
    scales = exact_scale(grid.scale, torch.float16).T.contiguous()
    return {"qweight": codes, "qzeros": zero, "scales": scales}


def from_modelopt(tensors: Mapping[str, Tensor]) -> Grid:
    """ModelOpt's ``W4A16_AWQ``: ``weight``, ``weight_scale``, perhaps ``pre_quant_scale``.

    ``ValueError`` when ``pre_quant_scale`` is not all ones: the layer then multiplies its input,
    which no integer weight can stand for exactly.
    """
    multiplier = tensors.get("pre_quant_scale")
    if multiplier is not None and (multiplier != 1).any():
        raise ValueError(
            "pre_quant_scale is not one everywhere, so the layer scales its input; fold the scales "
            "into the layer before, or quantize without AWQ."
        )
    weight = tensors["weight"]
    nibbles = torch.stack((weight & 0x0F, weight >> 4), dim=1).flatten(0, 1)
    # Two's complement of four bits: adding 8 modulo 16 gives what the other layouts store.
    return Grid(4, _signed((nibbles + 8) & 0x0F, 4), tensors["weight_scale"])


def to_modelopt(grid: Grid, pre_quant_scale: bool = False) -> dict[str, Tensor]:
    """The inverse of :func:`from_modelopt`.

    ``pre_quant_scale`` adds ones [K] bf16: TensorRT-LLM asks for them in o_proj and down_proj.
    ``ValueError`` for 8 bits, zero points, or an odd number of rows.
    """
    _require_bits(grid, 4, "ModelOpt W4A16_AWQ")
    rows, columns = grid.codes.shape
    if rows % 2 or (grid.zero is not None and grid.zero.any()):
        raise ValueError("ModelOpt W4A16_AWQ takes symmetric weights of an even number of rows.")
    nibbles = grid.codes.view(torch.uint8) & 0x0F
    ones = torch.ones(columns, dtype=torch.bfloat16, device=grid.codes.device)
    return {
        "weight": nibbles[0::2] | (nibbles[1::2] << 4),
        "weight_scale": exact_scale(grid.scale, torch.float32),
        **({"pre_quant_scale": ones} if pre_quant_scale else {}),
    }


def from_matmul_nbits(tensors: Mapping[str, Tensor], bits: int) -> Grid:
    """Inputs of ONNX Runtime's ``MatMulNBits``: ``B``, ``scales``, perhaps ``zero_points``."""
    packed = tensors["B"]
    rows, groups, _ = packed.shape
    scale, zero = tensors["scales"].reshape(rows, groups), tensors.get("zero_points")
    if zero is not None:
        zero = _signed(_from_bytes(zero.reshape(rows, -1), bits)[:, :groups], bits)
    return Grid(bits, _signed(_from_bytes(packed.flatten(1), bits), bits), scale, zero)


def to_matmul_nbits(grid: Grid, scale: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The inverse of :func:`from_matmul_nbits`; ``zero_points`` only when there are any.

    ``ValueError`` when ``scale``, the dtype of the product, does not hold the scales exactly.
    """
    codes = _to_bytes(_unsigned(grid.codes, grid.bits), grid.bits)
    tensors = {
        "B": codes.unflatten(1, (grid.groups, -1)),
        "scales": exact_scale(grid.scale, scale),
    }
    if grid.zero is not None:
        tensors["zero_points"] = _to_bytes(_unsigned(grid.zero, grid.bits), grid.bits)
    return tensors


def _offset(bits: int) -> int:
    return 1 << (bits - 1)


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    """Codes int8 shifted up to 0..2^bits - 1, as uint8, whose arithmetic is modulo 256."""
    return codes.view(torch.uint8) + _offset(bits)


def _signed(values: Tensor, bits: int) -> Tensor:
    return (values - _offset(bits)).view(torch.int8)


def _to_bytes(values: Tensor, bits: int) -> Tensor:
    """uint8 values [R, C] -> bytes [R, ceil(C * bits / 8)], the even column in the low nibble."""
    if bits == 8:
        return values
    padded = torch.nn.functional.pad(values, (0, values.shape[1] % 2))
    return padded[:, 0::2] | (padded[:, 1::2] << 4)


def _from_bytes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`_to_bytes`, padding included."""
    if bits == 8:
        return packed
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(1)


def _pack(values: Tensor, bits: int) -> Tensor:
    """uint8 values [R, C] -> int32 words [R, ceil(C * bits / 32)], first column lowest."""
    missing = -values.shape[1] % (32 // bits)
    packed = _to_bytes(torch.nn.functional.pad(values, (0, missing)), bits)
    # Flat, since a single column may keep a stride that a view of another width refuses.
    return packed.flatten().view(torch.int32).view(len(values), packed.shape[1] // 4)


def _unpack(words: Tensor, bits: int, columns: int | None = None) -> Tensor:
    """The inverse of :func:`_pack`, cut to ``columns`` when given."""
    if words.dtype != torch.int32 or words.dim() != 2:
        raise ValueError(f"packed values must be int32 words in rows, not {_describe(words)}.")
    packed = words.flatten().view(torch.uint8).view(len(words), 4 * words.shape[1])
    return _from_bytes(packed, bits)[:, :columns]


def _whole_words(values: Tensor, bits: int) -> Tensor:
    """``values`` [R, C] unless C leaves a word partly empty, which its readers do not expect."""
    if values.shape[1] % (32 // bits):
        raise ValueError(
            f"{values.shape[1]} values do not fill words of {32 // bits}; this layout takes rows "
            "and columns that do."
        )
    return values


def _zero(grid: Grid) -> Tensor:
    if grid.zero is not None:
        return grid.zero
    return torch.zeros(grid.scale.shape, dtype=torch.int8, device=grid.codes.device)


def _require_bits(grid: Grid, bits: int, layout: str) -> None:
    if grid.bits != bits:
        raise ValueError(f"{layout} stores {bits} bits, not {grid.bits}.")


def _require_range(what: str, values: Tensor, bits: int) -> None:
    limit = _offset(bits)
    if bits < 8 and values.numel() and not (values.min() >= -limit and values.max() < limit):
        raise ValueError(f"{what} of {bits} bits must lie in {-limit}..{limit - 1}.")


def _listed(values: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, values[:-1]))} or {values[-1]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(tensor: Tensor) -> str:
    return f"{_name(tensor.dtype)} {list(tensor.shape)}"
