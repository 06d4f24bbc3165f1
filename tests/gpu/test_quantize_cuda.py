"""Quantizing a layer on a GPU: results on the CPU, as good as those made there, and repeatable."""

from __future__ import annotations

import pytest
import torch

from helpers.layers import METHODS, dense, quantize, statistics
from mmr5_export.layer_quant import QuantizedLayer
from mmr5_kernels.layout import INT4, Format

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def on_gpu(format: Format, method: str, *groups: str) -> QuantizedLayer:
    return quantize(format, method, *groups, stats=statistics(device="cuda"))


@pytest.mark.parametrize(("format", "method"), METHODS)
def test_a_layer_is_quantized_as_well_as_on_the_cpu(format: Format, method: str) -> None:
    found, again = on_gpu(format, method), on_gpu(format, method)
    expected = quantize(format, method)
    assert {tensor.device.type for tensor in found.tensors.values()} == {"cpu"}
    assert all(torch.equal(found.tensors[name], again.tensors[name]) for name in found.tensors)
    assert {n: (t.shape, t.dtype) for n, t in found.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in expected.tensors.items()
    }
    for name, linear in expected.report.items():
        # Sums in another order move single codes, which cost or gain a little.
        assert found.report[name].error == pytest.approx(linear.error, rel=0.05)


def test_a_dense_linear_that_smoothing_touched_comes_back_from_the_gpu() -> None:
    made = on_gpu(INT4, "awq", "down")
    up = made.tensors["model.layers.0.mlp.up_proj.weight"]
    assert up.device.type == "cpu" and up.dtype == torch.bfloat16
    assert not torch.equal(up, dense()["model.layers.0.mlp.up_proj.weight"])
