"""The sequence table: where the sequences of a decode step lie, as the kernels read it.

One row of int64 per slot of the step. A captured graph holds the address of the table and nothing
of what is in it, so one graph serves every arena and every length: the host writes the table, the
kernels read addresses and lengths on the device.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

K_ADDRESS, V_ADDRESS, CAPACITY, LENGTH, K_SCALES, V_SCALES = range(6)
COLUMNS = 6
INACTIVE = -1
"""LENGTH of a slot without a sequence: the kernels write nothing for it and give zeros."""
_EMPTY = (0, 0, 0, INACTIVE, 0, 0)


@dataclass(frozen=True)
class Sequence:
    """One slot: a KV arena [L, K, capacity, D], contiguous, and its ``length`` tokens so far.

    Addresses are ``data_ptr()`` of the first element. ``k_scales`` and ``v_scales``, of float32
    [L, K, capacity], are both zero where the arena holds no codes.
    """

    k: int
    v: int
    capacity: int
    length: int
    k_scales: int = 0
    v_scales: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.length <= self.capacity:
            raise ValueError(
                f"a sequence of {self.length} tokens does not fit an arena of {self.capacity}."
            )
        if (self.k_scales == 0) != (self.v_scales == 0):
            raise ValueError("give the addresses of both scales of a sequence, or of neither.")
        for name in ("k", "v"):
            address = getattr(self, name)
            if address <= 0 or address % 16:
                raise ValueError(
                    f"address {address:#x} of {name} is not that of an arena: the kernels load 16 "
                    "bytes at once; give data_ptr() of a whole tensor."
                )


def sequence_rows(rows: SequenceOf[Sequence | None]) -> list[tuple[int, ...]]:
    """The numbers of :func:`sequence_table`, row by row; raises like it."""
    if not rows:
        raise ValueError("a sequence table needs at least one slot.")
    coded = {row.k_scales != 0 for row in rows if row is not None}
    if len(coded) > 1:
        raise ValueError("one step cannot mix arenas of 8-bit codes with arenas of plain values.")
    return [
        _EMPTY
        if row is None
        else (row.k, row.v, row.capacity, row.length, row.k_scales, row.v_scales)
        for row in rows
    ]


def sequence_table(rows: SequenceOf[Sequence | None]) -> Tensor:
    """int64 [B, 6] on the CPU, one row per slot; None is a slot without a sequence.

    The columns are :data:`K_ADDRESS`, :data:`V_ADDRESS`, :data:`CAPACITY`, :data:`LENGTH` (tokens
    before this step, :data:`INACTIVE` for None), :data:`K_SCALES` and :data:`V_SCALES`. All slots
    of one table hold codes, or none does: a launch is compiled for one of the two.
    """
    return torch.tensor(sequence_rows(rows), dtype=torch.int64)
