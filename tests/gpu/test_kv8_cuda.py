"""8-bit keys and values on a GPU: warm equals cold, and kernels write what prompts are made of."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.pictures import noise
from helpers.reading import forgetful, load, read, remember

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("quant", ["bf16", "int8", "int4"])
def test_warm_is_cold(tiny_engine: Callable[[str], Path], quant: str) -> None:
    loaded = load(tiny_engine(quant), "bfloat16", device="cuda", kv="int8")
    pages = [noise(56, 56 + 28 * (i % 4), i) for i in range(8)]
    memory, chooser = remember(loaded), random.Random(quant)
    remembered = 0
    for number in range(20):
        chosen = chooser.sample(pages, chooser.randint(2, 6)) if number % 3 else pages[:3]
        warm = read(loaded, memory, chosen)
        assert warm.cursor.arena.k.dtype == torch.int8
        assert warm.equals(read(loaded, forgetful(loaded), chosen))
        remembered += warm.counts.segments_remembered
    assert remembered > 20


def test_appended_tokens_have_the_codes_that_the_arena_gives_them() -> None:
    """What a decode step writes is what reading the same keys in a prompt would have stored."""
    from mmr5_kernels.attention_reference import quantize_kv
    from mmr5_kernels.ops.rope_append import rope_append
    from mmr5_kernels.sequences import Sequence, sequence_table

    generator = torch.Generator("cuda").manual_seed(1)
    heads, kv_heads, dim, tokens = 28, 4, 128, 8
    shape = (1, kv_heads, tokens, dim)
    codes = [torch.empty(shape, dtype=torch.int8, device="cuda") for _ in range(2)]
    scales = [torch.empty(shape[:3], dtype=torch.float32, device="cuda") for _ in range(2)]
    width = (heads + 2 * kv_heads) * dim
    qkv = torch.randn(tokens, width, device="cuda", generator=generator).bfloat16()
    flat = torch.ones(1, dim // 2, dtype=torch.bfloat16, device="cuda")
    (k, v), (k_scales, v_scales) = ([x.data_ptr() for x in parts] for parts in (codes, scales))
    rope_append(
        qkv,
        torch.zeros(tokens, dtype=torch.int64, device="cuda"),
        flat,
        torch.zeros_like(flat),
        sequence_table([Sequence(k, v, tokens, 0, k_scales, v_scales)]).cuda(),
        0,
        tokens=tokens,
        num_heads=heads,
        num_kv_heads=kv_heads,
        kv="int8",
    )
    parts = qkv.view(tokens, -1, dim)[:, heads:].transpose(0, 1).split(kv_heads)
    for part, code, scale in zip(parts, codes, scales, strict=True):
        expected = quantize_kv(part)
        assert torch.equal(code[0], expected[0]) and torch.equal(scale[0], expected[1])
