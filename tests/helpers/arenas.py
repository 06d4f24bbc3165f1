"""Arenas for the kernels of a decode step: random tokens, and NaN wherever nothing was written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from mmr5_kernels.attention_reference import Arena, quantize_kv
from mmr5_kernels.ops.step_checks import KVFormat

LAYERS = 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors that nothing was written to hold NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def random_arena(
    length: int,
    generator: torch.Generator,
    *,
    kv_heads: int,
    dim: int,
    kv: KVFormat = "bf16",
    capacity: int | None = None,
) -> Arena:
    """An arena of two layers holding ``length`` tokens, by default with room for 9 more.

    Codes behind the tokens are -128, which is no code, and their scales are NaN.
    """
    shape = (2, LAYERS, kv_heads, length + 9 if capacity is None else capacity, dim)
    values = torch.full(shape, torch.nan)
    values[..., :length, :] = torch.randn(*shape[:3], length, dim, generator=generator)
    if kv == "bf16":
        k, v = values.to(DEVICE, torch.bfloat16)
        return Arena(k.clone(), v.clone(), length)
    codes, scales = quantize_kv(values.to(DEVICE))
    codes[..., length:, :] = -128
    return Arena(codes[0].clone(), codes[1].clone(), length, scales[0].clone(), scales[1].clone())


def random_arenas(
    lengths: Sequence[int | None],
    generator: torch.Generator,
    *,
    kv_heads: int,
    dim: int,
    kv: KVFormat = "bf16",
    capacity: int | None = None,
) -> list[Arena | None]:
    """A :func:`random_arena` per length; None for None."""
    make = partial(random_arena, kv_heads=kv_heads, dim=dim, kv=kv, capacity=capacity)
    return [None if n is None else make(n, generator) for n in lengths]


def copy_of(arena: Arena) -> Arena:
    """The same arena in memory of its own."""
    scales = (None if x is None else x.clone() for x in (arena.k_scales, arena.v_scales))
    return Arena(arena.k.clone(), arena.v.clone(), arena.length, *scales)


def copies(arenas: Sequence[Arena | None]) -> list[Arena | None]:
    """:func:`copy_of` each."""
    return [None if arena is None else copy_of(arena) for arena in arenas]


def grown(arena: Arena, tokens: int) -> Arena:
    """The same memory, taken to hold ``tokens`` more."""
    return Arena(arena.k, arena.v, arena.length + tokens, arena.k_scales, arena.v_scales)


def bits(arena: Arena) -> list[Tensor]:
    """What the arena holds as integers, so that NaN equals itself."""
    parts = (arena.k, arena.v, arena.k_scales, arena.v_scales)
    return [part.view(torch.uint8) for part in parts if part is not None]


def same_bits(arenas: Sequence[Arena | None], others: Sequence[Arena | None]) -> bool:
    """Whether all of these arenas hold the same, the memory behind their tokens included."""
    pairs = [(a, b) for a, b in zip(arenas, others, strict=True) if a is not None and b is not None]
    return all(torch.equal(x, y) for a, b in pairs for x, y in zip(bits(a), bits(b), strict=True))
