"""The CUDA path against the CPU path on the same tiny engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers.stored import FORMATS, format_name, random_parts
from mmr5_kernels import dispatch, reference
from mmr5_kernels.layout import Format
from mmr5_runtime import Reranker
from mmr5_runtime.loading import load_engine
from mmr5_runtime.model import embed_prompt, prefill
from mmr5_runtime.rope import mrope_positions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
QUANTS = ("bf16", "int8", "int8-weight-only", "fp8", "int4")
GRID = (1, 10, 14)


def _logits(engine: Path, device: str) -> torch.Tensor:
    loaded = load_engine(
        engine, device=device, dtype="float32", min_pixels=None, max_pixels=None, check_hashes=False
    )
    model, spec = loaded.engine.model, loaded.engine.spec
    pixels = torch.randn(140, spec.vision.patch_dim, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor(loaded.tokenizer.encode("What is shown?", [35]))
    positions, _ = mrope_positions(ids, [GRID], spec)
    embeds = embed_prompt(model, ids, [loaded.engine.encode_page(pixels, GRID)])
    arena = model.new_arena(len(ids))
    return prefill(model, embeds, positions, arena, all_logits=True).cpu()


@pytest.mark.parametrize("quant", QUANTS)
def test_logits_equal_those_of_the_cpu(tiny_engine: Callable[[str], Path], quant: str) -> None:
    expected = _logits(tiny_engine(quant), "cpu")
    found = _logits(tiny_engine(quant), "cuda")
    # These round activations: a last-bit difference before the rounding can move a code by one.
    tolerance = 5e-2 if quant in ("int8", "fp8") else 2e-3
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("format", FORMATS, ids=format_name)
def test_every_kernel_agrees_with_the_reference_on_the_cpu(
    format: Format, dtype: torch.dtype
) -> None:
    parts = random_parts(format, 208, 384)
    specified = {"int8": reference.linear_int8, "fp8": reference.linear_fp8}.get(
        format.activations or "", reference.linear_weight_only
    )
    prepared = dispatch.prepare(format, parts, dtype, "cuda")
    for m in (1, 17, 256):
        x = torch.randn(m, 384, generator=torch.Generator().manual_seed(m)).to(dtype)
        wanted = specified(x, format, parts)
        error = dispatch.run(prepared, x.cuda()).cpu().double() - wanted
        # Sums in another order; bf16 results then round differently here and there.
        assert error.norm() <= (1e-5 if dtype == torch.float32 else 4e-3) * wanted.double().norm()


@pytest.mark.parametrize("quant", QUANTS)
def test_reranks_in_bf16_and_repeats(tiny_engine: Callable[[str], Path], quant: str) -> None:
    pages = [Image.new("RGB", (60, 84), (80 * i, 90, 120)) for i in range(3)]
    with Reranker.load(tiny_engine(quant), "cuda") as reranker:
        results = [reranker.rerank("What is shown?", pages, max_new_tokens=16) for _ in range(2)]
    assert sorted(results[0].order) == [0, 1, 2]
    assert results[0].text == results[1].text
