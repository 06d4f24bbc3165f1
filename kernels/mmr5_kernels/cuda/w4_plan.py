"""How ``csrc/w4_linear.cu`` is launched: which variant, how many blocks, how much shared memory.

Nothing here changes a result but :attr:`Tuning.warps`, which decides the order of sums; it must not
depend on the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from mmr5_kernels.cuda import w4_layout

_STEP_BYTES = 2048
_SCALE_BYTES = 64
_ZERO_BYTES = 32
_SUM_STRIDE = 36
_X_PAD = 64
_SHARED_X_COLUMNS = 4096  # up to here all of a row of x is fetched before the first product
_MAX_ROWS = 16


@dataclass(frozen=True)
class Tuning:
    """Warps of a block, which split K, and slots of each warp's ring. Not tuned on a GPU yet.

    14 warps divide both widths of the model: 28 and 148 groups of 128 columns.
    """

    warps: int = 14
    stages: int = 3


DEFAULT = Tuning()


@dataclass(frozen=True)
class Gpu:
    """What a plan needs to know: multiprocessors, and the most shared memory a block can have."""

    sms: int
    shared_bytes: int


@dataclass(frozen=True)
class Variant:
    """One compilation of the source; ``tiles`` blocks of 8 rows of x."""

    warps: int
    stages: int
    tiles: int
    zeros: bool
    shared_x: bool

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        """The macros that the source expects. Two blocks shall fit an SM where one tile is used."""
        return (
            ("W4_WARPS", self.warps),
            ("W4_STAGES", self.stages),
            ("W4_TILES", self.tiles),
            ("W4_ZEROS", int(self.zeros)),
            ("W4_SHARED_X", int(self.shared_x)),
            ("W4_BLOCKS", 2 if self.tiles == 1 else 1),
        )

    def shared_bytes(self, rows: int, k: int) -> int:
        """Shared memory of a block that computes ``rows`` rows of x."""
        slot = _STEP_BYTES + _SCALE_BYTES + (_ZERO_BYTES if self.zeros else 0)
        x = 2 * k + _X_PAD if self.shared_x else 0
        return self.warps * (self.stages * slot + rows * _SUM_STRIDE * 4) + rows * x


@dataclass(frozen=True)
class Plan:
    """One launch: blocks along the units and along blocks of ``rows`` rows of x."""

    variant: Variant
    rows: int
    units: int
    grid: tuple[int, int]
    shared_bytes: int


@cache
def plan(
    m: int, n: int, k: int, zeros: bool, norm: bool, gpu: Gpu, tuning: Tuning = DEFAULT
) -> Plan:
    """The launch for x [m, k] and a weight [n, k].

    Up to 16 rows are computed at a time, fewer where shared memory does not hold them. Up to two
    units per SM each get a block, which are then all resident; more are dealt to one per SM.
    Raises ``ValueError`` when not even one row fits.
    """
    units = -(-w4_layout.half(n) // w4_layout.ROWS)
    for shared_x in (True, False):
        if (shared_x and not norm and k > _SHARED_X_COLUMNS) or (norm and not shared_x):
            continue
        for rows in range(min(m, _MAX_ROWS), 0, -1):
            for stages in sorted({tuning.stages, 2}, reverse=True):
                tiles = -(-rows // 8)
                variant = Variant(tuning.warps, stages, tiles, zeros, shared_x)
                if variant.shared_bytes(rows, k) <= gpu.shared_bytes:
                    blocks = -(-m // rows)
                    rows = -(-m // blocks)  # evenly
                    variant = Variant(tuning.warps, stages, -(-rows // 8), zeros, shared_x)
                    grid = (units if units <= 2 * gpu.sms else gpu.sms, blocks)
                    return Plan(variant, rows, units, grid, variant.shared_bytes(rows, k))
    raise ValueError(
        f"a linear with {k} columns{' behind a norm' if norm else ''} needs more shared memory "
        f"than the {gpu.shared_bytes} bytes of this GPU; use kernels='triton'."
    )
