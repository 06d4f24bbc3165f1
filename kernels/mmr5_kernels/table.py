"""Which kernel may compute a linear: one table, read from top to bottom.

Rows name a family of formats:

=============== ===========================================================================
``dense``       no format
``int4``        int4 of any group size, symmetric or not, with bf16 scales
``int8_row``    weight-only int8 with one bf16 scale per row
``weight_only`` every other weight-only format: int8 in groups, fp16 or fp32 scales
``int8``        W8A8 in int8
``fp8``         W8A8 in float8_e4m3fn
=============== ===========================================================================

A row is for a kind of device and a dtype; some want a GPU of at least ``min_sm``, rows or columns
of the weight that divide by something, one group size, or a
:class:`~mmr5_kernels.target.Target` that allows a kernel of our own. With those, up to
:data:`DECODE_ROWS` rows of x are a decode step (:mod:`mmr5_kernels.ops.skinny_linear`,
:mod:`mmr5_kernels.cuda.w4_linear`) and more are a prompt (:mod:`mmr5_kernels.prefill`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from mmr5_kernels import prefill
from mmr5_kernels.layout import Format
from mmr5_kernels.target import Target

DECODE_ROWS = 64  # rows of x that the decode kernels serve
INT8_COLUMNS = 16  # what K must be a multiple of for the weight-only int8 decode kernel
ANY_M = 1 << 62


def family(format: Format | None) -> str:
    """The family of the table that a format belongs to; None is a dense weight."""
    if format is None:
        return "dense"
    if format.activations:
        return format.activations
    if format.scale == "bf16" and format.weights == "int4":
        return "int4"
    if format.scale == "bf16" and format.group_size is None:
        return "int8_row"
    return "weight_only"


@dataclass(frozen=True)
class Row:
    """One line of the table: what it applies to, and the kernel."""

    family: str
    device_type: str
    dtype: torch.dtype
    kernel: str
    rows_multiple: int = 1  # N must be a multiple of it
    max_m: int = ANY_M
    columns_multiple: int = 1  # K must be a multiple of it
    min_sm: tuple[int, int] = (0, 0)
    group_size: int | None = None  # the only one it serves
    own: bool = False  # a GPU kernel of ours: the target has to allow it

    def serves(
        self, format: Format | None, target: Target, dtype: torch.dtype, n: int, k: int
    ) -> bool:
        """Whether it may compute a weight [n, k] stored as ``format`` there."""
        return (
            (self.family, self.device_type, self.dtype)
            == (family(format), target.device_type, dtype)
            and self.group_size in (None, format and format.group_size)
            and (target.capability or (0, 0)) >= self.min_sm
            and n % self.rows_multiple == 0
            and k % self.columns_multiple == 0
            and (not self.own or target.allows(self.kernel))
        )


# Thread time (the machine was shared) of one AVX2 core, N x K = 2048 x 2048, torch 2.13, in ms:
#                      M = 1     8    17    256
# int4 bf16  reference   5.2  10.5  17.5    206
#            int4_pack   0.6   1.5   3.7     51
# int4 fp32  reference  29    29    31       54
#            rows        5.5   5.8   7.7     31
#            int4_pack   8.5  67   144     2148
# int8_row   reference   2.7   8.4  15.3    203
#   bf16     int8_pack   0.3   1.5   3.5     50
# int8_row   reference   3.5   4.3   5.6     29
#   fp32     rows        1.3   3.3   5.6     28
#            int8_pack   4.1  32    72     1061
# int8       reference  21    25    27       77
#            blocks      2.5   3.5   3.9     30
#            _int_mm     2.8  23    47      707
# fp8 bf16   reference  19.7  21.4  22.7     49
#            rows        4.5   6.2   7.1     33
# So int4_pack and int8_pack serve bf16 at every M and fp32 at none, and torch._int_mm nowhere
# (without VNNI it is a scalar loop). On AVX512 with bf16 instructions int4_pack is slower than a
# dense product from about M = 16 on, but the dequantization it saves costs as much as a product of
# some hundred rows.
_BF16, _FP32 = torch.bfloat16, torch.float32
_FP8 = prefill.FP8_CAPABILITY
_STEP = partial(Row, device_type="cuda", dtype=_BF16, own=True, max_m=DECODE_ROWS)
_PROMPT = partial(Row, device_type="cuda", dtype=_BF16, own=True)
TABLE: tuple[Row, ...] = (
    Row("int4", "cpu", _BF16, "int4_pack", rows_multiple=16),
    Row("int8_row", "cpu", _BF16, "int8_pack"),
    *(
        Row(name, "cpu", dtype, "weight_only_rows")
        for name in ("int4", "int8_row", "weight_only")
        for dtype in (_BF16, _FP32)
    ),
    *(Row("int8", "cpu", dtype, "int8_blocks") for dtype in (_BF16, _FP32)),
    *(Row("fp8", "cpu", dtype, "fp8_rows") for dtype in (_BF16, _FP32)),
    # A kernel may be proven before its neighbour: every row stands for itself.
    _STEP("dense", kernel="dense_skinny"),
    _STEP("int4", kernel="int4_w4_cuda", group_size=128),
    _STEP("int4", kernel="int4_skinny"),
    _PROMPT("int4", kernel="int4_expand"),
    _STEP("int8_row", kernel="int8_row_skinny", columns_multiple=INT8_COLUMNS),
    _PROMPT("int8_row", kernel="int8_expand"),
    _STEP("int8", kernel="int8_skinny"),
    _PROMPT("int8", kernel="int8_gemm"),
    _STEP("fp8", kernel="fp8_skinny", min_sm=_FP8),
    _PROMPT("fp8", kernel="fp8_scaled_mm", min_sm=_FP8, rows_multiple=16, columns_multiple=16),
    *(
        Row(name, "cuda", dtype, kernel)
        for name, kernel in (
            ("int4", "weight_only_reference"),
            ("int8_row", "weight_only_reference"),
            ("weight_only", "weight_only_reference"),
            ("int8", "int8_reference"),
            ("fp8", "fp8_reference"),
        )
        for dtype in (_BF16, _FP32)
    ),
    *(
        Row("dense", device_type, dtype, "dense")
        for device_type in ("cpu", "cuda")
        for dtype in (_BF16, torch.float16, _FP32)
    ),
)
