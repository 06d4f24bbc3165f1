"""Scales of columns: outputs stay, errors shrink, and folding loses nothing to rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from mmr5_export.gptq import output_error, rtn_error
from mmr5_export.quantize import encode, quantize_linear, scales_for
from mmr5_export.smoothing import (
    awq_scales,
    clipped_scales,
    fold_into_norm,
    fold_into_rows,
    smoothquant_scales,
    transform_hessian,
)
from mmr5_kernels.layout import INT4, INT8, INT8_WEIGHT_ONLY, Format
from mmr5_kernels.reference import dequantize, linear_int8, sqnr_db

AWQ_FORMATS = [INT4, Format("int4", 32, symmetric=False), INT8_WEIGHT_ONLY]


def tokens(columns: int, seed: int, count: int = 300) -> Tensor:
    """Inputs [T, K] some of whose columns are much larger than others, as after a norm."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(columns, generator=generator).mul(1.2).exp()
    return torch.randn(count, columns, generator=generator) * spread


def weights(columns: int, seed: int, *rows: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, columns, generator=generator) * 0.02 for count in rows]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothquant_divides_the_range_between_activations_and_weights(alpha: float) -> None:
    x, linears = tokens(96, seed=1), weights(96, 1, 32, 16)
    absmax, ranges = x.abs().amax(dim=0), torch.cat(linears).abs().amax(dim=0)
    scales = smoothquant_scales(absmax, linears, alpha)
    # Activations keep 1 - alpha of the joint range (in the logarithm), the weights the rest.
    joint = absmax * ranges
    torch.testing.assert_close(absmax / scales, joint ** (1 - alpha))
    torch.testing.assert_close(ranges * scales, joint**alpha)


def test_smoothquant_helps_8_bit_products() -> None:
    x, (weight,) = tokens(256, seed=2), weights(256, 2, 64)
    scales = smoothquant_scales(x.abs().amax(dim=0), [weight])
    exact = linear(x, weight)

    def decibels(x: Tensor, weight: Tensor) -> float:
        parts, _ = quantize_linear(weight, INT8)
        return sqnr_db(exact, linear_int8(x, INT8, parts))

    assert decibels(x / scales, weight * scales) > decibels(x, weight) + 6


def test_smoothquant_of_empty_columns() -> None:
    x, (weight,) = tokens(8, seed=3), weights(8, 3, 4)
    x[:, 1], weight[:, 2] = 0, 0
    absmax = x.abs().amax(dim=0)
    scales = smoothquant_scales(absmax, [weight])
    assert scales[1] == 1  # an input never seen: nothing to balance
    # No weight reads column 2: its activations must not set the scale of a token.
    assert absmax[2] / scales[2] == (absmax / scales)[absmax > 0].min()
    assert torch.equal(smoothquant_scales(absmax, [weight * 0]), torch.ones(8))
    with pytest.raises(ValueError, match="alpha"):
        smoothquant_scales(absmax, [weight], alpha=1.5)


@settings(max_examples=15)
@given(
    st.sampled_from(AWQ_FORMATS),
    st.integers(0, 999),
)
def test_awq_is_never_worse_than_no_scaling(format: Format, seed: int) -> None:
    x, linears = tokens(128, seed), weights(128, seed, 24, 8)
    hessian = x.T @ x
    scales, error = awq_scales(hessian, x.abs().mean(dim=0), linears, format, 8, clip=False)
    assert (scales > 0).all() and torch.isfinite(scales).all()
    together = torch.cat(linears)
    plain, _ = quantize_linear(together, format)
    assert error <= rtn_error(together, hessian, plain, format) * (1 + 1e-5)
    # The error is that of the scales that are returned, and of the weights it is said to be of.
    parts, _ = quantize_linear(together * scales, format)
    restored = dequantize(format, parts, torch.float32) / scales
    assert error == pytest.approx(output_error(together, restored, hessian), rel=1e-3)


def test_awq_helps_where_inputs_differ() -> None:
    x, linears = tokens(256, seed=4), weights(256, 4, 64)
    hessian = x.T @ x
    _, error = awq_scales(hessian, x.abs().mean(dim=0), linears, INT4)
    plain, _ = quantize_linear(linears[0], INT4)
    assert error < 0.8 * rtn_error(linears[0], hessian, plain, INT4)


@pytest.mark.parametrize("format", AWQ_FORMATS, ids=lambda format: format.name)
def test_clipping_follows_the_inputs(format: Format) -> None:
    x, (weight,) = tokens(128, seed=12), weights(128, 12, 40)
    hessian = (x * x).sum(dim=0).diag()
    whole, zero_point = scales_for(weight, format)
    scale, zero = clipped_scales(weight, format, hessian.diagonal())
    assert (scale <= whole).all() and (scale >= 0.79 * whole).all() and (scale < whole).any()
    assert (zero is None) == format.symmetric

    def group_errors(scale: Tensor) -> Tensor:
        restored = dequantize(format, encode(weight, format, scale, zero_point), torch.float32)
        energy = (restored - weight).square() * hessian.diagonal()
        errors: Tensor = energy.unflatten(1, (scale.shape[1], -1)).sum(dim=-1)
        return errors

    assert (group_errors(scale) <= group_errors(whole)).all()
    unweighted, _ = scales_for(weight, format, "mse")
    assert group_errors(scale).sum() < 0.99 * group_errors(unweighted).sum()


