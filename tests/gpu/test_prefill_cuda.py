"""The kernels for many rows, compiled, at widths of the 7B model."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from helpers.stored import format_name, random_parts
from mmr5_kernels import prefill, reference
from mmr5_kernels.fused import Norm
from mmr5_kernels.layout import FP8, INT4, INT8, INT8_WEIGHT_ONLY, Format
from mmr5_kernels.prefill import FP8_CAPABILITY, PLAIN, Around, Scratch
from mmr5_kernels.skinny_layout import pack_skinny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BF16 = torch.bfloat16
needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < FP8_CAPABILITY,
    reason="this GPU multiplies no float8",
)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fills what torch.empty gives with NaN, so that nothing unwritten is taken for a result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to("cuda", BF16)


def on_gpu(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: part.cuda() for name, part in parts.items()}


@pytest.mark.parametrize("k", [100, 3584, 18944])
@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=needs_fp8)])
def test_codes_equal_the_reference_of_the_cpu(kind: str, k: int) -> None:
    from mmr5_kernels.ops.quantize_rows import quantize_rows, rms_norm

    specified = {
        "int8": reference.quantize_activations_int8,
        "fp8": reference.quantize_activations_fp8,
    }[kind]
    x = draw(130, k)
    x[5] = 0
    codes, scale = quantize_rows(x, kind)
    wanted, wanted_scale = specified(x.cpu())
    assert torch.equal(scale.cpu(), wanted_scale)
    assert torch.equal(codes.cpu().view(torch.int8), wanted.view(torch.int8))
    norm = Norm(draw(k, seed=1), 1e-6)
    fused, fused_scale = quantize_rows(x, kind, norm)
    alone, alone_scale = quantize_rows(rms_norm(x, norm), kind)
    assert torch.equal(fused.view(torch.int8), alone.view(torch.int8))
    assert torch.equal(fused_scale, alone_scale)
    differ = rms_norm(x, norm) != Around(norm).rows(x)
    assert differ.float().mean() < 1e-3


def test_the_gate_is_that_of_torch() -> None:
    from mmr5_kernels.ops.quantize_rows import swiglu

    x = draw(130, 2 * 18944)
    assert (swiglu(x) != Around(gated=True).rows(x)).float().mean() < 1e-3


@pytest.mark.parametrize("m", [65, 127, 128, 130, 1000])
@pytest.mark.parametrize(("n", "k"), [(4608, 3584), (3584, 18944), (104, 72)])
def test_int8_products_equal_the_reference_bit_for_bit(m: int, n: int, k: int) -> None:
    parts, x = on_gpu(random_parts(INT8, n, k)), draw(m, k)
    bias, residual = draw(n), draw(m, n, seed=1)
    wanted = residual + reference.linear_int8(x, INT8, parts, bias)
    for kernel in (prefill.int8_gemm, prefill.int8_int_mm):
        found = kernel(x, INT8, parts, bias, Around(residual=residual))
        assert torch.equal(found, wanted)
        assert torch.equal(kernel(x, INT8, parts, bias, Around(residual=residual)), found)


@needs_fp8
@pytest.mark.parametrize("m", [65, 130, 1000])
@pytest.mark.parametrize(("n", "k"), [(4608, 3584), (3584, 18944)])
def test_fp8_products_follow_the_reference(m: int, n: int, k: int) -> None:
    parts, x, bias = on_gpu(random_parts(FP8, n, k)), draw(m, k), draw(n)
    wanted = reference.linear_fp8(x, FP8, parts, bias).double()
    found = prefill.fp8_scaled_mm(x, FP8, parts, bias, PLAIN)
    assert torch.equal(found, prefill.fp8_scaled_mm(x, FP8, parts, bias, PLAIN))
    assert (found.double() - wanted).norm() <= 4e-3 * wanted.norm()


@pytest.mark.parametrize(
    "format", [INT4, Format("int4", 32, symmetric=False), INT8_WEIGHT_ONLY], ids=format_name
)
def test_expanded_weights_equal_the_reference(format: Format) -> None:
    from mmr5_kernels.ops.expand import expand_int4, expand_int8

    n, k = 4608, 3584
    parts = on_gpu(random_parts(format, n, k))
    scratch = Scratch()
    with scratch.weight(n, k, torch.device("cuda")) as out:
        out.fill_(float("nan"))
    if format.weights == "int8":
        expand_int8(parts["weight"], parts["weight_scale"], out)
    else:
        packed = pack_skinny(format, parts)
        group = format.group_size or 0
        expand_int4(packed["weight"], packed["scale"], packed.get("zero"), group, out)
    assert torch.equal(out, reference.dequantize(format, parts, BF16))


def test_threads_and_names_of_one_gpu_share_one_block() -> None:
    scratch = Scratch()

    def address(name: str) -> int:
        with scratch.weight(64, 64, torch.device(name)) as weight:
            return weight.data_ptr()

    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(address, ["cuda", f"cuda:{torch.cuda.current_device()}"] * 8))
    assert len(found) == 1
    with torch.cuda.stream(torch.cuda.Stream()):
        assert address("cuda") not in found
