"""A check of a kernel: what it speaks for, and how far off it may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmr5_bench.kernels_bench.operands import FORMATS, deviation


@dataclass(frozen=True)
class Finding:
    """How far a result is from its reference, by mean square, and how far it may be.

    0 is allowed where results have to be equal bit for bit.
    """

    error: float
    allowed: float

    @property
    def is_right(self) -> bool:
        """Infinite errors (another shape, NaN) never are."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class Case:
    """One comparison. ``kernels`` are the names in ``proven.json`` that it is part of the proof of.

    ``check`` draws new inputs, runs the kernel and its reference, and compares.
    """

    kernels: tuple[str, ...]
    name: str
    check: Callable[[], Finding]


def near(found: Tensor, wanted: Tensor, allowed: float) -> Finding:
    """Within ``allowed`` of the reference, relative, by mean square."""
    return Finding(deviation(found, wanted).rms, allowed)


def same(found: Tensor, wanted: Tensor) -> Finding:
    """Equal bit for bit; a difference is as large as it is."""
    if found.shape == wanted.shape and found.dtype == wanted.dtype and torch.equal(found, wanted):
        return Finding(0.0, 0.0)
    error = deviation(found.float(), wanted.float()).rms
    return Finding(error or float("inf"), 0.0)


def worst(*findings: Finding) -> Finding:
    """The one that is furthest beyond what it may be."""
    return max(findings, key=lambda one: (not one.is_right, one.error - one.allowed))


@dataclass(frozen=True)
class Scale:
    """How large the checks are: true sizes on a GPU, tiny ones in the interpreter.

    ``heads`` are (query heads, key heads, dimension), ``lengths`` keys in an arena before a step,
    ``linears`` N x K of weights, ``rows`` the M on both sides of every switch, ``vocabulary`` of
    the greedy choice, ``pages`` rows and columns of patches, ``prompts`` and ``tokens`` of a step,
    ``formats`` of weights by name, ``vision_heads`` (heads, dimension).
    """

    heads: tuple[int, int, int]
    lengths: tuple[int, ...]
    linears: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    vocabulary: int
    pages: tuple[tuple[int, int], ...]
    prompts: tuple[int, ...]
    cached: tuple[int, ...]
    tokens: tuple[int, ...]
    formats: tuple[str, ...]
    vision_heads: tuple[tuple[int, int], ...]


TRUE = Scale(
    heads=(28, 4, 128),
    lengths=(0, 1, 127, 128, 129, 1000, 8191, 16400),
    # Of the 7B, narrow, wide and deep, and one that no tile divides.
    linears=((4608, 3584), (37888, 3584), (3584, 18944), (1008, 640)),
    rows=(1, 2, 8, 15, 16, 17, 33, 63, 64, 65, 100, 257, 1500),
    vocabulary=152064,
    pages=((44, 56), (64, 80), (6, 10), (2, 2)),
    prompts=(1, 17, 64, 65, 1000, 4099),
    cached=(0, 1, 100),
    tokens=(1, 3, 8),
    formats=tuple(FORMATS),
    vision_heads=((16, 80), (2, 32)),
)
TINY = Scale(
    heads=(4, 2, 16),
    lengths=(5,),
    linears=((32, 128),),
    rows=(1, 65),
    vocabulary=300,
    pages=((4, 6),),
    prompts=(19,),
    cached=(3,),
    tokens=(1, 3),
    formats=("bf16", "int4", "int8", "int8-weight-only", "fp8"),
    vision_heads=((2, 32),),
)
