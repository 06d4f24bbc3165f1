"""How quantized weights lie in an engine folder: the contract between export and runtime.

A linear that is not dense has a :class:`Format`. Its weight [N, K] is stored as

======= ===================== ==================== ============================================
weights tensor                shape, dtype         meaning
======= ===================== ==================== ============================================
(dense) ``weight``            [N, K] bf16          the weight
int8    ``weight``            [N, K] int8          codes -127..127
        ``weight_scale``      [N, K/g]             w = code * scale
fp8     ``weight``            [N, K] float8_e4m3fn codes
        ``weight_scale``      [N, K/g]             w = code * scale
int4    ``weight_packed``     [N, K/8] int32       eight codes -8..7 along K, stored as code + 8
        ``weight_scale``      [N, K/g]             w = (code - zero point) * scale
        ``weight_zero_point`` [N, K/g] int8        -8..7; only when asymmetric
        ``weight_shape``      [2] int64            (N, K), for readers that expect it
======= ===================== ==================== ============================================

where g is the group size, or K when a whole row shares one scale.

int4 is the ``pack-quantized`` layout of compressed-tensors: in word j of a row, bits 4i..4i+3 hold
column 8j + i. The little-endian words are therefore plain bytes with the even column in the low
nibble, which is also what ONNX Runtime's MatMulNBits reads. (Its packed zero points are not taken
over: they run along N, and eight rows in a word make a linear hard to cut.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

GROUP_SIZE = 128  # columns that share one int4 scale unless another size is asked for
GROUP_SIZES = (32, 64, 128)
INT4_PER_WORD = 8
INT4_OFFSET = 8  # codes -8..7 are stored as 0..15
INT4_MIN, INT4_MAX = -8, 7
INT8_MAX = 127  # -128 is left out, so that the range is symmetric
FP8_MAX = 448.0  # largest finite float8_e4m3fn

SCALE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_CODE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Format:
    """How the weight of one linear is stored, and what its activations are multiplied as.

    ``weights`` is "int4", "int8" or "fp8". ``group_size`` columns share one scale, all of a row
    when it is None. ``activations`` "int8" or "fp8" quantizes every token of the input with a scale
    of its own before the product; None leaves the input as it comes (weight-only). ``scale`` is the
    dtype of ``weight_scale``: "bf16", or "fp16" and "fp32" where a foreign checkpoint has it so.
    Raises ``ValueError`` for a combination that no kernel computes.
    """

    weights: str
    group_size: int | None = None
    symmetric: bool = True
    activations: str | None = None
    scale: str = "bf16"

    def __post_init__(self) -> None:
        activations = {"int4": (None,), "int8": (None, "int8"), "fp8": ("fp8",)}
        if self.activations not in activations.get(self.weights, ()):
            raise ValueError(
                f"{self.weights} weights with {self.activations or '16-bit'} activations are not "
                "supported; use int4, int8 with or without int8 activations, or fp8 with fp8."
            )
        grouped = self.group_size is not None
        if grouped and self.group_size not in GROUP_SIZES:
            raise ValueError(f"group size {self.group_size} is not one of {GROUP_SIZES}.")
        if (self.weights == "int4") != grouped and not (self.weights == "int8" and grouped):
            raise ValueError(f"{self.weights} weights take {'a' if not grouped else 'no'} group.")
        if grouped and self.activations:
            raise ValueError("quantized activations need one scale per row of the weight.")
        if not self.symmetric and self.weights != "int4":
            raise ValueError(f"{self.weights} weights are symmetric.")
        if self.scale not in SCALE_DTYPES:
            raise ValueError(f"scales are one of {', '.join(SCALE_DTYPES)}, not {self.scale}.")

    @property
    def name(self) -> str:
        """Short and unique, in the field's notation: ``w4a16-g128``, ``w8a8-int8``, ``w8a16``."""
        bits = "4" if self.weights == "int4" else "8"
        parts = [f"w{bits}a{8 if self.activations else 16}"]
        parts += [self.activations] if self.activations else []
        parts += [f"g{self.group_size}"] if self.group_size else []
        parts += [] if self.symmetric else ["asym"]
        parts += [] if self.scale == "bf16" else [self.scale]
        return "-".join(parts)

    def groups(self, columns: int) -> int:
        """Scales per row of K columns; raises ``ValueError`` when the groups do not fit."""
        size = self.group_size or columns
        if columns % size:
            raise ValueError(f"{columns} columns are no multiple of the group size {size}.")
        return columns // size

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every stored tensor of a weight [N, K], by suffix."""
        grid = (rows, self.groups(columns))
        scale = {"weight_scale": (grid, SCALE_DTYPES[self.scale])}
        if self.weights != "int4":
            return {"weight": ((rows, columns), _CODE_DTYPES[self.weights]), **scale}
        packed = {"weight_packed": ((rows, columns // INT4_PER_WORD), torch.int32)}
        zero = {} if self.symmetric else {"weight_zero_point": (grid, torch.int8)}
        return {**packed, **scale, **zero, "weight_shape": ((2,), torch.int64)}

    def to_json(self) -> dict[str, Any]:
        """A mapping that ``json`` can write; :meth:`from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Format:
        """Raises ``TypeError`` or ``ValueError`` for what is no format."""
        return cls(**data)


INT4 = Format("int4", GROUP_SIZE)
INT8 = Format("int8", activations="int8")
INT8_WEIGHT_ONLY = Format("int8")
FP8 = Format("fp8", activations="fp8")


def pack_int4(codes: Tensor) -> Tensor:
    """Packs codes [N, K] int8 in -8..7 into [N, K/8] int32.

    Raises ``ValueError`` when K is not a multiple of 8 or a code is out of range.
    """
    if codes.dtype != torch.int8 or codes.dim() != 2 or codes.shape[1] % INT4_PER_WORD:
        raise ValueError(
            f"int4 codes must be int8 [N, K] with K a multiple of {INT4_PER_WORD}, "
            f"not {codes.dtype} {list(codes.shape)}."
        )
    if codes.numel() and not (codes.min() >= INT4_MIN and codes.max() <= INT4_MAX):
        raise ValueError(f"int4 codes must lie in {INT4_MIN}..{INT4_MAX}.")
    stored = (codes + INT4_OFFSET).view(torch.uint8)
    low, high = stored[:, 0::2], stored[:, 1::2]
    return (low | (high << 4)).contiguous().view(torch.int32)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_int4`: packed [N, K/8] int32, contiguous -> codes [N, K] int8."""
    if packed.dtype != torch.int32 or packed.dim() != 2:
        raise ValueError(
            f"packed int4 weights must be int32 [N, K/8], not {packed.dtype} {list(packed.shape)}."
        )
    pairs = packed.view(torch.uint8)
    codes = torch.stack((pairs & 0x0F, pairs >> 4), dim=-1).view(torch.int8)
    return codes.sub_(INT4_OFFSET).flatten(1)
