"""The int4 linear in CUDA C++ on a GPU: against its specification, in graphs, and with overlap."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from helpers.stored import random_parts
from mmr5_kernels.cuda import w4_layout
from mmr5_kernels.cuda.w4_linear import LAYOUT, w4_linear
from mmr5_kernels.fused import Norm, fused_linear
from mmr5_kernels.layout import Format
from mmr5_kernels.reference import Parts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
        reason="needs bf16 tensor cores: compute capability 8.0",
    ),
]
SHAPES = {"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)}
ROWS = (1, 2, 7, 8, 9, 15, 16, 17, 64)


@dataclass(frozen=True, eq=False)
class Linear:
    n: int
    k: int
    format: Format
    parts: Parts
    operands: Mapping[str, Parts]
    bias: Tensor | None


def make(n: int, k: int, symmetric: bool = True) -> Linear:
    format = Format("int4", 128, symmetric=symmetric)
    parts = {s: t.cuda() for s, t in random_parts(format, n, k, seed=n + k).items()}
    operands = {LAYOUT: w4_layout.pack(format, parts)}
    return Linear(n, k, format, parts, operands, torch.randn(n, device="cuda").bfloat16() / 8)


def inputs(m: int, k: int) -> Tensor:
    return torch.randn(m, k, device="cuda").bfloat16()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("name", SHAPES)
def test_agrees_with_the_reference_and_rows_are_independent(name: str, symmetric: bool) -> None:
    n, k = SHAPES[name]
    linear = make(n, k, symmetric)
    norm = Norm(1 + inputs(1, k)[0] / 8, 1e-6) if name in ("qkv", "gate_up") else None
    swiglu = name == "gate_up"
    x, residual = inputs(64, k), inputs(64, n) if name in ("o", "down") else None
    first = None
    for m in ROWS:
        added = None if residual is None else residual[:m]
        found = w4_linear(x[:m], linear, norm=norm, residual=added, swiglu=swiglu)
        wanted = fused_linear(
            x[:m], linear.format, linear.parts, linear.bias,
            norm=norm, residual=added, swiglu=swiglu,
        )  # fmt: skip
        assert error(found, wanted) < 4e-3 * (3 if swiglu else 1)
        first = found[0] if first is None else first
        assert torch.equal(found[0], first)


@pytest.mark.parametrize(("n", "k"), [(45, 128), (1, 384), (97, 4224)])
def test_odd_shapes_write_their_result_and_nothing_else(n: int, k: int) -> None:
    linear = make(n, k, symmetric=False)
    for m in (1, 8, 16, 33):
        torch.cuda.empty_cache()
        poisoned = torch.full((1 << 20,), float("nan"), device="cuda").bfloat16()
        del poisoned  # its memory is what the result gets
        x = inputs(m, k)
        found = w4_linear(x, linear)
        wanted = fused_linear(x, linear.format, linear.parts, linear.bias)
        assert error(found, wanted) < 1.2e-2


def test_overlap_with_the_kernel_ahead_changes_nothing() -> None:
    up, down = make(*SHAPES["gate_up"]), make(*SHAPES["down"])
    norm = Norm(inputs(1, 3584)[0], 1e-6)
    for m in (1, 8, 16):
        start = inputs(m, 3584)
        results = []
        for dependent in (False, True, True):
            x = start
            for _ in range(20):  # each kernel reads what the one ahead of it has just written
                y = w4_linear(x, up, norm=norm, swiglu=True, dependent=dependent)
                x = w4_linear(y, down, residual=start, dependent=dependent)
            results.append(x)
        assert torch.isfinite(results[0]).all()
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_runs_in_a_graph_and_repeats() -> None:
    linear = make(*SHAPES["o"])
    x, residual = inputs(1, 3584), inputs(1, 3584)
    eager = w4_linear(x, linear, residual=residual)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = w4_linear(w4_linear(x, linear, residual=residual), linear)
    expected = w4_linear(eager, linear)
    for _ in range(100):
        y.zero_()
        graph.replay()
    assert torch.equal(y, expected)
    x.copy_(inputs(1, 3584))
    graph.replay()
    again = w4_linear(w4_linear(x, linear, residual=residual), linear)
    assert torch.equal(y, again)


def test_runs_on_another_stream_and_thread() -> None:
    linear = make(96, 256)
    x = inputs(3, 256)
    expected = w4_linear(x, linear)
    torch.cuda.synchronize()
    found: list[Tensor] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(w4_linear(x, linear))
            torch.cuda.current_stream().synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)
