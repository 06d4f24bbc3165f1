"""Windowed attention of the vision tower, with the rotation of q and k: one launch for a page.

A page has windows of up to four sizes, so torch needs a call per size and a pass over q and k for
the rotation before. Here a program is one window of one head: a window of 8 x 8 patches and its 64
x 64 scores fit into registers, so there is no loop over keys. Where windows begin and how long they
are is a table on the device. Specification:
:func:`mmr5_kernels.vision_reference.rotary_window_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmr5_kernels.ops.common import WIDE, dot, to_bf16
from mmr5_kernels.vision_reference import LONGEST_WINDOW

LOG2_E = 1.4426950408889634
# Fused multiply-adds would round the rotation once where torch rounds twice.
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def load_turned(
    x, cos, sin, rows, present, row_stride, HALF: tl.constexpr, WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """``rows`` [n] of one head, rotated: [n, WIDTH] bf16; ``x``, cos and sin point to row 0.

    Zeros where ``present`` is false and behind the 2 * HALF values of a head. To have the bits of
    the reference, the launch must forbid fused multiply-adds.
    """
    d = tl.arange(0, WIDTH)
    is_first = d < HALF
    partner = tl.where(is_first, d + HALF, d - HALF)
    angle = tl.where(is_first, d, partner)
    mask = present[:, None] & (d < 2 * HALF)[None, :]
    first = rows[:, None] * row_stride
    own = tl.load(x + (first + d[None, :]), mask=mask, other=0.0).to(tl.float32)
    other = tl.load(x + (first + partner[None, :]), mask=mask, other=0.0).to(tl.float32)
    angles = rows[:, None] * HALF + angle[None, :]
    c = tl.load(cos + angles, mask=mask, other=0.0)
    s = tl.load(sin + angles, mask=mask, other=0.0)
    return to_bf16(own * c + tl.where(is_first[None, :], -other, other) * s, WIDE)


@triton.jit
def window_kernel(
    qkv, cos, sin, windows, out, scale_log2,
    HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, LENGTH: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Program (head, window). WIDTH >= DIM and LENGTH >= every window are powers of two."""
    head, window = tl.program_id(0), tl.program_id(1)
    start = tl.load(windows + 2 * window).to(tl.int64)
    length = tl.load(windows + 2 * window + 1)
    rows = tl.arange(0, LENGTH)
    present = rows < length
    stride = 3 * HEADS * DIM
    # One wide offset for the window: inside it 32 bits do, and take half the registers.
    x = qkv + start * stride + head * DIM
    cos += start * (DIM // 2)
    sin += start * (DIM // 2)
    out += start * (HEADS * DIM) + head * DIM
    q = load_turned(x, cos, sin, rows, present, stride, DIM // 2, WIDTH, WIDE)
    k = load_turned(x + HEADS * DIM, cos, sin, rows, present, stride, DIM // 2, WIDTH, WIDE)
    scores = dot(q, tl.trans(k), tl.zeros((LENGTH, LENGTH), dtype=tl.float32), WIDE)
    scores = tl.where(present[None, :], scores * scale_log2, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    total = tl.sum(weights, axis=1)
    d = tl.arange(0, WIDTH)
    mask = present[:, None] & (d < DIM)[None, :]
    places = rows[:, None] * stride + (2 * HEADS * DIM + d)[None, :]
    v = tl.load(x + places, mask=mask, other=0.0)
    sums = dot(to_bf16(weights, WIDE), v, tl.zeros((LENGTH, WIDTH), dtype=tl.float32), WIDE)
    places = rows[:, None] * (HEADS * DIM) + d[None, :]
    tl.store(out + places, to_bf16(sums / total[:, None], WIDE), mask=mask)


def rotary_window_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, windows: Tensor, *, longest: int
) -> Tensor:
    """Rotates q and k of a page and attends inside each of its windows.

    qkv [P, 3, H, D] bfloat16, contiguous; cos, sin [P, D/2] float32; windows [W, 2] int32 on the
    device, first patch and number of patches of each window, which together hold every patch once;
    ``longest``: patches of the largest. Returns [P, H * D] bfloat16. Raises ValueError on other
    shapes and dtypes, and for windows of more than ``LONGEST_WINDOW`` patches.
    """
    _check(qkv, cos, sin, windows, longest)
    patches, _, heads, dim = qkv.shape
    out = torch.empty(patches, heads * dim, dtype=qkv.dtype, device=qkv.device)
    scale = dim**-0.5 * LOG2_E
    window_kernel[(heads, len(windows))](
        qkv, cos, sin, windows, out, scale, **_constants(heads, dim, longest),
        **_OPTIONS,
    )  # fmt: skip
    return out


def _constants(heads: int, dim: int, longest: int) -> dict[str, Any]:
    width, length = (max(16, triton.next_power_of_2(n)) for n in (dim, longest))
    return {"HEADS": heads, "DIM": dim, "WIDTH": width, "LENGTH": length, "WIDE": WIDE}


def _check(qkv: Tensor, cos: Tensor, sin: Tensor, windows: Tensor, longest: int) -> None:
    if qkv.ndim != 4 or qkv.dtype != torch.bfloat16 or not qkv.is_contiguous():
        raise ValueError(
            f"qkv {list(qkv.shape)} of {qkv.dtype} is no contiguous bfloat16 [P, 3, H, D]; use the "
            "portable path for other dtypes."
        )
    patches, three, _, dim = qkv.shape
    for table in (cos, sin):
        fits = three == 3 and tuple(table.shape) == (patches, dim // 2) and table.is_contiguous()
        if not fits or table.dtype != torch.float32 or dim % 2:
            raise ValueError(
                f"rotary table {list(table.shape)} of {table.dtype} does not belong to qkv "
                f"{list(qkv.shape)}; give [P, D/2] float32."
            )
    table_fits = windows.ndim == 2 and windows.shape[1] == 2 and windows.is_contiguous()
    if not table_fits or windows.dtype != torch.int32:
        raise ValueError(
            f"windows {list(windows.shape)} of {windows.dtype} is no table of (first patch, "
            "patches); give [W, 2] int32."
        )
    if not 1 <= longest <= LONGEST_WINDOW:
        raise ValueError(
            f"windows of up to {longest} patches are not in 1 to {LONGEST_WINDOW}; use the "
            "portable path for larger ones."
        )


def variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """What to compile ahead of time: name, kernel, argument types, constexprs, options."""
    types = {
        "qkv": "*bf16", "cos": "*fp32", "sin": "*fp32", "windows": "*i32", "out": "*bf16",
        "scale_log2": "fp32",
    }  # fmt: skip
    for heads, dim, longest in ((16, 80, 64), (4, 16, 64)):
        constants = _constants(heads, dim, longest) | {"WIDE": False}
        yield f"window D={dim}", window_kernel, types, constants, _OPTIONS
