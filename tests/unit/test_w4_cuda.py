"""The CUDA source of the int4 linear against its specification, run by an emulator on the CPU."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from helpers import emulated
from helpers.emulated import Emulator
from helpers.stored import random_parts
from mmr5_kernels.cuda import w4_layout
from mmr5_kernels.cuda.w4_linear import LAYOUT, MAX_ROWS, w4_linear
from mmr5_kernels.cuda.w4_plan import Gpu, Tuning, plan
from mmr5_kernels.fused import Norm, fused_linear, rms_norm
from mmr5_kernels.layout import Format, pack_int4
from mmr5_kernels.reference import Parts, dequantize

H200 = Gpu(sms=132, shared_bytes=232_448)
RTX_4090 = Gpu(sms=128, shared_bytes=101_376)
# Root mean square. dispatch allows an int4 kernel 5e-3; few outputs of new inputs scatter around
# what is typical (1.4e-3 to 3.3e-3; 4.2e-3 was seen for 64 of them).
TOLERANCE = 6e-3


@dataclass(frozen=True, eq=False)
class Case:
    """A weight in both layouts, and inputs for 64 rows."""

    n: int
    k: int
    format: Format
    parts: Parts
    operands: Mapping[str, Parts]
    bias: Tensor | None
    x: Tensor
    norm: Norm
    residual: Tensor


def make(n: int, k: int, symmetric: bool = True, bias: bool = True) -> Case:
    format = Format("int4", 128, symmetric=symmetric)
    seed = secrets.randbelow(1 << 30)  # fresh inputs in every run
    print(f"seed {seed}")  # shown when a test fails
    generator = torch.Generator().manual_seed(seed)
    parts = random_parts(format, n, k, seed)
    parts["weight_scale"] *= 8

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    return Case(
        n=n,
        k=k,
        format=format,
        parts=parts,
        operands={LAYOUT: w4_layout.pack(format, parts)},
        bias=normal(n) if bias else None,
        x=normal(MAX_ROWS, k) + 0.1,
        norm=Norm(1 + normal(k) / 8, 1e-6),
        residual=normal(MAX_ROWS, n),
    )


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    if emulated.COMPILER is None:
        pytest.skip("no g++ to compile the emulator with")
    return Emulator(emulated.build(tmp_path_factory.mktemp("emulator")))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 45, 384), (1, 4, 128), (7, 64, 2304), (8, 97, 256), (9, 70, 4224), (16, 33, 1920)],
)
def test_agrees_with_the_reference(
    emulator: Emulator, m: int, n: int, k: int, symmetric: bool
) -> None:
    case = make(n, k, symmetric, bias=n % 2 == 0)
    x = case.x[:m]
    found, _ = emulator.run(x, case)
    wanted = fused_linear(x, case.format, case.parts, case.bias)
    many = m * n > 400  # else one unlucky rounding weighs too much
    assert error(found, wanted) < TOLERANCE * (1 if many else 3)
    weight = dequantize(case.format, case.parts, torch.float64)
    exact = torch.nn.functional.linear(x.double(), weight)
    exact = exact if case.bias is None else exact + case.bias.double()
    if many:
        assert error(found, exact) < 1.05 * error(wanted, exact)


@pytest.mark.parametrize("m", [1, 8, 16])
def test_what_is_fused_agrees_with_the_reference(emulator: Emulator, m: int) -> None:
    case = make(64, 512, symmetric=m != 8)
    x, residual = case.x[:m], case.residual[:m]
    variants: tuple[tuple[Norm | None, Tensor | None, bool], ...] = (
        (case.norm, None, False),
        (None, residual, False),
        (case.norm, residual, False),
        (case.norm, None, True),
        (None, None, True),
    )
    for norm, added, swiglu in variants:
        found, _ = emulator.run(x, case, norm=norm, residual=added, swiglu=swiglu)
        wanted = fused_linear(
            x, case.format, case.parts, case.bias, norm=norm, residual=added, swiglu=swiglu
        )
        # Two linears are multiplied, and silu of a rounded gate: each doubles what is allowed.
        assert error(found, wanted) < TOLERANCE * (3 if swiglu else 1), (norm, added, swiglu)


def test_rounds_where_the_reference_does(emulator: Emulator) -> None:
    # With two identities as weight, what follows the product and precedes it stands alone.
    case = make(256, 128, bias=False)
    parts = {
        "weight_packed": pack_int4(torch.eye(128, dtype=torch.int8).repeat(2, 1)),
        "weight_scale": torch.ones(256, 1).bfloat16(),
    }
    case = replace(case, parts=parts, operands={LAYOUT: w4_layout.pack(case.format, parts)})
    x, residual = case.x[:16], case.residual[:16]
    found, _ = emulator.run(x, case, norm=case.norm)
    assert torch.equal(found, rms_norm(x, case.norm).repeat(1, 2))
    found, _ = emulator.run(x, case, swiglu=True)
    wanted = fused_linear(x, case.format, parts, swiglu=True)
    # Two ways to compute exp differ in the last bit, which shows where it decides a rounding.
    assert (found == wanted).float().mean() > 0.99
    case = replace(case, bias=case.residual[63])
    found, _ = emulator.run(x, case, residual=residual)
    assert torch.equal(found, fused_linear(x, case.format, parts, case.bias, residual=residual))


def test_a_row_does_not_depend_on_the_others_or_on_the_launch(emulator: Emulator) -> None:
    case = make(70, 1280, symmetric=False)
    for norm in (None, case.norm):
        alone = {i: emulator.run(case.x[i : i + 1], case, norm=norm)[0][0] for i in (0, 1, 8, 19)}
        small = Emulator(emulator.binary, Gpu(sms=1, shared_bytes=101_376))
        large = Emulator(emulator.binary, H200)
        for m, where in ((2, emulator), (8, emulator), (9, small), (9, large), (20, emulator)):
            found, _ = where.run(case.x[:m], case, norm=norm)
            assert all(torch.equal(found[i], row) for i, row in alone.items() if i < m)


def test_the_order_of_threads_does_not_matter(emulator: Emulator) -> None:
    case = make(70, 1920, symmetric=False)  # three units
    first, _ = emulator.run(case.x[:9], case, norm=case.norm, order=0)
    for order in (1, 2):
        assert torch.equal(emulator.run(case.x[:9], case, norm=case.norm, order=order)[0], first)


def test_other_tunings_agree(emulator: Emulator) -> None:
    case = make(70, 1280, symmetric=False)
    wanted = fused_linear(case.x[:5], case.format, case.parts, case.bias)
    assert error(emulator.run(case.x[:5], case, tuning=Tuning(4, 5))[0], wanted) < TOLERANCE


def test_nan_stays_in_its_row(emulator: Emulator) -> None:
    case = make(33, 384)
    clean, _ = emulator.run(case.x[:9], case)
    spoiled = case.x[:9].clone()
    spoiled[3] = float("nan")
    found, _ = emulator.run(spoiled, case)
    others = [i for i in range(9) if i != 3]
    assert found[3].isnan().all() and torch.equal(found[others], clean[others])


def test_weights_are_fetched_before_the_previous_kernel_is_waited_for(emulator: Emulator) -> None:
    case = make(32, 3584)
    _, early = emulator.run(case.x[:1], case)
    # 28 steps of 16-byte pieces: 4 x 32 of codes and 4 of scales. All of it fits the rings.
    assert early == 28 * (4 * 32 + 4)


def test_plans_for_the_shapes_of_the_model() -> None:
    for n, k, norm in ((4608, 3584, True), (3584, 3584, False), (37888, 3584, True)):
        one = plan(1, n, k, False, norm, H200)
        # Twice in the 228 KiB of an SM, each with 1 KiB of its own: the next kernel fits beside it.
        assert one.shared_bytes + 1024 <= 228 * 1024 // 2
        assert one.variant.shared_x and one.variant.stages == 3
    assert plan(1, 37888, 3584, False, True, H200).grid == (132, 1)
    assert plan(1, 4608, 3584, False, True, H200).grid == (144, 1)
    assert not plan(1, 3584, 18944, False, False, H200).variant.shared_x
    assert plan(16, 37888, 3584, True, True, H200).grid == (132, 1)
    assert plan(64, 3584, 18944, False, False, H200).grid == (112, 4)
    assert plan(8, 37888, 3584, False, True, RTX_4090).rows == 4
    for m in range(1, MAX_ROWS + 1):
        for gpu in (H200, RTX_4090):
            made = plan(m, 37888, 3584, True, True, gpu)
            assert made.rows * made.grid[1] >= m and made.rows * (made.grid[1] - 1) < m
            assert made.rows <= 8 * made.variant.tiles and made.shared_bytes <= gpu.shared_bytes
    with pytest.raises(ValueError, match="behind a norm needs more shared memory"):
        plan(1, 64, 65536, False, True, RTX_4090)


def test_refuses_what_it_cannot_compute(emulator: Emulator) -> None:
    case = make(33, 256)
    with pytest.raises(ValueError, match="takes tensors on a GPU, not on cpu"):
        w4_linear(case.x[:1], case)
    with pytest.raises(ValueError, match=r"takes bfloat16 \[M <= 64, 256\], not torch.float32"):
        emulator.run(case.x[:1].float(), case)
    with pytest.raises(ValueError, match=r"\[65, 256\]"):
        emulator.run(case.x.new_zeros(65, 256), case)
    with pytest.raises(ValueError, match="this weight has 33 rows"):
        emulator.run(case.x[:1], case, swiglu=True)
    with pytest.raises(ValueError, match=r"residual must be bfloat16 \[1, 33\], contiguous"):
        emulator.run(case.x[:1], case, residual=case.residual[:2])
    unaligned = case.x.flatten()[1 : 1 + 256].view(1, 256)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        emulator.run(unaligned, case)
