"""GPTQ: the library's own result, better than rounding, and clear errors where it cannot be."""

from __future__ import annotations

import math
import os
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmr5_export.gptq import gptq, output_error, rtn_error
from mmr5_export.quantize import encode, quantize_linear, scales_for
from mmr5_kernels.layout import FP8, INT4, INT8, INT8_WEIGHT_ONLY, Format, unpack_int4
from mmr5_kernels.reference import dequantize
from mmr5_runtime.types import CheckpointError, ExportError

FORMATS = [
    INT4,
    Format("int4", 32),
    Format("int4", 64, symmetric=False),
    Format("int4", 128, symmetric=False, scale="fp16"),
    Format("int4", 64, scale="fp32"),
    INT8,
    INT8_WEIGHT_ONLY,
    Format("int8", group_size=64),
]


def problem(rows: int, columns: int, seed: int, tokens: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the exactly symmetric Hessian of correlated inputs with outlier columns."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + 0.05 * torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(tokens or 3 * columns, columns, generator=generator)
    inputs = (inputs * torch.randn(columns, generator=generator).exp()) @ mixing
    hessian = inputs.T @ inputs
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    return weight, (hessian + hessian.T) / 2


def codes(format: Format, parts: dict[str, Tensor]) -> Tensor:
    return unpack_int4(parts["weight_packed"]) if format.weights == "int4" else parts["weight"]


def library(
    weight: Tensor, hessian: Tensor, scale: Tensor, zero_point: Tensor, **form: Any
) -> Tensor:
    """The solver's own result [N, K], with arguments it may use up."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq import gptq_quantize

    solver: Any = gptq_quantize.quantize_weight
    problem = (tensor.clone().unsqueeze(0) for tensor in (weight, hessian, scale, zero_point))
    quantized: Tensor = solver(*problem, None, QuantizationArgs(**form))[0]
    return quantized[0]


@pytest.mark.parametrize("format", FORMATS[:5], ids=lambda format: format.name)
@pytest.mark.parametrize("static_order", [True, False])
def test_result_is_the_librarys_bit_for_bit(format: Format, static_order: bool) -> None:
    """Against the solver driven as the library drives it: its own ordering and group scales."""
    weight, hessian = problem(24, 256, seed=1)
    parts, stats = gptq(weight, hessian, format, static_order=static_order, name="x")
    scale, zero_point = scales_for(weight, format, "mse")
    zero = torch.zeros_like(scale) if zero_point is None else zero_point
    expected = library(
        weight,
        hessian,
        scale,
        zero,
        num_bits=4,
        symmetric=format.symmetric,
        strategy="group",
        group_size=format.group_size,
        actorder="static" if static_order else None,
    )
    assert torch.equal(dequantize(format, parts, torch.float32), expected)
    assert stats.damp == 0.01
    assert stats.error == pytest.approx(output_error(weight, expected, hessian))


@settings(max_examples=25)
@given(st.sampled_from(FORMATS), st.integers(0, 999), st.sampled_from([40, 256, 900]))
def test_beats_rounding_to_nearest(format: Format, seed: int, tokens: int) -> None:
    """Also with fewer tokens (40) than columns, where the Hessian alone is singular."""
    weight, hessian = problem(16, 128, seed, tokens)
    parts, stats = gptq(weight, hessian, format, name="x")
    rounded = [
        rtn_error(weight, hessian, quantize_linear(weight, format, search)[0], format)
        for search in ("absmax", "mse")
    ]
    assert stats.error < min(rounded)
    assert stats.error == rtn_error(weight, hessian, parts, format)
    assert {key: (tuple(part.shape), part.dtype) for key, part in parts.items()} == format.tensors(
        16, 128
    )


def test_error_is_the_output_energy_lost() -> None:
    weight, hessian = problem(16, 128, seed=2)
    other = weight + torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * 1e-3
    lower = torch.linalg.cholesky(hessian.double())
    lost = ((other - weight).double() @ lower).square().sum()
    whole = (weight.double() @ lower).square().sum()
    assert output_error(weight, other, hessian) == pytest.approx(float(lost / whole), rel=1e-4)


def test_arguments_are_left_alone_and_runs_repeat() -> None:
    weight, hessian = problem(16, 256, seed=4)
    before = weight.clone(), hessian.clone()
    first, _ = gptq(weight, hessian, INT4, name="x")
    second, _ = gptq(weight, hessian, INT4, name="x")
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**30])
def test_scale_of_the_hessian_does_not_matter(factor: float) -> None:
    weight, hessian = problem(16, 128, seed=5)
    hessian[7], hessian[:, 7] = 0, 0  # with an input that was never seen, either
    plain, stats = gptq(weight, hessian, INT4, name="x")
    scaled, scaled_stats = gptq(weight, hessian * factor, INT4, name="x")
    assert all(torch.equal(plain[key], scaled[key]) for key in plain)
    assert scaled_stats.error == pytest.approx(stats.error)


@pytest.mark.parametrize("format", [INT4, INT8], ids=lambda format: format.name)
def test_columns_of_dead_inputs_are_rounded_and_disturb_nothing(format: Format) -> None:
    weight, hessian = problem(16, 256, seed=6)
    dead = torch.tensor([0, 3, 130, 255])
    hessian[dead], hessian[:, dead] = 0, 0
    search = "mse" if format is INT4 else "absmax"
    parts, stats = gptq(weight, hessian, format, name="x")
    nearest, _ = quantize_linear(weight, format, search)
    assert torch.equal(codes(format, parts)[:, dead], codes(format, nearest)[:, dead])
    # The error over the inputs seen is what it would be if those columns had been zeroed.
    restored = dequantize(format, parts, torch.float32)
    restored[:, dead] = 0
    assert output_error(weight, restored, hessian) == pytest.approx(stats.error, rel=1e-6)


def test_more_damp_is_tried_and_recorded() -> None:
    weight, hessian = problem(16, 128, seed=7)
    mean = float(hessian.diagonal().mean())
    low, basis = torch.linalg.eigh(hessian)
    # An eigenvalue of -5 % of the mean: 1 % of damp does not lift it above zero, 10 % does.
    low[0] = -0.05 * mean
    indefinite = (basis * low) @ basis.T
    assert (indefinite.diagonal() > 0).all()
    _, stats = gptq(weight, indefinite, INT4, name="x")
    assert stats.damp == pytest.approx(0.1)


def test_hopeless_hessian_names_the_layer() -> None:
    weight, _ = problem(8, 64, seed=8)
    hessian = torch.full((64, 64), -100.0).fill_diagonal_(1.0)
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp.*factorized.*rtn"):
        gptq(weight, hessian, Format("int4", 32), name="model.layers.3.mlp.down_proj")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["weight", "Hessian"])
def test_values_that_are_not_finite_name_the_layer(bad: float, what: str) -> None:
    weight, hessian = problem(8, 128, seed=9)
    (weight if what == "weight" else hessian)[3, 4] = bad
    with pytest.raises(CheckpointError, match=rf"the {what} of lay holds NaN or inf.*;"):
        gptq(weight, hessian, INT4, name="lay")


@pytest.mark.parametrize("diagonal", [0.0, -1.0])
def test_inputs_of_zeros_name_the_layer(diagonal: float) -> None:
    weight, _ = problem(8, 128, seed=10)
    with pytest.raises(CheckpointError, match="inputs of lay were zero.*calibrate"):
        gptq(weight, torch.eye(128) * diagonal, INT4, name="lay")


def test_int8_keeps_to_its_range_near_the_solvers_result() -> None:
    """The solver uses -128, the format does not: that may cost little."""
    weight, hessian = problem(128, 256, seed=11)
    parts, stats = gptq(weight, hessian, INT8, name="x")
    assert int(parts["weight"].min()) == -127 and int(parts["weight"].max()) == 127
    scale, _ = scales_for(weight, INT8)
    form = {"num_bits": 8, "strategy": "channel", "actorder": "static"}
    free = library(weight, hessian, scale, torch.zeros_like(scale), **form)
    assert (free < -127 * scale).any(), "the case under test does not occur"
    unbounded = output_error(weight, free, hessian)
    assert unbounded <= stats.error < 1.02 * unbounded


def test_scales_of_any_dtype_are_kept() -> None:
    weight, hessian = problem(16, 128, seed=12)
    for format in FORMATS:
        parts, _ = gptq(weight, hessian, format, name="x", scale_search="absmax")
        scale, zero_point = scales_for(weight, format)
        nearest = encode(weight, format, scale, zero_point)
        assert torch.equal(parts["weight_scale"], nearest["weight_scale"])


def test_wrong_arguments_are_refused() -> None:
    weight, hessian = problem(8, 128, seed=13)
    with pytest.raises(ValueError, match="not fp8"):
        gptq(weight, hessian, FP8, name="x")
    with pytest.raises(ValueError, match=r"float32 Hessian \[128, 128\]"):
        gptq(weight, hessian[:64, :64], INT4, name="x")
    with pytest.raises(ValueError, match="damp"):
        gptq(weight, hessian, INT4, name="x", damp=0.0)


def test_missing_library_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(8, 128, seed=14)
    monkeypatch.setitem(sys.modules, "compressed_tensors.quantization", None)
    with pytest.raises(ExportError, match=r"llmcompressor.*mmr5-runtime\[export\]"):
        gptq(weight, hessian, INT4, name="x")


@pytest.mark.parametrize("before", [None, "0"])
def test_the_librarys_untested_gpu_kernel_is_off_while_it_solves(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    from llmcompressor.modifiers.gptq import gptq_quantize

    switch, seen = "LLMCOMPRESSOR_DISABLE_GPTQ_TRITON", []
    monkeypatch.delenv(switch, raising=False)
    if before is not None:
        monkeypatch.setenv(switch, before)
    solver: Any = gptq_quantize.quantize_weight

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append(os.environ.get(switch))
        return solver(*arguments, **options)

    monkeypatch.setattr(gptq_quantize, "quantize_weight", watched)
    weight, hessian = problem(8, 128, seed=15)
    gptq(weight, hessian, INT4, name="x")
    assert seen == ["1"] and os.environ.get(switch) == before


def test_an_output_too_large_to_be_summed_has_no_error() -> None:
    weight, hessian = problem(8, 128, seed=16)
    parts, _ = quantize_linear(weight, INT4)
    assert math.isnan(rtn_error(weight, hessian * 1e37, parts, INT4))
    assert rtn_error(weight, hessian * 0, parts, INT4) == 0.0
