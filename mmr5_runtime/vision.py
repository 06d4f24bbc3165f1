"""The vision tower: patches of one page in, one embedding per 2 x 2 patches out.

Most blocks attend inside windows of ``window_size`` pixels, a few attend over the whole page. The
page's patches are put into window order once, at the entrance, and put back at the exit, so that a
window is a slice of consecutive rows. Windows of equal size are made neighbours as well: a page has
at most four sizes (inside, right edge, bottom edge, corner), so a windowed block needs at most four
batched attention calls, no mask and no padding.

One page per call: packing several pages into one call would make the result of a page depend, in
its last bits, on its company, and a page's embeddings could then not be remembered.

On a target that allows it, one Triton kernel rotates q and k and attends in all windows of a page.
It computes in bf16 and windows of up to 128 patches; blocks that see the whole page, fp32 and
larger windows go through torch on every target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from mmr5_kernels.target import Target
from mmr5_kernels.vision_reference import LONGEST_WINDOW
from mmr5_runtime.attention import window_attention
from mmr5_runtime.layers import GatedMLP, RMSNorm
from mmr5_runtime.rope import Grid, apply_rotary, vision_rotary
from mmr5_runtime.spec import VisionSpec
from mmr5_runtime.types import RequestError
from mmr5_runtime.weights import Weights

NORM_EPS = 1e-6  # fixed by the architecture, not part of config.json
# Dense MLPs on a GPU are widened with zeros to a multiple of this: rows of 3,420 bf16 values, the
# 7B model's, are no multiple of the 16 bytes that the fast matrix kernels load at once.
MLP_MULTIPLE = 64

# (qkv [P, 3, H, D] in window order, cos, sin [P, D/2] fp32) -> [P, H * D]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Sizes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class WindowPlan:
    """How one page is cut into windows.

    ``order`` [P / merge^2] int64: merged tokens, window by window, windows of equal size together.
    ``sizes``: for each run of equal windows, (windows, patches per window), in that order.
    """

    order: Tensor
    sizes: Sizes

    @property
    def table(self) -> Tensor:
        """[W, 2] int32: first patch and number of patches of each window, in that order."""
        counts, lengths = torch.tensor(self.sizes, dtype=torch.int32).unbind(1)
        each = lengths.repeat_interleave(counts)
        return torch.stack((each.cumsum(0, dtype=torch.int32) - each, each), dim=1)

    @property
    def longest(self) -> int:
        """Patches of the largest window."""
        return max(length for _, length in self.sizes)


def plan_windows(grid: Grid, spec: VisionSpec) -> WindowPlan:
    """Cuts a page into windows; those at the right and bottom edge may be smaller."""
    _, h, w = grid
    rows, columns = h // spec.spatial_merge_size, w // spec.spatial_merge_size
    side = spec.window_size // spec.factor  # merged tokens along a whole window
    across = -(-columns // side)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    window = ((row // side) * across + column // side).flatten()  # of each merged token
    tokens = window.bincount()  # of each window
    # Stable: tokens keep their raster order inside a window, windows inside a run of equal ones.
    order = (tokens[window] * len(tokens) + window).argsort(stable=True)
    runs = [(int((tokens == n).sum()), n * spec.merge_unit) for n in tokens.unique().tolist()]
    return WindowPlan(order, tuple(runs))


def attend_runs(qkv: Tensor, cos: Tensor, sin: Tensor, sizes: Sizes) -> Tensor:
    """Rotation and attention in torch, one call per run of equal windows; see ``Attend``."""
    q, k, v = qkv.unbind(1)
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    runs = [count * length for count, length in sizes]
    pieces = zip(q.split(runs), k.split(runs), v.split(runs), sizes, strict=True)
    return torch.cat([window_attention(qs, ks, vs, length) for qs, ks, vs, (_, length) in pieces])


class VisionBlock(nn.Module):
    """Pre-norm transformer block with biases; windowed or full attention."""

    def __init__(self, spec: VisionSpec, weights: Weights, name: str, target: Target) -> None:
        super().__init__()
        self.num_heads = spec.num_heads
        self.norm1 = RMSNorm(weights.tensor(f"{name}.norm1.weight"), NORM_EPS)
        self.norm2 = RMSNorm(weights.tensor(f"{name}.norm2.weight"), NORM_EPS)
        self.qkv = weights.linear(f"{name}.attn.qkv")
        self.proj = weights.linear(f"{name}.attn.proj")
        down = f"{name}.mlp.down_proj"
        dense = down not in weights.formats and weights.dtype == torch.bfloat16
        zeros = -spec.intermediate_size % MLP_MULTIPLE
        zeros = zeros if dense and target.device_type == "cuda" else 0
        self.mlp = GatedMLP(
            weights.linear(f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj", zero_rows=zeros),
            weights.linear(down, zero_columns=zeros),
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x [P, hidden] in window order; cos, sin [P, D/2] fp32."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))  # [P, 3, H, D]
        x = x + self.proj(attend(qkv, cos, sin))
        x = x + self.mlp(self.norm2(x))
        return x


class VisionTower(nn.Module):
    """Patch embedding, blocks, and the merger that makes merge x merge patches one token."""

    def __init__(self, spec: VisionSpec, weights: Weights, *, target: Target | None = None) -> None:
        """``target`` says which kernels may run, unless given that of ``weights``."""
        super().__init__()
        self.spec = spec
        target = target or weights.target
        served = (spec.window_size // spec.patch_size) ** 2 <= LONGEST_WINDOW
        served = served and weights.dtype == torch.bfloat16
        self._fused_windows = served and target.allows("window_attention")
        # The checkpoint stores a convolution whose stride is its kernel: a product over patches.
        name = "visual.patch_embed.proj"
        kernel = weights.tensor(f"{name}.weight").flatten(1)
        self.patch_embed = weights.shared_linear(name, kernel)
        blocks = (
            VisionBlock(spec, weights, f"visual.blocks.{i}", target) for i in range(spec.depth)
        )
        self.blocks = nn.ModuleList(blocks)
        self.merger_norm = RMSNorm(weights.tensor("visual.merger.ln_q.weight"), NORM_EPS)
        self.merger_in = weights.linear("visual.merger.mlp.0")
        self.merger_out = weights.linear("visual.merger.mlp.2")

    def forward(self, pixel_values: Tensor, grid: Grid) -> Tensor:
        """pixel_values [P, patch_dim] fp32 in merge order, any device; ``grid`` (1, h, w) patches.

        Returns [P / merge^2, out_hidden] in raster order, compute dtype, on the model's device.
        """
        spec, weight = self.spec, self.merger_norm.weight
        check_page(pixel_values, grid, spec)
        plan = plan_windows(grid, spec)
        order = plan.order.to(weight.device)

        def to_window_order(patches: Tensor) -> Tensor:
            return patches.view(len(order), spec.merge_unit, -1)[order].flatten(0, 1)

        cos, sin = (to_window_order(table.to(weight.device)) for table in vision_rotary(grid, spec))
        pixels = pixel_values.to(device=weight.device, dtype=weight.dtype)
        x = to_window_order(self.patch_embed(pixels))
        windowed, whole_page = self._windowed(plan), partial(attend_runs, sizes=((1, len(x)),))
        for index, block in enumerate(self.blocks):
            full = index in spec.fullatt_block_indexes
            x = block(x, cos, sin, whole_page if full else windowed)
        merged = self.merger_norm(x).unflatten(0, (-1, spec.merge_unit)).flatten(1)
        embeds: Tensor = self.merger_out(gelu(self.merger_in(merged)))
        return torch.empty_like(embeds).index_copy_(0, order, embeds)

    def _windowed(self, plan: WindowPlan) -> Attend:
        if not self._fused_windows:
            return partial(attend_runs, sizes=plan.sizes)
        from mmr5_kernels.ops.window_attention import rotary_window_attention  # imports Triton

        table = plan.table.to(self.merger_norm.weight.device)
        return partial(rotary_window_attention, windows=table, longest=plan.longest)


def check_page(pixel_values: Tensor, grid: Grid, spec: VisionSpec) -> None:
    """Raises :class:`RequestError` unless the patches are those of a page of ``grid``."""
    frames, h, w = grid
    merge = spec.spatial_merge_size
    fits = frames == 1 and h > 0 and w > 0 and h % merge == 0 and w % merge == 0
    if not fits or tuple(pixel_values.shape) != (h * w, spec.patch_dim):
        raise RequestError(
            f"pixel values {list(pixel_values.shape)} do not belong to a page of grid "
            f"{tuple(grid)}; expected (1, h, w) with h and w multiples of {merge} and h x w "
            f"patches of {spec.patch_dim} values."
        )
