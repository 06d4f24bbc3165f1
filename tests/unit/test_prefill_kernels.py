"""Linears for many rows, in the interpreter, against their references."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers.stored import format_name, random_parts
from mmr5_kernels import prefill, reference, skinny_layout, tiles
from mmr5_kernels.fused import Norm
from mmr5_kernels.layout import FP8, INT4, INT8, INT8_WEIGHT_ONLY, Format
from mmr5_kernels.ops import expand, int8_linear, quantize_rows
from mmr5_kernels.prefill import PLAIN, Around, Scratch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted; see tests/gpu")

BF16 = torch.bfloat16
TILE = tiles.int8_tile((8, 6))
INT8_WIDE = Format("int8", activations="int8", scale="fp32")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills what torch.empty gives, so that nothing unwritten is taken for a result."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def skinny(format: Format, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return skinny_layout.pack_skinny(format, parts)


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"), dtype=BF16)


def random_codes(m: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8)


@pytest.mark.parametrize(
    ("m", "n", "k"), [(65, 64, 128), (127, 33, 100), (128, 128, 64), (130, 257, 200), (1, 1, 1)]
)
def test_int8_products_equal_the_reference(m: int, n: int, k: int) -> None:
    codes, weight = random_codes(m, k, 1), random_codes(n, k, 2)
    x_scale, scale = torch.rand(m, 1) + 0.5, draw(n, 1).abs()
    bias, residual = draw(n, seed=3), draw(m, n, seed=4)
    total = reference.matmul_int8(codes, weight)
    for b in (None, bias):
        wanted = reference.rescale(total, x_scale, scale, b, BF16)
        found = int8_linear.int8_linear(codes, x_scale, weight, scale, b, tile=TILE)
        assert torch.equal(found, wanted)
    found = int8_linear.int8_linear(codes, x_scale, weight, scale, bias, residual, tile=TILE)
    assert torch.equal(found, residual + wanted)
    out = int8_linear.rescale(total, x_scale, scale, bias, residual, out=poisoned(m, n))
    assert torch.equal(out, found)


def test_tiles_change_nothing() -> None:
    codes, weight, x_scale = random_codes(130, 300, 1), random_codes(70, 300, 2), torch.rand(130, 1)
    scale = torch.rand(70, 1)
    wanted = int8_linear.int8_linear(codes, x_scale, weight, scale, tile=TILE)
    for m, n, k, group in ((32, 32, 32, 1), (64, 128, 256, 3)):
        tile = replace(TILE, block_m=m, block_n=n, block_k=k, group_m=group)
        found = int8_linear.int8_linear(codes, x_scale, weight, scale, tile=tile)
        assert torch.equal(found, wanted)


def test_the_largest_sums_are_exact() -> None:
    k = 18944
    codes = torch.full((2, k), 127, dtype=torch.int8)
    weight = torch.full((3, k), -127, dtype=torch.int8)
    weight[0, ::2], weight[1, 1:] = 126, 0
    one = torch.ones(3, 1)
    tile = replace(TILE, block_m=16, block_n=16, block_k=2048)
    found = int8_linear.int8_linear(codes, one[:2], weight, one, tile=tile)
    wanted = (codes.long() @ weight.long().T).float().to(BF16)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("format", [INT8, INT8_WIDE], ids=format_name)
def test_w8a8_equals_the_reference(format: Format) -> None:
    m, n, k = 66, 48, 96
    parts, x, bias, residual = random_parts(format, n, k), draw(m, k), draw(n), draw(m, n, seed=1)
    x[7] = 0
    wanted = residual + reference.linear_int8(x, format, parts, bias)
    for kernel in (prefill.int8_gemm, prefill.int8_int_mm):
        found = kernel(x, format, parts, bias, Around(residual=residual))
        assert torch.equal(found, wanted)
    assert torch.equal(wanted[7], residual[7] + bias)


def test_int_mm_in_several_parts_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, x = random_parts(INT8, 40, 64), draw(70, 64)
    whole = prefill.int8_int_mm(x, INT8, parts, None, PLAIN)
    monkeypatch.setattr(prefill, "_TOTALS", 40 * 20)
    assert torch.equal(prefill.int8_int_mm(x, INT8, parts, None, PLAIN), whole)


def test_scaled_mm_gets_what_it_wants() -> None:
    # torch runs the rowwise product on a CPU as well, so that this is the whole kernel.
    parts, x, bias, residual = random_parts(FP8, 48, 96), draw(65, 96), draw(48), draw(65, 48)
    x[3] = 0
    for b in (None, bias):
        wanted = reference.linear_fp8(x, FP8, parts, b)
        found = prefill.fp8_scaled_mm(x, FP8, parts, b, PLAIN)
        # fp32 sums in another order: few results are rounded to the other neighbour in bf16.
        assert (found != wanted).float().mean() <= 0.01
        torch.testing.assert_close(found, wanted, rtol=2**-7, atol=0)
    added = prefill.fp8_scaled_mm(x, FP8, parts, b, Around(residual=residual))
    assert torch.equal(added, residual + found)


@pytest.mark.parametrize(
    ("format", "n", "k"),
    [
        (INT4, 33, 128),
        (INT4, 64, 384),
        (Format("int4", 64, symmetric=False), 40, 192),
        (Format("int4", 32), 33, 96),
        (Format("int4", 32, symmetric=False), 1, 288),
    ],
)
def test_int4_expands_to_the_weight_it_stands_for(format: Format, n: int, k: int) -> None:
    parts = random_parts(format, n, k)
    packed, out = skinny(format, parts), poisoned(n, k)
    group = format.group_size or 0
    expand.expand_int4(packed["weight"], packed["scale"], packed.get("zero"), group, out)
    assert torch.equal(out, reference.dequantize(format, parts, BF16))


@pytest.mark.parametrize(("n", "k"), [(3, 100), (5, 2049)])
def test_int8_expands_to_the_weight_it_stands_for(n: int, k: int) -> None:
    parts = random_parts(INT8_WEIGHT_ONLY, n, k)
    out = expand.expand_int8(parts["weight"], parts["weight_scale"], poisoned(n, k))
    assert torch.equal(out, reference.dequantize(INT8_WEIGHT_ONLY, parts, BF16))


Kernel = tuple[prefill.Product, Format | None, Callable[[dict[str, Tensor]], dict[str, Tensor]]]
KERNELS: dict[str, Kernel] = {
    "dense": (prefill.dense, None, lambda parts: parts),
    "int4_expand": (prefill.int4_expand, INT4, lambda parts: skinny(INT4, parts)),
    "int8_expand": (prefill.int8_expand, INT8_WEIGHT_ONLY, lambda parts: parts),
    "int8_gemm": (prefill.int8_gemm, INT8, lambda parts: parts),
    "int8_int_mm": (prefill.int8_int_mm, INT8, lambda parts: parts),
    "fp8_scaled_mm": (prefill.fp8_scaled_mm, FP8, lambda parts: parts),
}


@pytest.mark.parametrize("name", list(KERNELS))
def test_norm_gate_and_residual_are_those_of_passes_of_their_own(name: str) -> None:
    kernel, format, laid_out = KERNELS[name]
    m, n, k = 65, 48, 128
    operands = laid_out(random_parts(format, n, k))
    bias, residual, norm = draw(n), draw(m, n, seed=2), Norm(draw(k, seed=3), 1e-6)
    scratch = Scratch()
    for gated in (False, True):
        x = draw(m, 2 * k if gated else k, seed=5)
        alone = quantize_rows.swiglu(x) if gated else quantize_rows.rms_norm(x, norm)
        wanted = residual + kernel(alone, format, operands, bias, PLAIN)
        around = Around(None if gated else norm, gated, residual, scratch)
        found = kernel(x, format, operands, bias, around)
        assert found.dtype == BF16 and torch.equal(found, wanted)
        assert torch.equal(kernel(x, format, operands, bias, around), found)


def test_expanded_weights_share_their_memory() -> None:
    scratch, cpu = Scratch(), torch.device("cpu")
    with scratch.weight(8, 16, cpu) as large:
        address = large.data_ptr()
    with scratch.weight(3, 5, cpu) as small:
        assert small.shape == (3, 5) and small.is_contiguous() and small.data_ptr() == address
    scratch.reserve(9, 16, cpu)
    assert scratch.num_bytes == 9 * 16 * 2


def test_threads_share_one_block_and_never_at_the_same_time() -> None:
    scratch, cpu, busy = Scratch(), torch.device("cpu"), threading.Lock()

    def expand(value: int) -> int:
        with scratch.weight(64, 64, cpu) as weight:
            assert busy.acquire(blocking=False), "two weights in one block"
            weight.fill_(value)
            time.sleep(0.001)
            assert bool((weight == value).all())
            busy.release()
            return weight.data_ptr()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(expand, range(32)))) == 1
    assert scratch.num_bytes == 64 * 64 * 2


def test_a_product_that_fails_frees_the_block() -> None:
    scratch, parts = Scratch(), random_parts(INT4, 48, 128)
    operands = skinny(INT4, parts)
    with pytest.raises(RuntimeError):
        prefill.int4_expand(draw(65, 64), INT4, operands, None, Around(scratch=scratch))
    found = prefill.int4_expand(draw(65, 128), INT4, operands, None, Around(scratch=scratch))
    assert found.shape == (65, 48)


def test_tiles_are_those_of_the_nearest_gpu_below() -> None:
    assert tiles.int8_tile((8, 7)) == tiles.int8_tile((8, 6)) == tiles.int8_tile((8, 9))
    assert tiles.int8_tile((9, 0)) != tiles.int8_tile((8, 9))
    assert tiles.int8_tile((11, 0)) == tiles.int8_tile((10, 0))
    for capability, shared in (((8, 0), 163), ((8, 6), 99), ((9, 0), 227), ((12, 0), 99)):
        tile = tiles.int8_tile(capability)
        stage = (tile.block_m + tile.block_n) * tile.block_k
        assert tile.stages * stage <= shared * 1024


def test_sizes_that_a_library_does_not_take_are_refused() -> None:
    x = draw(70, 36)
    with pytest.raises(ValueError, match="multiples of 8, not .20, 36.; use int8_gemm"):
        prefill.int8_int_mm(x, INT8, random_parts(INT8, 20, 36), None, PLAIN)
    with pytest.raises(ValueError, match="more than 16 rows; use int8_gemm"):
        prefill.int8_int_mm(draw(16, 32), INT8, random_parts(INT8, 8, 32), None, PLAIN)
    with pytest.raises(ValueError, match="multiples of 16, not .24, 36.; use fp8_reference"):
        prefill.fp8_scaled_mm(x, FP8, random_parts(FP8, 24, 36), None, PLAIN)


def test_operands_that_do_not_fit_are_refused() -> None:
    codes, one = torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 1)
    with pytest.raises(ValueError, match="weights must be contiguous int8"):
        int8_linear.int8_linear(codes, one, codes.float(), one, tile=TILE)
    with pytest.raises(ValueError, match="same number, at most 133144"):
        int8_linear.int8_linear(codes, one, codes[:, :4].contiguous(), one, tile=TILE)
    with pytest.raises(ValueError, match=r"residual must be contiguous bf16 \[4, 4\]"):
        int8_linear.int8_linear(codes, one, codes, one, None, one, tile=TILE)
