"""How the kernels for many rows are cut up: data, in ``tuning/prefill.json``.

The file maps "int8_gemm" to tiles by SM ("sm_90"). An SM it does not list gets the entry of the
nearest lower one, whose tiles also fit: shared memory of the architectures listed only shrinks
between 8.0 and 8.6, which has an entry of its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True)
class Tile:
    """Rows x columns of one program, the part of K it reads at a time, and how it is run.

    ``group_m`` blocks of rows are worked on side by side; ``stages`` parts of K are in flight.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    warps: int
    stages: int


@cache
def int8_tile(capability: tuple[int, int]) -> Tile:
    """The tile of the int8 product on a GPU of this compute capability, at least (8, 0)."""
    path = resources.files("mmr5_kernels").joinpath("tuning", "prefill.json")
    tiles = json.loads(path.read_text(encoding="utf-8"))["int8_gemm"]
    listed = {tuple(map(int, name.removeprefix("sm_").split("_"))): name for name in tiles}
    nearest = max(found for found in listed if found <= capability)
    return Tile(**tiles[listed[nearest]])
