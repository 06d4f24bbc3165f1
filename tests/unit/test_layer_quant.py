"""Quantizing one layer: statistics that are no numbers are refused whatever the method."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.layers import METHODS, dense, quantize, statistics
from mmr5_kernels.layout import INT4, Format
from mmr5_runtime.types import CheckpointError


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["hessian", "absmax", "abs_sum"])
@pytest.mark.parametrize(("format", "method"), METHODS)
def test_statistics_that_are_not_finite_name_their_linears(
    format: Format, method: str, what: str, bad: float
) -> None:
    stats = statistics()
    getattr(stats["gate_up"], what).view(-1)[5] = bad
    with pytest.raises(
        CheckpointError, match=r"inputs of model\.layers\.0\.mlp\.gate_proj and .*up_proj are not"
    ):
        quantize(format, method, stats=stats)


@pytest.mark.parametrize(("format", "method"), METHODS)
def test_inputs_that_are_too_large_to_be_compared_are_refused(format: Format, method: str) -> None:
    """Their squares are finite, the energy of the outputs is not."""
    stats = statistics(3e17)
    assert all(torch.isfinite(found.hessian).all() for found in stats.values())
    large = {name: tensor * 64 for name, tensor in dense().items()}
    with pytest.raises(CheckpointError, match=r"(outputs|Hessian) of model\.layers\.0\.self_attn"):
        quantize(format, method, stats=stats, dense=large)


@pytest.mark.parametrize(("format", "method"), METHODS)
def test_every_figure_of_a_report_is_a_number(format: Format, method: str) -> None:
    for scale in (1e-9, 1.0, 1e9):
        made = quantize(format, method, stats=statistics(scale))
        assert len(made.report) == 7
        json.dumps([vars(linear) for linear in made.report.values()], allow_nan=False)


def test_a_dense_linear_that_smoothing_touched_is_stored_divided() -> None:
    """down is smoothed, and its scales are taken out of up_proj, which stays bf16."""
    before = dense()
    made = quantize(INT4, "awq", "down", dense=before)
    up = "model.layers.0.mlp.up_proj.weight"
    assert up in made.tensors and made.tensors[up].dtype == torch.bfloat16
    rows = (made.tensors[up].float() / before[up].float()).nanmedian(dim=1).values
    assert not torch.allclose(rows, torch.ones_like(rows))
    spread = made.tensors[up].float() / before[up].float() / rows[:, None]
    assert (spread[before[up] != 0] - 1).abs().max() < 0.01  # bf16 rounds once
