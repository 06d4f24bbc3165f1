"""The fused norm, gate and quantization of rows, against torch's functions one after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmr5_kernels import reference
from mmr5_kernels.fused import Norm
from mmr5_kernels.ops import quantize_rows as ops
from mmr5_kernels.prefill import Around

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted; see tests/gpu")

SPECIFIED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "int8": reference.quantize_activations_int8,
    "fp8": reference.quantize_activations_fp8,
}


def draw(m: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).bfloat16()


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int8)


def all_bf16() -> Tensor:
    """Every normal bf16 and zero; the interpreter widens subnormals wrongly."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    size = every.float().abs()
    return every[((size >= 2**-126) & size.isfinite()) | (size == 0)]


@pytest.mark.parametrize("k", [1, 96, 100, 3584, 4097])
@pytest.mark.parametrize("kind", list(SPECIFIED))
def test_codes_and_scales_equal_the_reference(kind: str, k: int) -> None:
    x = draw(5, k, seed=k)
    x[1], x[2] = 0, x[2] * 1e30
    x[3] = torch.where(x[3] > 0, 1.0, -1.0)  # the largest code everywhere
    codes, scale = ops.quantize_rows(x, kind)
    wanted, wanted_scale = SPECIFIED[kind](x)
    assert torch.equal(scale, wanted_scale) and scale[1] == 1
    assert codes.dtype == wanted.dtype and torch.equal(bits(codes), bits(wanted))


@pytest.mark.parametrize("kind", list(SPECIFIED))
def test_every_value_is_rounded_as_torch_rounds_it(kind: str) -> None:
    largest = {"int8": 127.0, "fp8": 448.0}[kind]
    values = all_bf16()
    values = values[values.float().abs() <= largest]
    x = torch.cat([values, torch.tensor([largest], dtype=torch.bfloat16)])[None]
    codes, scale = ops.quantize_rows(x, kind)
    assert scale.item() == 1.0  # the values are their own quotients, ties and subnormals included
    assert torch.equal(bits(codes), bits(SPECIFIED[kind](x)[0]))


def test_the_gate_equals_torch_for_every_value() -> None:
    gate = all_bf16()
    # Results below the normal bf16 are left out: the interpreter would be tested, not the kernel.
    gate = gate[(gate.float().abs() > 2**-100) & (gate.float() > -80)]
    x = torch.cat([gate, draw(1, len(gate))[0]])[None]
    assert torch.equal(ops.swiglu(x), Around(gated=True).rows(x))


@pytest.mark.parametrize("k", [96, 3584, 5000])
def test_a_norm_of_exact_sums_equals_torch(k: int) -> None:
    # Squares of small integers add up to the same in any order.
    x = torch.randint(-9, 10, (4, k), generator=torch.Generator().manual_seed(k)).bfloat16()
    norm = Norm(draw(1, k)[0], 1e-6)
    wanted = Around(norm).rows(x)
    assert torch.equal(ops.rms_norm(x, norm), wanted)
    for kind, specified in SPECIFIED.items():
        codes, scale = ops.quantize_rows(x, kind, norm)
        assert torch.equal(bits(codes), bits(specified(wanted)[0]))
        assert torch.equal(scale, specified(wanted)[1])


def test_a_norm_of_any_rows_is_off_by_a_bit_at_most() -> None:
    x, norm = draw(24, 1000), Norm(draw(1, 1000, seed=1)[0], 1e-6)
    wanted = Around(norm).rows(x)
    found = ops.rms_norm(x, norm)
    # The mean of squares is summed in another order: one value in some thousands is rounded
    # differently, by one unit in the last place.
    assert (bits(found) != bits(wanted)).float().mean() < 1e-3
    assert (bits(found).int() - bits(wanted).int()).abs().max() <= 1


@pytest.mark.parametrize("gated", [False, True], ids=["norm", "gate"])
@pytest.mark.parametrize("kind", list(SPECIFIED))
def test_fused_equals_one_after_the_other(kind: str, gated: bool) -> None:
    k = 640
    x = draw(6, 2 * k if gated else k)
    norm = None if gated else Norm(draw(1, k, seed=1)[0], 1e-6)
    between = ops.swiglu(x) if norm is None else ops.rms_norm(x, norm)
    codes, scale = ops.quantize_rows(x, kind, norm, gated)
    alone, alone_scale = ops.quantize_rows(between, kind)
    assert torch.equal(bits(codes), bits(alone)) and torch.equal(scale, alone_scale)


def test_a_row_does_not_depend_on_its_company_or_place() -> None:
    x = draw(7, 300)
    codes, scale = ops.quantize_rows(x, "int8", Norm(draw(1, 300)[0], 1e-6))
    wide = torch.cat([x, draw(7, 212)], dim=1)[:, :300]  # rows with something between them
    one, one_scale = ops.quantize_rows(wide[3:4], "int8", Norm(draw(1, 300)[0], 1e-6))
    assert torch.equal(one[0], codes[3]) and torch.equal(one_scale[0], scale[3])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", list(SPECIFIED))
def test_what_is_not_finite_stays_visible_in_its_row(kind: str, value: float) -> None:
    x = draw(2, 64)
    x[1, 5] = value
    for codes, scale in (ops.quantize_rows(x, kind), SPECIFIED[kind](x)):
        back = codes.float() * scale
        assert back[0].isfinite().all() and not back[1].isfinite().any()


def test_no_rows_are_no_work() -> None:
    codes, scale = ops.quantize_rows(draw(0, 32), "int8")
    assert codes.shape == (0, 32) and scale.shape == (0, 1)


@pytest.mark.parametrize(
    ("x", "kind", "norm", "words"),
    [
        (torch.zeros(2, 8), "int8", None, "rows must be bf16"),
        (draw(2, 8).T, "int8", None, "contiguous columns"),
        (draw(2, 8), "int4", None, "int8 or fp8, not 'int4'"),
        (draw(2, 8), "int8", Norm(draw(1, 4)[0], 1e-6), r"norm of \[4\] .* 8 columns"),
    ],
    ids=["dtype", "strides", "kind", "norm"],
)
def test_rows_that_do_not_fit_are_refused(
    x: Tensor, kind: str, norm: Norm | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        ops.quantize_rows(x, kind, norm)
