"""Split-KV attention of a decode step against the reference, and the bits of its rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.aot import compile_variants
from helpers.arenas import DEVICE, copy_of, grown, poisoned_memory, random_arenas
from mmr5_kernels import attention_reference as reference
from mmr5_kernels.attention_reference import Arena

pytest.importorskip("triton", reason="needs Triton")
from mmr5_kernels.ops.decode_attention import CHUNK, decode_attention
from mmr5_kernels.ops.step_checks import KVFormat

LAYER = 1
KV = pytest.mark.parametrize("kv", ["bf16", "int8"])


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def step(
    lengths: Sequence[int | None],
    tokens: int,
    kv: KVFormat,
    *,
    heads: int = 2,
    kv_heads: int = 1,
    dim: int = 16,
    capacity: int | None = None,
) -> tuple[Tensor, list[Arena | None]]:
    """Queries [B*T, H, D] and arenas that hold the keys of the step, and NaN behind them."""
    generator = torch.Generator().manual_seed(len(lengths) + tokens + dim)
    sizes: dict[str, Any] = {"kv_heads": kv_heads, "dim": dim, "capacity": capacity}
    room = [None if n is None else n + tokens for n in lengths]
    if capacity is not None:
        room = [None if n is None else min(n, capacity) for n in room]
    arenas = random_arenas(room, generator, kv=kv, **sizes)
    held = [
        None if arena is None or n is None else grown(arena, n - arena.length)
        for arena, n in zip(arenas, lengths, strict=True)
    ]
    q = torch.randn(len(lengths) * tokens, heads, dim, generator=generator)
    return (2 * q).to(DEVICE, torch.bfloat16), held


def run(q: Tensor, arenas: Sequence[Arena | None], tokens: int, **options: Any) -> Tensor:
    longest = max(arena.length for arena in arenas if arena is not None) + tokens
    options = {"num_kv_heads": 1, "max_length": longest} | options
    table = reference.table_of(arenas).to(DEVICE)
    return decode_attention(q, table, LAYER, tokens=tokens, **options)


def assert_close(found: Tensor, q: Tensor, arenas: Sequence[Arena | None], kv_heads: int) -> None:
    tokens = len(q) // len(arenas)
    wide = q.float()  # so that the expected result is not rounded
    expected = reference.decode_attention(wide, arenas, LAYER, tokens=tokens, num_kv_heads=kv_heads)
    error = (found.float() - expected).square().mean().sqrt()
    # At worst half a step of 2**-8 in every weight, and another in the result.
    assert error <= 4e-3 * expected.square().mean().sqrt()
    for slot, arena in enumerate(arenas):
        rows = found[slot * tokens : (slot + 1) * tokens]
        assert rows.any(dim=1).all() if arena is not None else not rows.any()


@KV
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "tokens", "lengths"),
    [
        (4, 2, 64, 1, [CHUNK - 1, None, 5]),
        (7, 1, 128, 1, [CHUNK + 3]),
        (4, 2, 16, 3, [None, 2]),
        (2, 2, 48, 4, [3]),
        (3, 1, 32, 8, [CHUNK - 3]),
    ],
)
def test_equals_the_reference(
    heads: int,
    kv_heads: int,
    dim: int,
    tokens: int,
    lengths: Sequence[int | None],
    kv: KVFormat,
) -> None:
    q, arenas = step(lengths, tokens, kv, heads=heads, kv_heads=kv_heads, dim=dim)
    found = run(q, arenas, tokens, num_kv_heads=kv_heads, kv=kv)
    assert found.dtype == torch.bfloat16 and tuple(found.shape) == (len(q), heads * dim)
    assert_close(found, q, arenas, kv_heads)


def test_the_most_rows_that_a_key_head_can_have() -> None:
    q, arenas = step([1], 8, "bf16", heads=8)
    assert_close(run(q, arenas, 8), q, arenas, 1)


@KV
@pytest.mark.parametrize("tokens", [1, 2])
def test_lengths_on_both_sides_of_every_border(kv: KVFormat, tokens: int) -> None:
    lengths = [0, 1, CHUNK - 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5, None]
    q, arenas = step(lengths, tokens, kv, heads=1)
    assert_close(run(q, arenas, tokens, kv=kv), q, arenas, 1)


@KV
def test_more_chunks_than_are_combined_at_once(kv: KVFormat, monkeypatch: Any) -> None:
    monkeypatch.setattr("mmr5_kernels.ops.decode_attention._STEP", 2)
    q, arenas = step([4 * CHUNK + 9, CHUNK + 1], 1, kv)
    assert_close(run(q, arenas, 1, kv=kv), q, arenas, 1)


@KV
def test_a_row_has_the_same_bits_in_any_company(kv: KVFormat) -> None:
    tokens, lengths = 8, [CHUNK - 3, None, 4]
    q, arenas = step(lengths, tokens, kv, heads=3)  # two tiles
    together = run(q, arenas, tokens, kv=kv)
    arena = arenas[0]
    assert arena is not None
    alone = run(q[:tokens], [arena], tokens, kv=kv, max_length=5 * CHUNK)
    assert torch.equal(alone, together[:tokens])
    for t in (2, 3, 7):  # the first on this side of a border, the last in the second tile
        # Without what came later, which a step of one token does not have yet.
        single = copy_of(grown(arena, t))
        for part in (single.k, single.v, single.k_scales, single.v_scales):
            if part is not None:
                unwritten = part[:, :, single.length + 1 :]
                unwritten.fill_(torch.nan if part.is_floating_point() else -128)
        assert torch.equal(run(q[t : t + 1], [single], 1, kv=kv), together[t : t + 1])


@KV
def test_a_full_arena_is_seen_up_to_its_end(kv: KVFormat) -> None:
    q, arenas = step([CHUNK - 2, CHUNK], 4, kv, capacity=CHUNK)
    assert_close(run(q, arenas, 4, kv=kv), q, arenas, 1)


def test_nonsense_gives_nan() -> None:
    q, arenas = step([CHUNK, 3, None], 1, "bf16")
    short = run(q, arenas, 1, max_length=CHUNK)
    assert short[0].isnan().all() and short[1].isfinite().all() and not short[2].any()
    mixed = run(q, arenas, 1, kv="int8")
    assert mixed[:2].isnan().all() and not mixed[2].any()
    arena = arenas[1]
    assert arena is not None
    arena.v[LAYER, 0, 1, 2] = torch.nan
    assert run(q, arenas, 1)[1].isnan().any()
    arena.k[LAYER, 0, 1, 2] = torch.nan
    assert run(q, arenas, 1)[1].isnan().all()


def test_what_does_not_fit_is_refused() -> None:
    q, arenas = step([3], 2, "bf16")
    with pytest.raises(ValueError, match="max_length is 0"):
        run(q, arenas, 2, max_length=0)
    with pytest.raises(ValueError, match="18 query heads over 2 key heads"):
        run(q.repeat(1, 9, 1), arenas, 2, num_kv_heads=2)
    with pytest.raises(ValueError, match="a head of 8 values"):
        run(q[..., :8].contiguous(), arenas, 2)
    with pytest.raises(ValueError, match="kv='fp8' is unknown"):
        run(q, arenas, 2, kv="fp8")
    with pytest.raises(ValueError, match="must be contiguous"):
        run(q.transpose(0, 1), arenas, 2)
    with pytest.raises(ValueError, match="0 tokens|not 0"):
        run(q, arenas, 0)


def test_it_compiles_for_ampere_and_hopper(tmp_path: Path) -> None:
    """Two programs per SM, and whole 16-byte loads of keys and values."""
    variants = ["attend bf16 128", "attend int8 128", "combine bf16 128"]
    found = compile_variants("mmr5_kernels.ops.decode_attention", only=variants, keep=tmp_path)
    assert {kernel.sm for kernel in found} == {80, 90}
    for kernel in found:
        assert kernel.spill_stores <= 8, kernel
        if kernel.name.startswith("attend"):
            assert kernel.registers <= 128 and kernel.shared <= 65536, kernel
            values = 2 if "bf16" in kernel.name else 1  # bytes of one
            ptx = (tmp_path / f"{kernel.name.replace(' ', '_')}_{kernel.sm}.ptx").read_text()
            vectors = 2 * CHUNK * 128 * values // 16 // (8 * 32)  # keys and values, per thread
            assert ptx.count("ld.global.v4.b32") == vectors + 2, kernel  # and two of queries
            assert not re.search(r"ld\.global(\.v2)?\.b(8|16)\b", ptx), kernel
