"""The decode linears on a GPU, at the shapes of the 7B model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.stored import format_name, random_parts
from mmr5_kernels import dispatch
from mmr5_kernels.fused import Norm, fused_linear
from mmr5_kernels.layout import FP8, INT4, INT8, INT8_WEIGHT_ONLY, Format
from mmr5_kernels.target import Target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FORMATS = (None, INT4, Format("int4", 32, symmetric=False), INT8_WEIGHT_ONLY, INT8, FP8)
SHAPES = {"qkv": (4608, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)}


def random(*shape: int, seed: int) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.bfloat16().cuda()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS, ids=format_name)
def test_steps_agree_and_rows_do_not_depend_on_each_other(
    format: Format | None, shape: str
) -> None:
    target = Target.of("cuda", "triton")
    if format == FP8 and (target.capability or (0, 0)) < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    n, k = SHAPES[shape]
    parts = random_parts(format, n, k)
    weight = dispatch.prepare(format, parts, torch.bfloat16, "cuda", target)
    x, norm = random(64, k, seed=1), Norm(random(k, seed=2), 1e-6)
    swiglu = shape == "gate_up"
    residual = None if swiglu else random(64, n, seed=3)
    found = dispatch.run_fused(weight, x, norm=norm, residual=residual, swiglu=swiglu)
    on_gpu = {name: part.cuda() for name, part in parts.items()}
    wanted = fused_linear(x, format, on_gpu, norm=norm, residual=residual, swiglu=swiglu)
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert error <= (8e-3 if swiglu else 4e-3)
    for m in (1, 2, 4, 8, 9, 16, 17, 33, 64):
        some = None if residual is None else residual[:m]
        again = dispatch.run_fused(weight, x[:m], norm=norm, residual=some, swiglu=swiglu)
        assert torch.equal(again, found[:m]), m
