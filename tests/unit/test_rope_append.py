"""Rotation and append of a decode step against the reference, to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.aot import compile_variants
from helpers.arenas import (
    DEVICE,
    copies,
    copy_of,
    grown,
    poisoned_memory,
    random_arena,
    random_arenas,
    same_bits,
)
from mmr5_kernels import attention_reference as reference
from mmr5_kernels.attention_reference import quantize_kv
from mmr5_runtime.rope import apply_rotary

pytest.importorskip("triton", reason="needs Triton")
from mmr5_kernels.ops.rope_append import rope_append
from mmr5_kernels.ops.step_checks import KVFormat

ANGLES = 40
LAYER = 1


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def table_of(arenas: Sequence[reference.Arena | None]) -> Tensor:
    return reference.table_of(arenas).to(DEVICE)


def inputs(rows: int, heads: int, dim: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """qkv, positions, cos and sin of a step."""
    angles = torch.randn(ANGLES, dim // 2, generator=generator) * 9
    parts = (
        torch.randn(rows, heads * dim, generator=generator).bfloat16(),
        torch.randint(0, ANGLES, (rows,), generator=generator),
        angles.cos().bfloat16(),
        angles.sin().bfloat16(),
    )
    return tuple(part.to(DEVICE) for part in parts)


@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "tokens", "lengths"),
    [
        (4, 2, 64, 1, [0, 5, None]),
        (7, 1, 128, 2, [3]),
        (9, 3, 16, 3, [None, 2]),
        (5, 5, 48, 4, [7]),
        (6, 1, 32, 8, [1]),
    ],
)
def test_queries_and_arenas_equal_the_reference(
    heads: int,
    kv_heads: int,
    dim: int,
    tokens: int,
    lengths: Sequence[int | None],
    kv: KVFormat,
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    rows = len(lengths) * tokens
    qkv, positions, cos, sin = inputs(rows, heads + 2 * kv_heads, dim, generator)
    qkv[0, -dim:] = 0  # a value of zeros has a scale too
    arenas = random_arenas(lengths, generator, kv_heads=kv_heads, dim=dim, kv=kv)
    expected_arenas = copies(arenas)
    shape: dict[str, Any] = {"tokens": tokens, "num_heads": heads, "num_kv_heads": kv_heads}
    expected = reference.rope_append(qkv, positions, cos, sin, expected_arenas, LAYER, **shape)
    found = rope_append(qkv, positions, cos, sin, table_of(arenas), LAYER, kv=kv, **shape)
    assert torch.equal(found, expected)
    assert same_bits(arenas, expected_arenas)
    for slot, arena in enumerate(arenas):
        if arena is None:
            assert not found[slot * tokens : (slot + 1) * tokens].any()
        else:
            held = arena.read(LAYER, arena.length + tokens)[0]
            assert held.isfinite().all()


def test_the_reference_rotates_as_the_decoder() -> None:
    generator = torch.Generator().manual_seed(1)
    qkv, positions, cos, sin = inputs(5, 3, 32, generator)
    x = qkv.view(5, 3, 32)
    turned = reference.rotate(x, cos[positions], sin[positions])
    assert torch.equal(turned, apply_rotary(x, cos[positions], sin[positions]))


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_a_full_arena_drops_what_is_beyond_it(kv: KVFormat) -> None:
    generator = torch.Generator().manual_seed(2)
    arenas = random_arenas([8, 10], generator, kv_heads=1, dim=16, kv=kv, capacity=10)
    qkv, positions, cos, sin = inputs(8, 4, 16, generator)
    expected = copies(arenas)
    shape: dict[str, Any] = {"tokens": 4, "num_heads": 2, "num_kv_heads": 1}
    q = reference.rope_append(qkv, positions, cos, sin, expected, LAYER, **shape)
    found = rope_append(qkv, positions, cos, sin, table_of(arenas), LAYER, kv=kv, **shape)
    assert torch.equal(found, q) and same_bits(arenas, expected)


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_eight_steps_of_one_token_leave_the_bits_of_one_of_eight(kv: KVFormat) -> None:
    generator = torch.Generator().manual_seed(3)
    arena = random_arena(6, generator, kv_heads=2, dim=16, kv=kv)
    together = copy_of(arena)
    qkv, positions, cos, sin = inputs(8, 8, 16, generator)
    heads: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2}
    table = table_of([together])
    q = rope_append(qkv, positions, cos, sin, table, LAYER, tokens=8, kv=kv, **heads)
    for t in range(8):
        row = (qkv[t : t + 1], positions[t : t + 1], cos, sin)
        table = table_of([grown(arena, t)])
        alone = rope_append(*row, table, LAYER, tokens=1, kv=kv, **heads)
        assert torch.equal(alone, q[t : t + 1])
    assert same_bits([arena], [together])


def test_nonsense_gives_nan_and_writes_nothing() -> None:
    generator = torch.Generator().manual_seed(4)
    arena = random_arena(2, generator, kv_heads=1, dim=16)
    before = copy_of(arena)
    qkv, positions, cos, sin = inputs(1, 4, 16, generator)
    shape: dict[str, Any] = {"tokens": 1, "num_heads": 2, "num_kv_heads": 1}
    q = rope_append(qkv, positions, cos, sin, table_of([arena]), LAYER, kv="int8", **shape)
    assert q.isnan().all() and same_bits([arena], [before])
    for position in (-1, ANGLES):
        at = torch.tensor([position], device=DEVICE)
        q = rope_append(qkv, at, cos, sin, table_of([arena]), LAYER, **shape)
        assert q.isnan().all() and arena.k[LAYER, :, 2].isnan().all()


def test_what_is_not_finite_stays_so_in_eight_bits() -> None:
    x = torch.ones(3, 16)
    x[0, 3], x[1, 4] = torch.nan, torch.inf
    codes, scale = quantize_kv(x)
    back = reference.dequantize_kv(codes, scale, torch.float32)
    assert not back[:2].isfinite().any(dim=1).all() and torch.equal(back[2], x[2])
    arena = random_arena(1, torch.Generator().manual_seed(5), kv_heads=1, dim=16, kv="int8")
    assert arena.v_scales is not None
    qkv = torch.cat((torch.ones(1, 32), x[:1]), dim=1).to(DEVICE, torch.bfloat16)
    flat = torch.ones(1, 8, device=DEVICE).bfloat16()
    shape: dict[str, Any] = {"tokens": 1, "num_heads": 1, "num_kv_heads": 1}
    at = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    rope_append(qkv, at, flat, flat, table_of([arena]), LAYER, kv="int8", **shape)
    assert arena.v_scales[LAYER, 0, 1].isnan()


def test_what_does_not_fit_is_refused() -> None:
    generator = torch.Generator().manual_seed(6)
    arena = random_arena(2, generator, kv_heads=1, dim=16)
    qkv, positions, cos, sin = inputs(2, 4, 16, generator)
    table = table_of([arena])
    shape: dict[str, Any] = {"tokens": 2, "num_heads": 2, "num_kv_heads": 1}
    with pytest.raises(ValueError, match=r"give \[B\*T, 80\]"):
        rope_append(qkv, positions, cos, sin, table, 0, **shape | {"num_heads": 3})
    with pytest.raises(ValueError, match="one int64 position per row"):
        rope_append(qkv, positions[:1], cos, sin, table, 0, **shape)
    with pytest.raises(ValueError, match="must be int64"):
        rope_append(qkv, positions.int(), cos, sin, table, 0, **shape)
    with pytest.raises(ValueError, match="1 to 8 tokens"):
        rope_append(qkv, positions, cos, sin, table, 0, **shape | {"tokens": 9})
    with pytest.raises(ValueError, match="one row of 6 columns per slot"):
        rope_append(qkv, positions, cos, sin, table, 0, **shape | {"tokens": 1})
    with pytest.raises(ValueError, match="bfloat16 rows"):
        rope_append(qkv.float(), positions, cos, sin, table, 0, **shape)


def test_it_compiles_for_ampere_and_hopper_without_spills() -> None:
    found = compile_variants("mmr5_kernels.ops.rope_append", only=["int8 128"])
    assert {kernel.sm for kernel in found} == {80, 90}
    assert all(kernel.spill_stores == 0 for kernel in found)
