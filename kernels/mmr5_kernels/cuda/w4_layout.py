"""int4 weights in the order in which ``csrc/w4_linear.cu`` reads them.

Half the rows of W (N/2, rounded up) form its lower half; a unit is 16 of them and the 16 rows that
lie N/2 below, so that gate and up rows of SwiGLU meet. With U units and S = K/128 steps:

========== ============================= =====================================================
``codes``  [U, S, 2, 2, 32, 4] int32     half step, lower or upper tile, lane, word of 8 codes
``scales`` [U, S, 8, 4] bf16             lane / 4; rows g, g + 8 of the lower, the upper tile
``zeros``  [U, S, 8, 4] uint8            the same, zero point + 8; only when asymmetric
========== ============================= =====================================================

Which code is which nibble is said at the head of the source. Rows beyond N have scale 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmr5_kernels.layout import INT4_OFFSET, Format, unpack_int4
from mmr5_kernels.reference import Parts

COLUMNS = 128  # of a step; one group
ROWS = 16  # of a tile
_CHUNK = 64  # units packed at a time: 32 rows each, as int64 indices and bytes


def serves(format: Format | None) -> bool:
    """Whether weights of this format can be packed."""
    return (
        format is not None
        and (format.weights, format.group_size, format.scale) == ("int4", COLUMNS, "bf16")
        and format.activations is None
    )


def half(n: int) -> int:
    """Rows of the lower half of a weight of ``n`` rows."""
    return -(-n // 2)


def pack(format: Format, parts: Parts) -> dict[str, Tensor]:
    """The stored tensors of a weight, by suffix, as the table above has them, on their device.

    On a GPU it returns when the weight lies there, because the kernel does not wait for weights.
    Raises ``ValueError`` for a format that :func:`serves` does not name.
    """
    if not serves(format):
        raise ValueError(
            f"the CUDA W4 kernel takes int4 weights in groups of {COLUMNS} with bf16 scales, not "
            f"{format.name}; use kernels='triton'."
        )
    packed = parts["weight_packed"]
    n, steps = packed.shape[0], packed.shape[1] * 8 // COLUMNS
    units = -(-half(n) // ROWS)
    codes = torch.empty((units, steps, 2, 2, 32, 4), dtype=torch.int32, device=packed.device)
    for first in range(0, units, _CHUNK):
        rows, outside = _rows(n, range(first, min(first + _CHUNK, units)), packed.device)
        stored = unpack_int4(packed[rows]).add_(INT4_OFFSET).view(torch.uint8)
        stored[outside] = INT4_OFFSET
        codes[first : first + _CHUNK] = _tiles(stored)
    rows, outside = _rows(n, range(units), packed.device)
    made = {"codes": codes, "scales": _by_group(parts["weight_scale"], rows, outside)}
    if not format.symmetric:
        zero = (parts["weight_zero_point"] + INT4_OFFSET).view(torch.uint8)
        made["zeros"] = _by_group(zero, rows, outside)
    if packed.is_cuda:
        torch.cuda.synchronize(packed.device)
    return made


def unpack(made: Parts, n: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [N, K] int8 in -8..7, scales [N, K/128] bf16 and zero points (or None) of :func:`pack`.

    Raises nothing; the packed tensors are taken to be whole.
    """
    codes = made["codes"]
    units, steps = codes.shape[:2]
    rows, outside = _rows(n, range(units), codes.device)
    inside = ~outside
    pairs = codes.contiguous().view(torch.uint8).view(units, steps, 2, 2, 8, 4, 2, 2, 4)
    nibbles = torch.stack((pairs & 15, pairs >> 4), dim=-1)
    # unit, step, half, tile, g, q, v, j % 2, then nibble = 4 column + 2 pair + row half
    nibbles = nibbles.view(units, steps, 2, 2, 8, 4, 2, 2, 2, 2, 2)
    #                      0      1      2  3  4  5  6  7  8  9  10
    stored = nibbles.permute(0, 3, 10, 4, 1, 2, 6, 5, 7, 9, 8).reshape(-1, steps * COLUMNS)
    unpacked = torch.empty((n, steps * COLUMNS), dtype=torch.int8, device=codes.device)
    unpacked[rows[inside]] = stored.view(torch.int8)[inside] - INT4_OFFSET

    def ungrouped(grouped: Tensor) -> Tensor:
        by_row = grouped.unflatten(-1, (2, 2)).permute(0, 3, 4, 2, 1).reshape(-1, steps)
        back = torch.empty((n, steps), dtype=grouped.dtype, device=grouped.device)
        back[rows[inside]] = by_row[inside]
        return back

    if "zeros" not in made:
        return unpacked, ungrouped(made["scales"]), None
    zero = ungrouped(made["zeros"]).view(torch.int8) - INT4_OFFSET
    return unpacked, ungrouped(made["scales"]), zero


def _rows(n: int, units: range, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of W in the order of these units, and which of them are none (those say row 0)."""
    lower = torch.arange(units.start * ROWS, units.stop * ROWS, device=device).view(-1, 1, ROWS)
    rows = torch.cat((lower, lower + half(n)), dim=1)
    outside = ((lower >= half(n)) | (rows >= n)).flatten()
    return rows.flatten().masked_fill(outside, 0), outside


def _tiles(stored: Tensor) -> Tensor:
    """Codes 0..15 [units * 32, K] uint8 -> words [units, K/128, 2, 2, 32, 4]."""
    # unit, tile, row half, g; step, half, v, q, j % 2, pair, column
    whole = stored.view(-1, 2, 2, 8, stored.shape[1] // COLUMNS, 2, 2, 4, 2, 2, 2)
    #                    0  1  2  3  4                            5  6  7  8  9  10
    nibbles = whole.permute(0, 4, 5, 1, 3, 7, 6, 8, 10, 9, 2).reshape(-1, 2)
    words = (nibbles[:, 0] | nibbles[:, 1] << 4).view(torch.int32)
    return words.view(-1, whole.shape[4], 2, 2, 32, 4)


def _by_group(values: Tensor, rows: Tensor, outside: Tensor) -> Tensor:
    """[N, S] -> [U, S, 8, 4]; zero where there is no row."""
    taken = values[rows]
    taken[outside] = 0
    whole = taken.view(-1, 2, 2, 8, values.shape[1])  # unit, tile, row half, g, step
    return whole.permute(0, 4, 3, 1, 2).reshape(-1, values.shape[1], 8, 4).contiguous()
