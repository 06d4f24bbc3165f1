"""The window kernel of the vision tower, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmr5_kernels import vision_reference
from mmr5_runtime.attention import window_attention
from mmr5_runtime.rope import apply_rotary

triton = pytest.importorskip("triton", reason="needs Triton")
tl = pytest.importorskip("triton.language", reason="needs Triton")
ops = pytest.importorskip("mmr5_kernels.ops.window_attention", reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RAGGED = (64, 1, 33, 16, 64)


def table(lengths: tuple[int, ...]) -> Tensor:
    """[W, 2] int32 of windows that follow each other."""
    ends = torch.tensor(lengths).cumsum(0)
    return torch.stack((ends - torch.tensor(lengths), torch.tensor(lengths)), 1).int().to(DEVICE)


def draw(patches: int, heads: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(patches, 3, heads, dim, generator=generator).bfloat16()
    angles = 50 * torch.rand(patches, dim // 2, generator=generator)
    return qkv.to(DEVICE), angles.cos().to(DEVICE), angles.sin().to(DEVICE)


@pytest.mark.parametrize("dim", [80, 64, 32, 12])
def test_equals_the_reference(dim: int) -> None:
    qkv, cos, sin = draw(sum(RAGGED), 2, dim)
    found = ops.rotary_window_attention(qkv, cos, sin, table(RAGGED), longest=64)
    wanted = vision_reference.rotary_window_attention(qkv, cos, sin, table(RAGGED))
    assert found.shape == (sum(RAGGED), 2 * dim) and found.dtype == torch.bfloat16
    # Weights are rounded to bf16 before the sum, which the reference does not.
    torch.testing.assert_close(found.float(), wanted.float(), atol=0.012, rtol=0.008)
    error = (found.float() - wanted.float()).square().mean().sqrt()
    assert error <= 0.004 * wanted.float().square().mean().sqrt()


def test_equals_what_runs_without_it() -> None:
    qkv, cos, sin = draw(5 * 20, 3, 32, seed=1)
    found = ops.rotary_window_attention(qkv, cos, sin, table((20,) * 5), longest=20)
    q, k, v = qkv.unbind(1)
    wanted = window_attention(apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v, 20)
    torch.testing.assert_close(found.float(), wanted.float(), atol=0.012, rtol=0.008)


@triton.jit  # type: ignore[untyped-decorator]
def turn_kernel(  # type: ignore[no-untyped-def]
    x, cos, sin, out, count, stride,
    HALF: tl.constexpr,  # type: ignore[name-defined]
    WIDTH: tl.constexpr,  # type: ignore[name-defined]
    ROWS: tl.constexpr,  # type: ignore[name-defined]
    WIDE: tl.constexpr,  # type: ignore[name-defined]
):  # fmt: skip
    """One head's rows, as the attention kernel sees them."""
    rows, d = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    turned = ops.load_turned(x, cos, sin, rows, rows < count, stride, HALF, WIDTH, WIDE)
    tl.store(out + rows[:, None] * WIDTH + d[None, :], turned)


@pytest.mark.parametrize("dim", [80, 12])
def test_the_rotation_has_the_bits_of_torch(dim: int) -> None:
    qkv, cos, sin = draw(50, 3, dim, seed=2)
    q = qkv[:, 0, 1]
    width = max(16, triton.next_power_of_2(dim))
    out = torch.full((64, width), math.nan, dtype=torch.bfloat16, device=DEVICE)
    turn_kernel[(1,)](
        q, cos, sin, out, 50, qkv.stride(0), dim // 2, width, 64, ops.WIDE, enable_fp_fusion=False
    )
    wanted = apply_rotary(q[:, None], cos, sin)[:, 0]
    assert torch.equal(wanted, vision_reference.turned(q[:, None], cos, sin)[:, 0])
    assert torch.equal(out[:50, :dim], wanted)
    assert not out[50:].any() and not out[:, dim:].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the poison, in numpy
def test_a_window_sees_only_itself_and_repeats_its_bits() -> None:
    qkv, cos, sin = draw(sum(RAGGED), 2, 16, seed=3)
    first = ops.rotary_window_attention(qkv, cos, sin, table(RAGGED), longest=64)
    assert torch.equal(ops.rotary_window_attention(qkv, cos, sin, table(RAGGED), longest=64), first)
    start, length = 65, 33  # the third window; everything around it is poison
    inside = slice(start, start + length)
    poisoned = torch.full_like(qkv, math.nan)
    poisoned[inside] = qkv[inside]
    cos[:start] = math.nan
    sin[start + length :] = math.nan
    found = ops.rotary_window_attention(poisoned, cos, sin, table(RAGGED), longest=64)
    assert torch.equal(found[inside], first[inside])


def test_other_shapes_and_types_are_refused() -> None:
    qkv, cos, sin = draw(8, 2, 16)
    windows = table((8,))
    with pytest.raises(ValueError, match="portable path for other dtypes"):
        ops.rotary_window_attention(qkv.float(), cos, sin, windows, longest=8)
    with pytest.raises(ValueError, match="rotary table"):
        ops.rotary_window_attention(qkv, cos[:7], sin, windows, longest=8)
    with pytest.raises(ValueError, match=r"give \[W, 2\] int32"):
        ops.rotary_window_attention(qkv, cos, sin, windows.long(), longest=8)
    with pytest.raises(ValueError, match="129 patches"):
        ops.rotary_window_attention(qkv, cos, sin, windows, longest=129)
