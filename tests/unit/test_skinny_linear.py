"""The decode linears against their reference, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers.stored import format_name, random_parts
from mmr5_kernels import dispatch, reference
from mmr5_kernels.dispatch import Prepared
from mmr5_kernels.fused import Norm, fused_linear
from mmr5_kernels.layout import FP8, INT4, INT8, INT8_WEIGHT_ONLY, Format
from mmr5_kernels.ops.skinny_linear import skinny_linear
from mmr5_kernels.reference import Parts
from mmr5_kernels.target import INTERPRETED, Target

BF16 = torch.bfloat16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TARGET = Target.of("cuda", "triton") if DEVICE == "cuda" else INTERPRETED
FORMATS = (
    None,
    INT4,
    Format("int4", 64),
    Format("int4", 32, symmetric=False),
    Format("int4", 128, symmetric=False),
    INT8_WEIGHT_ONLY,
    INT8,
    FP8,
)
# Two roundings of 2**-9 of a value to bf16, as root mean square, and one more per weight in the
# reference of the weight-only formats.
TOLERANCE = 4e-3


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that kernels are to write holds NaN, or the largest integer, before they do."""
    empty = torch.empty

    def poison(*size: int, **options: object) -> Tensor:
        made = empty(*size, **options)  # type: ignore[call-overload]
        wide = made.dtype.is_floating_point
        result: Tensor = made.fill_(float("nan") if wide else torch.iinfo(made.dtype).max)
        return result

    monkeypatch.setattr(torch, "empty", poison)


def columns(format: Format | None) -> int:
    """More than one step of a tile, and a part of a 128-column block where the format allows it."""
    if format is None or format.activations:
        return 1100
    return 1056 if format.group_size == 32 else 1088 if format.group_size != 128 else 1152


def prepared(format: Format | None, n: int, k: int, bias: bool = False) -> tuple[Prepared, Parts]:
    parts = random_parts(format, n, k, seed=n + k)
    if bias:
        parts["bias"] = random(1, n, seed=5)[0]
    return dispatch.prepare(format, parts, BF16, DEVICE, TARGET), parts


def random(m: int, k: int, seed: int) -> Tensor:
    values = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    return values.to(BF16).to(DEVICE)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def device_parts(parts: Parts) -> dict[str, Tensor]:
    return {name: part.to(DEVICE) for name, part in parts.items()}


@pytest.mark.parametrize("format", FORMATS, ids=format_name)
def test_it_agrees_with_the_reference(format: Format | None) -> None:
    m, n, k = 9, 37, columns(format)
    weight, parts = prepared(format, n, k, bias=True)
    parts = device_parts(parts)
    x = random(m, k, seed=m)
    found = skinny_linear(x, weight)
    wanted = fused_linear(x, format, parts, parts["bias"])
    assert found.shape == (m, n) and found.dtype == BF16
    if format == INT8:
        assert torch.equal(found, wanted)
    assert error(found, wanted) <= TOLERANCE


@pytest.mark.parametrize("m", [1, 8, 15, 16, 17, 64])
def test_both_sides_of_a_switch_agree_with_the_reference(m: int) -> None:
    weight, parts = prepared(INT4, 24, 128)
    x = random(m, 128, seed=m)
    assert error(skinny_linear(x, weight), fused_linear(x, INT4, device_parts(parts))) <= TOLERANCE


