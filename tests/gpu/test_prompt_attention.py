"""Every way to attend in a prompt, the page kernel and the pixel lookup, on a GPU."""

from __future__ import annotations

import pytest
import torch

from helpers.pictures import noise
from mmr5_kernels import prefill_attention_reference, vision_reference
from mmr5_kernels.target import Target
from mmr5_runtime.attention import CAUSAL_METHODS, causal_method
from mmr5_runtime.image import PixelBudget, preprocess, preprocess_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("method", CAUSAL_METHODS)
@pytest.mark.parametrize(("tokens", "cached"), [(1, 0), (77, 0), (616, 0), (616, 1300), (5, 999)])
def test_every_method_agrees_and_repeats(method: str, tokens: int, cached: int) -> None:
    try:
        attend = causal_method(method, Target.of("cuda", "triton"), torch.bfloat16)
    except ValueError as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(tokens, 28, 128, generator=generator).bfloat16().cuda()
    arena = torch.full((2, 4, 2048, 128), float("nan"), dtype=torch.bfloat16, device="cuda")
    filled = torch.randn(2, 4, cached + tokens, 128, generator=generator).bfloat16()
    arena[:, :, : cached + tokens] = filled.cuda()
    k, v = arena[:, :, : cached + tokens]
    found = attend(q, k, v)
    wanted = prefill_attention_reference.causal_attention(q, k, v)
    torch.testing.assert_close(found.float(), wanted.float(), atol=0.02, rtol=0.02)
    assert torch.equal(attend(q, k, v), found)


def test_a_prompt_read_in_pieces_has_the_same_bits() -> None:
    from mmr5_kernels.ops.prefill_attention import causal_attention

    q = torch.randn(1500, 28, 128, generator=torch.Generator().manual_seed(5)).bfloat16().cuda()
    k, v = (
        torch.randn(2, 4, 1700, 128, generator=torch.Generator().manual_seed(6)).bfloat16().cuda()
    )
    whole = causal_attention(q, k, v)
    cuts = (0, 64, 680, 681, 1296, 1500)
    pieces = [
        causal_attention(q[a:b], k[:, : 200 + b], v[:, : 200 + b])
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    assert torch.equal(torch.cat(pieces), whole)


def test_the_rotation_in_the_window_kernel_has_the_bits_of_torch() -> None:
    from mmr5_kernels.ops.window_attention import rotary_window_attention

    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(640, 3, 16, 80, generator=generator).bfloat16().cuda()
    angles = (100 * torch.rand(640, 40, generator=generator)).cuda()
    windows = torch.tensor([[64 * i, 64] for i in range(10)], dtype=torch.int32, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    found = rotary_window_attention(qkv, cos, sin, windows, longest=64)
    wanted = vision_reference.rotary_window_attention(qkv, cos, sin, windows)
    torch.testing.assert_close(found.float(), wanted.float(), atol=0.02, rtol=0.02)
    # Turned before, by torch: the kernel then turns by nothing and has to see the same q and k.
    turned = qkv.clone()
    for part in (0, 1):
        turned[:, part] = vision_reference.turned(qkv[:, part], cos, sin)
    ones, zeros = torch.ones_like(cos), torch.zeros_like(sin)
    assert torch.equal(rotary_window_attention(turned, ones, zeros, windows, longest=64), found)


def test_pixels_made_on_the_gpu_are_those_of_the_cpu() -> None:
    image, budget = noise(500, 700, 3), PixelBudget()
    found = preprocess_bytes(image, budget).pixel_values(torch.device("cuda"))
    assert torch.equal(found.cpu(), preprocess(image, budget).pixel_values)