# At 8 bits clipping pays in fine steps only, which the search does not take.
@pytest.mark.parametrize("format", AWQ_FORMATS[:2], ids=lambda format: format.name)
def test_awq_with_clipping_is_better_than_either(format: Format) -> None:
    x, linears = tokens(256, seed=13), weights(256, 13, 48, 16)
    hessian, mean_abs, weight = x.T @ x, x.abs().mean(dim=0), torch.cat(linears)

    def error(scales: Tensor) -> float:
        """With the scales of columns given, and groups clipped."""
        scaled, inputs = weight * scales, transform_hessian(hessian, scales)
        clipped = clipped_scales(scaled, format, inputs.diagonal())
        return rtn_error(scaled, inputs, encode(scaled, format, *clipped), format)

    scales, least = awq_scales(hessian, mean_abs, linears, format)
    _, unclipped = awq_scales(hessian, mean_abs, linears, format, clip=False)
    assert least < unclipped and error(scales) < error(torch.ones(256))
    # The search takes a quarter of the steps: what it promises is nearly what comes.
    assert error(scales) == pytest.approx(least, rel=0.05)


def test_awq_leaves_inputs_alone_that_were_never_seen() -> None:
    x, linears = tokens(128, seed=5), weights(128, 5, 16)
    x[:, 7] = 0
    scales, error = awq_scales(x.T @ x, x.abs().mean(dim=0), linears, INT4)
    assert scales[7] == 1 and torch.isfinite(scales).all() and error > 0
    nothing = torch.zeros(128)
    assert awq_scales(nothing.diag(), nothing, linears, INT4)[1] == 0
    with pytest.raises(ValueError, match="grid"):
        awq_scales(x.T @ x, x.abs().mean(dim=0), linears, INT4, grid=2)


def test_awq_works_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x, linears = tokens(128, seed=6), weights(128, 6, 50, 21)
    arguments = x.T @ x, x.abs().mean(dim=0), linears, INT4, 5
    whole, error = awq_scales(*arguments)
    monkeypatch.setattr("mmr5_export.smoothing._BLOCK", 128 * 7)
    scales, other = awq_scales(*arguments)
    torch.testing.assert_close(scales, whole)
    assert other == pytest.approx(error, rel=1e-5)


def test_hessian_of_divided_inputs() -> None:
    x = tokens(64, seed=7)
    scales = torch.rand(64, generator=torch.Generator().manual_seed(8)) * 10 + 0.01
    hessian = x.T @ x
    divided = x / scales
    torch.testing.assert_close(
        transform_hessian(hessian, scales), divided.T @ divided, rtol=1e-4, atol=1e-4
    )


values = st.floats(-1e4, 1e4, width=32).filter(lambda value: value == 0 or abs(value) > 1e-6)


@given(st.lists(st.tuples(values, st.floats(1e-4, 1e4)), min_size=1, max_size=8))
def test_what_a_norm_loses_to_rounding_the_scales_make_up_for(
    pairs: list[tuple[float, float]],
) -> None:
    norm = torch.tensor([value for value, _ in pairs]).to(torch.bfloat16)
    scales = torch.tensor([scale for _, scale in pairs])
    new, effective = fold_into_norm(norm, scales)
    assert new.dtype == torch.bfloat16 and effective.dtype == torch.float32
    assert (effective > 0).all()
    # 2**-24: one rounding, that of the fp32 quotient.
    torch.testing.assert_close(
        new.double() * effective.double(), norm.double(), rtol=2.0**-24, atol=0
    )
    live = norm != 0
    torch.testing.assert_close(effective[live], scales[live], rtol=2.0**-8, atol=0)
    assert (effective[~live] == 1).all() and (new[~live] == 0).all()


def test_a_norm_stays_where_it_would_be_lost() -> None:
    norm = torch.tensor([1e-38, 3e38, -2.0], dtype=torch.bfloat16)
    new, effective = fold_into_norm(norm, torch.tensor([1e20, 1e-3, 4.0]))
    assert torch.equal(new[:2], norm[:2]) and new[2] == -0.5
    assert effective.tolist() == [1.0, 1.0, 4.0]


def test_scales_move_from_rows_to_the_columns_that_read_them() -> None:
    x = tokens(32, seed=9)
    up, down = weights(32, 9, 64)[0].to(torch.bfloat16), weights(64, 10, 16)[0]
    scales = torch.rand(64, generator=torch.Generator().manual_seed(11)) * 4 + 0.1
    folded = fold_into_rows(up, scales)
    assert folded.dtype == torch.float32
    torch.testing.assert_close(
        linear(linear(x, folded), down * scales), linear(linear(x, up.float()), down)
    )