@pytest.mark.parametrize("format", [f for f in FORMATS if f and not f.activations], ids=format_name)
def test_it_is_at_least_as_near_to_the_truth_as_the_reference(format: Format) -> None:
    weight, parts = prepared(format, 64, 512)
    parts = device_parts(parts)
    x = random(4, 512, seed=1) + 2  # not around zero, which zero points would show
    truth = x.double() @ reference.dequantize(format, parts, torch.float32).double().T
    exact = error(reference.linear_weight_only(x, format, parts), truth)
    assert error(skinny_linear(x, weight), truth) <= exact


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("format", [None, INT4, INT8_WEIGHT_ONLY, INT8], ids=format_name)
def test_what_stands_around_it_is_rounded_as_in_the_reference(
    format: Format | None, swiglu: bool
) -> None:
    n, k, m = 44, 640, 3
    weight, parts = prepared(format, n, k, bias=True)
    parts = device_parts(parts)
    x = random(m, k, seed=2) * 3
    norm = Norm(random(1, k, seed=3)[0], 1e-2)
    residual = None if swiglu else random(m, n, seed=4)
    found = skinny_linear(x, weight, norm=norm, residual=residual, swiglu=swiglu)
    wanted = fused_linear(
        x, format, parts, parts["bias"], norm=norm, residual=residual, swiglu=swiglu
    )
    assert found.shape == wanted.shape
    assert error(found, wanted) <= (2 if swiglu else 1) * TOLERANCE
    if format in (None, INT8):
        # Sums are exact, or too near to tell: one rounding more or less changes many values.
        assert (found != wanted).double().mean() <= 0.02


@pytest.mark.parametrize("format", [None, INT4, INT8], ids=format_name)
def test_a_row_does_not_depend_on_the_others(format: Format | None) -> None:
    k = 256
    weight, _ = prepared(format, 16, k)
    norm = Norm(random(1, k, seed=3)[0], 1e-6)
    x = random(17, k, seed=7)
    together = skinny_linear(x, weight, norm=norm)
    assert torch.equal(skinny_linear(x, weight, norm=norm), together)
    for rows in (slice(0, 1), slice(16, 17), slice(5, 11)):
        assert torch.equal(skinny_linear(x[rows], weight, norm=norm), together[rows])


def test_dispatch_runs_it_and_keeps_the_shape() -> None:
    weight, parts = prepared(INT4, 24, 128)
    x = random(6, 128, seed=1).view(2, 3, 128)
    assert torch.equal(dispatch.run(weight, x).view(6, 24), skinny_linear(x.view(6, 128), weight))
    assert dispatch.run(weight, x[:0]).shape == (0, 3, 24)


def test_a_fused_run_is_the_same_with_and_without_a_kernel() -> None:
    weight, parts = prepared(INT8, 24, 128)
    plain = dispatch.prepare(INT8, parts, BF16, DEVICE, replace(TARGET, kernels="portable"))
    x, residual = random(5, 128, seed=1), random(5, 24, seed=2)
    for around in ({"residual": residual}, {"swiglu": True}):
        found = dispatch.run_fused(weight, x, **around)
        assert torch.equal(found, dispatch.run_fused(plain, x, **around))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"x": x.float()}, r"x must be contiguous bf16 \[M, 128\]"),
        (lambda x: {"x": x.repeat(1, 2)[:, ::2]}, "call contiguous"),
        (lambda x: {"x": x[:, :64].contiguous()}, r"not torch.bfloat16 \[2, 64\]"),
        (lambda x: {"x": x.repeat(33, 1)}, "at most 64 rows, not 66; split x"),
        (lambda x: {"norm": Norm(x[0, :64], 1e-6)}, r"a bf16 weight \[128\]"),
        (lambda x: {"residual": x}, r"residual must be contiguous bf16 \[2, 24\]"),
        (lambda x: {"residual": x[:, :24], "swiglu": True}, "and no residual"),
    ],
)
def test_bad_input_is_refused(change: Callable[[Tensor], dict[str, object]], message: str) -> None:
    weight, _ = prepared(INT4, 24, 128)
    given = {"x": random(2, 128, seed=1)} | change(random(2, 128, seed=1))
    with pytest.raises(ValueError, match=message):
        skinny_linear(prepared=weight, **given)  # type: ignore[arg-type]


def test_a_weight_for_other_kernels_is_refused() -> None:
    parts = random_parts(INT4, 24, 128)
    weight = dispatch.prepare(INT4, parts, BF16, DEVICE, Target(DEVICE))
    with pytest.raises(ValueError, match="prepare it for a target with kernels='triton'"):
        skinny_linear(random(1, 128, seed=1), weight)
