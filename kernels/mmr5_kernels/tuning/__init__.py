"""Tile sizes of the Triton linears: data in the JSON files of this folder, read once.

``default.json`` serves every GPU; a file named after an SM, as ``sm_90.json``, replaces those of
its entries that were measured there. Both map a kernel family, then a class of shapes, to a
:class:`Tile`:

* families: ``dense``, ``int4``, ``int8_row``, ``int8``, ``fp8`` of :mod:`mmr5_kernels.dispatch`;
* classes: ``gated`` is a fused gate-up weight with SwiGLU; ``narrow`` has fewer than
  :data:`WIDE_ROWS` rows, too few to fill a GPU unless the columns are split over many warps;
  ``wide`` is every other.

No entry of ``default.json`` was measured: they follow from occupancy and instruction counts, and
fit the 99 KB of shared memory that a program has on sm_86 and sm_89.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

WIDE_ROWS = 16_384


@dataclass(frozen=True)
class Tile:
    """What one program of a decode linear computes, and with how much overlap.

    ``block_n`` rows of the weight (of each half when gated) times ``rows`` rows of x. ``split``
    blocks of 128 columns are in work at a time, one per warp. ``stages`` is the number of such
    steps that are loaded at once. All are powers of two but ``stages``.
    """

    block_n: int
    split: int
    stages: int
    rows: int


@cache
def tile(family: str, n: int, gated: bool, capability: tuple[int, int]) -> Tile:
    """The tile for a weight of n rows on a GPU of this capability."""
    shape_class = "gated" if gated else "narrow" if n < WIDE_ROWS else "wide"
    measured = _read("sm_{}{}.json".format(*capability)).get(family, {})
    return Tile(**measured.get(shape_class) or _read("default.json")[family][shape_class])


@cache
def digest() -> str:
    """SHA-256 in hex over all files of this folder: other tiles add up in another order."""
    found = hashlib.sha256()
    files = resources.files("mmr5_kernels.tuning").iterdir()
    for file in sorted(files, key=lambda file: file.name):
        if not file.name.endswith(".json"):
            continue
        content = file.read_bytes()
        found.update(f"{file.name} {len(content)}\n".encode() + content)
    return found.hexdigest()


@cache
def _read(name: str) -> dict[str, dict[str, dict[str, int]]]:
    file = resources.files("mmr5_kernels.tuning").joinpath(name)
    if not file.is_file():
        return {}
    found: dict[str, dict[str, dict[str, int]]] = json.loads(file.read_text(encoding="utf-8"))
    return found
