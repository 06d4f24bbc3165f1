"""The vision tower as a graph for TensorRT: one page per call, any number of patches.

Inputs, P patches in merge order, W windows of L places:

============= ================== ======= ==========================================================
pixels        [P, patch_dim]     fp32    as the image code makes them
cos, sin      [P, D / 2]         fp32    :func:`mmr5_runtime.rope.vision_rotary`
windows       [W, L]             int64   the patch at each place of a window, 0 where it is not full
window_mask   [W, L]             int32   1 where there is a patch
places        [P]                int64   where each patch lies in the flattened windows
============= ================== ======= ==========================================================

Output ``embeddings`` [P / merge^2, out_hidden] in the activations' dtype, tokens in raster order.

A windowed block gathers the rotated q, k and v into [W, L] windows, attends with a mask of L x L
values each and gathers the patches back; a full block attends over the page as it is. No mask has
P x P values. Rotation is in fp32, as in the torch tower.

That a full block runs as one fused kernel is assumed of TensorRT, which has run none of this: a
kernel that stores its scores would need heads x P x P values, 137 GB for a page of 65,536 patches
at 16 heads. TensorRT-RTX 1.7.1 compiles it, which does not say how much memory it takes.

Opset 23, the first with ``Attention``, which the parser takes since TensorRT 10.14 (by its release
notes; TensorRT-LLM 1.2.1 has 10.14.1). Its rotary layer is of 10.15: rotation is written out.
"""

from __future__ import annotations

import torch

from mmr5_export.finished import FinishedEngine
from mmr5_export.onnx.graph import DataFile, Graph
from mmr5_export.onnx.trt_layers import cast, gated_mlp, rms_norm, rotate
from mmr5_export.onnx.trt_linear import EngineWeights
from mmr5_runtime.vision import NORM_EPS

VISION_OPSET = 23


def vision_graph(engine: FinishedEngine, data: DataFile, dtype: torch.dtype) -> Graph:
    """The graph; its weights are written to ``data``. Raises as :class:`EngineWeights`."""
    spec = engine.spec.vision
    graph = Graph("vision", VISION_OPSET)
    weights = EngineWeights(graph, data, engine, dtype)
    pixels = graph.input("pixels", torch.float32, ["P", spec.patch_dim])
    page = _Page(weights, spec.num_heads, spec.head_dim)
    x = weights.rows_product(
        cast(graph, pixels, torch.float32, dtype),
        weights.tensor("visual.patch_embed.proj.weight", flat=True),
    )
    for index in range(spec.depth):
        name = f"visual.blocks.{index}"
        normed = rms_norm(weights, x, f"{name}.norm1.weight", NORM_EPS)
        qkv = weights.linear(f"{name}.attn.qkv", normed)
        attended = page.attend(qkv, windowed=index not in spec.fullatt_block_indexes)
        x = graph.node("Add", x, weights.linear(f"{name}.attn.proj", attended))
        normed = rms_norm(weights, x, f"{name}.norm2.weight", NORM_EPS)
        x = graph.node("Add", x, gated_mlp(weights, normed, f"{name}.mlp"))
    merged = rms_norm(weights, x, "visual.merger.ln_q.weight", NORM_EPS)
    merged = graph.node("Reshape", merged, graph.constant([-1, spec.merge_unit * spec.hidden_size]))
    inner = graph.node("Gelu", weights.linear("visual.merger.mlp.0", merged))
    embeddings = weights.linear("visual.merger.mlp.2", inner)
    graph.output("embeddings", embeddings, dtype, ["tokens", spec.out_hidden_size])
    return graph


class _Page:
    """The inputs that say where patches lie, and attention by them."""

    def __init__(self, weights: EngineWeights, heads: int, dim: int) -> None:
        graph = self.graph = weights.graph
        self.dtype, self.heads, self.dim = weights.dtype, heads, dim
        tables = (graph.input(name, torch.float32, ["P", dim // 2]) for name in ("cos", "sin"))
        one = graph.constant([1])
        self.cos, self.sin = (graph.node("Unsqueeze", table, one) for table in tables)
        self.windows = graph.input("windows", torch.int64, ["W", "L"])
        mask = graph.input("window_mask", torch.int32, ["W", "L"])
        self.places = graph.input("places", torch.int64, ["P"])
        mask = graph.node("Unsqueeze", cast(graph, mask, torch.int32, torch.bool), one)
        count = graph.node("Shape", self.windows, start=0, end=1)
        length = graph.node("Shape", self.windows, start=1, end=2)
        shape = graph.node("Concat", count, length, length, axis=0)
        # A row for every query, though all are alike: ONNX Runtime takes no mask of one row.
        self.mask = graph.node("Unsqueeze", graph.node("Expand", mask, shape), one)  # [W, 1, L, L]

    def attend(self, qkv: str, *, windowed: bool) -> str:
        """qkv [P, 3 * H * D], q before k before v -> [P, H * D]."""
        graph, size = self.graph, self.heads * self.dim
        shape = graph.constant([-1, 3, self.heads, self.dim])
        parts = graph.nodes(
            "Split", graph.node("Reshape", qkv, shape), outputs=3, axis=1, num_outputs=3
        )
        q, k, v = (graph.node("Squeeze", part, graph.constant([1])) for part in parts)  # [P, H, D]
        heads = [self._heads(part, windowed) for part in (self._rotated(q), self._rotated(k), v)]
        out = graph.node("Attention", *heads, *([self.mask] if windowed else []))
        out = graph.node("Transpose", out, perm=[0, 2, 1, 3])
        out = graph.node("Reshape", out, graph.constant([-1, size]))
        return graph.node("Gather", out, self.places, axis=0) if windowed else out

    def _rotated(self, x: str) -> str:
        wide = cast(self.graph, x, self.dtype, torch.float32)
        return cast(
            self.graph, rotate(self.graph, wide, self.cos, self.sin), torch.float32, self.dtype
        )

    def _heads(self, x: str, windowed: bool) -> str:
        """[P, H, D] -> [W, H, L, D], or [1, H, P, D]."""
        graph = self.graph
        if windowed:
            x = graph.node("Gather", x, self.windows, axis=0)
        else:
            x = graph.node("Unsqueeze", x, graph.constant([0]))
        return graph.node("Transpose", x, perm=[0, 2, 1, 3])
