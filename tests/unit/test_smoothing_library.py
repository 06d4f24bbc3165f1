"""SmoothQuant and AWQ against llmcompressor's modifiers, which run a module stack to get there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmr5_export.gptq import output_error
from mmr5_export.quantize import encode, quantize_linear
from mmr5_export.smoothing import awq_scales, clipped_scales, smoothquant_scales
from mmr5_kernels.layout import Format
from mmr5_kernels.reference import dequantize

COLUMNS = 256


class Block(nn.Module):
    """Linears that read the same input; their outputs side by side."""

    def __init__(self, *rows: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(COLUMNS, count, bias=False) for count in rows)
        for weight in self.linears.parameters():
            weight.data = torch.randn(weight.shape) * torch.randn(COLUMNS).exp()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in self.linears], dim=-1)

    @property
    def weights(self) -> list[Tensor]:
        return [weight.detach().clone() for weight in self.linears.parameters()]


class Stack(nn.Module):
    """A norm whose weight makes some columns of its output much larger, and its readers."""

    def __init__(self, *rows: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(COLUMNS)
        self.norm.weight.data = torch.randn(COLUMNS).mul(1.2).exp()
        self.block = Block(*rows)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block(self.norm(x))
        return result


def stack_and_inputs(seed: int) -> tuple[Stack, list[Tensor]]:
    torch.manual_seed(seed)
    return Stack(64, 32, 32), [torch.randn(1, 120, COLUMNS) for _ in range(4)]


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_smoothquant_scales_are_the_librarys(alpha: float) -> None:
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    stack, _ = stack_and_inputs(seed=1)
    absmax = torch.rand(COLUMNS) * 10 + 0.1
    modifier = SmoothQuantModifier(smoothing_strength=alpha)
    # Of activations it takes the span, twice the largest of symmetric ones, and of weights twice
    # the largest: a factor common to all columns unless alpha is one half.
    expected = modifier._calculate_smoothing_scales(list(stack.block.linears), 2 * absmax)
    scales = smoothquant_scales(absmax, stack.block.weights, alpha)
    torch.testing.assert_close(scales * 2 ** (2 * alpha - 1), expected)


def library_awq(stack: Stack, inputs: list[Tensor], format: Format) -> Tensor:
    """Scales [K] by which llmcompressor's AWQ multiplies the columns of the block's weights."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.core import State
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier

    args = QuantizationArgs(
        num_bits=4, symmetric=format.symmetric, strategy="group", group_size=format.group_size
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    awq: Any = AWQModifier(mappings=[AWQMapping("re:norm$", [r"re:.*linears\.\d$"])])
    state = State(model=stack)
    awq.on_initialize(state)
    QuantizationModifier(config_groups={"group": scheme}).on_initialize(state)
    awq.on_calibration_start(state, None)
    before = stack.norm.weight.detach().clone()
    with torch.no_grad():
        for batch in inputs:
            stack(batch)
        awq.on_sequential_epoch_end(state, None)
    awq.on_calibration_end(state, None)
    return before / stack.norm.weight.detach()


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_comes_within_two_percent_of_the_librarys_error(
    monkeypatch: pytest.MonkeyPatch, group_size: int, symmetric: bool
) -> None:
    from llmcompressor.pipelines.cache import IntermediatesCache

    # Pinning memory needs an accelerator, and has nothing to do with the result.
    monkeypatch.setattr(IntermediatesCache, "_pin_intermediate", lambda *_: None)
    format = Format("int4", group_size, symmetric, scale="fp32")
    stack, inputs = stack_and_inputs(seed=2)
    weights, weight = stack.block.weights, torch.cat(stack.block.weights)
    with torch.no_grad():
        x = torch.cat([stack.norm(batch)[0] for batch in inputs])
    hessian = x.T @ x

    def error(scales: Tensor) -> float:
        parts, _ = quantize_linear(weight * scales, format)
        return output_error(weight, dequantize(format, parts, torch.float32) / scales, hessian)

    scales, least = awq_scales(hessian, x.abs().mean(dim=0), weights, format, clip=False)
    theirs, ours, none = (
        error(found) for found in (library_awq(stack, inputs, format), scales, torch.ones(COLUMNS))
    )
    assert theirs < 0.9 * none, "the stack gives the search nothing to find"
    assert ours == pytest.approx(theirs, rel=0.02)
    assert least == pytest.approx(ours, rel=1e-3)

    # What an export does: scales searched with clipping, and the weight then clipped as well.
    scales, _ = awq_scales(hessian, x.abs().mean(dim=0), weights, format)
    clip = clipped_scales(weight * scales, format, hessian.diagonal() / scales.square())
    parts = encode(weight * scales, format, *clip)
    clipped = output_error(weight, dequantize(format, parts, torch.float32) / scales, hessian)
    assert clipped <= min(ours, theirs), "clipping made it worse than scaling alone"
