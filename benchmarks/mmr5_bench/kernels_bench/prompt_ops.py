"""What reading pages and prompts does besides linears: attention of a whole prompt by every
backend torch has, windows of the vision tower, rounding activations to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mmr5_bench.kernels_bench.attention import attention_error, plain_attention
from mmr5_bench.kernels_bench.operands import Deviation, deviation
from mmr5_bench.kernels_bench.shapes import Shapes
from mmr5_bench.kernels_bench.workload import Workload, usable_rates
from mmr5_kernels import reference
from mmr5_kernels.vision_reference import rotary_window_attention as window_reference
from mmr5_runtime.attention import window_attention
from mmr5_runtime.rope import Grid, apply_rotary
from mmr5_runtime.vision import plan_windows

_DTYPE = torch.bfloat16
_EXACT = Deviation(0.0, 0.0)
BACKENDS = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""torch's own attention, by the name its rows have; a backend that refuses is skipped."""
OWN = "prefill_attention"


def prefill_attention_workload(
    shapes: Shapes, tokens: int, kernel: str, device: torch.device
) -> Workload:
    """One fresh prompt of ``tokens`` through one backend of SDPA, or through our own kernel.

    ``kernel`` is one of :data:`BACKENDS` or :data:`OWN`; RuntimeError where a backend refuses. The
    dense side is SDPA's own choice over keys repeated for every query head.
    """
    text = shapes.spec.text
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(tokens, text.num_heads, text.head_dim, generator=generator).to(device, _DTYPE)
    kv = torch.randn(2, text.num_kv_heads, tokens, text.head_dim, generator=generator)
    k, v = kv.to(device, _DTYPE)
    attend = _own(q, k, v) if kernel == OWN else partial(_backend, kernel, q, k, v)
    return Workload(
        op="attention.prefill",
        format="dense",
        kernel=kernel,
        dtype=_DTYPE,
        shape=(tokens, tokens, text.q_size),
        calls=[attend],
        dense=[partial(plain_attention, q, k, v)],
        nbytes=k.nbytes + v.nbytes + 2 * q.nbytes,
        flops=2 * text.q_size * tokens * (tokens + 1),
        rates=usable_rates(_DTYPE, None),
        cold=False,
        error=attention_error(attend(), q, k, v),
        origin="ours" if kernel == OWN else "library",
        chosen=False,
    )


def _own(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    from mmr5_kernels.ops.prefill_attention import causal_attention

    return partial(causal_attention, q, k, v)


def _backend(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(BACKENDS[name]):
        out = scaled_dot_product_attention(
            q.transpose(0, 1)[None], k[None], v[None], is_causal=True, enable_gqa=True
        )
    return out[0].transpose(0, 1).flatten(1)


def window_attention_workload(shapes: Shapes, device: torch.device) -> Workload:
    """One vision block's windowed attention of a page, rotation included, in bf16.

    The dense side is the portable path: rotation in torch, SDPA once per size of window.
    """
    from mmr5_kernels.ops.window_attention import rotary_window_attention

    vision = shapes.spec.vision
    grid, heads = page_grid(shapes.patches), vision.num_heads
    dim = vision.hidden_size // heads
    generator = torch.Generator().manual_seed(shapes.patches)
    qkv = torch.randn(shapes.patches, 3, heads, dim, generator=generator).to(device, _DTYPE)
    angles = torch.rand(shapes.patches, dim // 2, generator=generator).to(device)
    cos, sin = angles.cos(), angles.sin()
    sizes = plan_windows(grid, vision).sizes
    lengths = torch.tensor([length for count, length in sizes for _ in range(count)])
    starts = lengths.cumsum(0) - lengths
    windows = torch.stack([starts, lengths], dim=1).to(device, torch.int32)
    longest = int(lengths.max())

    def ours() -> Tensor:
        return rotary_window_attention(qkv, cos, sin, windows, longest=longest)

    def portable() -> Tensor:
        q, k, v = qkv.unbind(1)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        runs = [count * length for count, length in sizes]
        pieces = zip(q.split(runs), k.split(runs), v.split(runs), sizes, strict=True)
        return torch.cat([window_attention(a, b, c, size[1]) for a, b, c, size in pieces])

    return Workload(
        op="vision.window",
        format="dense",
        kernel="window_attention",
        dtype=_DTYPE,
        shape=(shapes.patches, longest, vision.hidden_size),
        calls=[ours],
        dense=[portable],
        nbytes=qkv.nbytes + qkv.nbytes // 3 + cos.nbytes + sin.nbytes,
        flops=int(4 * vision.hidden_size * (lengths * lengths).sum()),
        rates=usable_rates(_DTYPE, None),
        cold=False,
        error=deviation(ours(), window_reference(qkv, cos, sin, windows)),
        chosen=False,
    )


def quantize_workload(shapes: Shapes, tokens: int, kind: str, device: torch.device) -> Workload:
    """Rounding ``tokens`` rows of activations to ``kind`` ("int8", "fp8"), a scale per row."""
    from mmr5_kernels.ops.quantize_rows import quantize_rows

    columns = shapes.spec.text.hidden_size
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
    x = x.to(device, _DTYPE)
    plain: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
        "int8": reference.quantize_activations_int8,
        "fp8": reference.quantize_activations_fp8,
    }
    found, wanted = quantize_rows(x, kind), plain[kind](x)
    return Workload(
        op="quantize_rows",
        format=kind,
        kernel="quantize_rows",
        dtype=_DTYPE,
        shape=(tokens, columns, 1),
        calls=[lambda: quantize_rows(x, kind)[0]],
        dense=[lambda: plain[kind](x)[0]],
        nbytes=x.nbytes + tokens * (columns + 4),
        flops=4 * tokens * columns,
        rates=usable_rates(_DTYPE, None),
        cold=False,
        error=_worst([deviation(a.float(), b.float()) for a, b in zip(found, wanted, strict=True)]),
        chosen=False,
        allowed=_EXACT,
    )


def page_grid(patches: int) -> Grid:
    """The most square page of ``patches`` patches whose sides are even; ValueError for none."""
    for rows in range(int(patches**0.5), 1, -1):
        if rows % 2 == 0 and patches % (2 * rows) == 0:
            return 1, rows, patches // rows
    raise ValueError(f"{patches} patches make no page of 2 x 2 merged ones")


def _worst(found: Sequence[Deviation]) -> Deviation:
    return Deviation(max(one.largest for one in found), max(one.rms for one in found))
