"""How much memory a prepared weight takes, from its shape and format alone.

For messages and plans that are made before a weight is there; what :func:`dispatch.prepare` has
made says it itself (:attr:`dispatch.Prepared.num_bytes`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from mmr5_kernels import dispatch
from mmr5_kernels.cuda import w4_layout, w4_linear
from mmr5_kernels.layout import Format
from mmr5_kernels.skinny_layout import BLOCK, WORDS
from mmr5_kernels.table import DECODE_ROWS
from mmr5_kernels.target import Target

_EXPANDING = ("int4_expand", "int8_expand")
_WORD, _BF16 = 4, 2  # bytes


def weight_bytes(format: Format | None, target: Target, dtype: torch.dtype, n: int, k: int) -> int:
    """Bytes of a weight [n, k] in all the layouts that ``dispatch.prepare`` keeps; no bias.

    Raises ``ValueError`` where the table has no kernel for it.
    """
    names = dispatch.layouts(format, target, dtype, n, k)
    return sum(_LAYOUTS[name](format, dtype, n, k) for name in names)


def copy_bytes(format: Format, kind: str, n: int, k: int) -> int:
    """Bytes that :func:`eight_bit.eight_bit_copy` takes beside the weight it is made from."""
    if format.activations or (format.weights == kind and format.group_size is None):
        return 0  # there is none, or it shares the codes
    copied = Format(kind, activations=kind, scale="fp32")
    return _stored(copied, torch.bfloat16, n, k)


def scratch_bytes(format: Format | None, target: Target, dtype: torch.dtype, n: int, k: int) -> int:
    """Bytes of :class:`prefill.Scratch` that a prompt needs for a weight [n, k]; mostly 0."""
    kernel = dispatch.choose(format, target, dtype, DECODE_ROWS + 1, n, k)
    return n * k * _BF16 if kernel in _EXPANDING else 0


def _dense(format: Format | None, dtype: torch.dtype, n: int, k: int) -> int:
    return n * k * dtype.itemsize


def _stored(format: Format, dtype: torch.dtype, n: int, k: int) -> int:
    kept = (part for name, part in format.tensors(n, k).items() if name != "weight_shape")
    return sum(math.prod(shape) * kind.itemsize for shape, kind in kept)


def _repacked(format: Format, dtype: torch.dtype, n: int, k: int) -> int:
    return n * k // 2 + 2 * n * format.groups(k) * dtype.itemsize


def _skinny(format: Format, dtype: torch.dtype, n: int, k: int) -> int:
    per_group = _BF16 + (not format.symmetric)
    return -(-k // BLOCK) * n * WORDS * _WORD + n * format.groups(k) * per_group


def _w4_tiles(format: Format, dtype: torch.dtype, n: int, k: int) -> int:
    rows = 2 * w4_layout.ROWS * -(-w4_layout.half(n) // w4_layout.ROWS)
    per_group = w4_layout.COLUMNS // 2 + _BF16 + (not format.symmetric)
    return rows * (k // w4_layout.COLUMNS) * per_group


_LAYOUTS: Mapping[str, Callable[..., int]] = {
    "dense": _dense,
    "stored": _stored,
    "int4_repacked": _repacked,
    "skinny": _skinny,
    w4_linear.LAYOUT: _w4_tiles,
}
