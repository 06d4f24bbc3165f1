"""The vision tower as an ONNX Runtime graph: one page in, its embeddings out.

::

    pixels [P, patch_dim]      patches of one page in merge order
    cos, sin [P, D/2]          their rotation
    windows [W, L] int64       patches of every window, filled up with patch 0 to the largest, L
    window_mask [W, L] int32   1 for a patch, 0 for a filler
    places [P] int64           where in windows each patch is, rows behind each other
 -> embeddings [P / merge^2, out_hidden]

Patches keep their order from entrance to exit. A windowed block gathers q, k and v of its windows,
attends inside each (fillers are masked, L x L at most) and gathers the results back; a block that
attends over the whole page has no mask at all. Nothing is P x P in memory.
"""

from __future__ import annotations

import torch

from mmr5_export.onnx.graph import Graph
from mmr5_export.onnx.ort_decoder import gated_mlp
from mmr5_export.onnx.ort_linear import CONTRIB, GraphWeights
from mmr5_runtime.spec import ModelSpec
from mmr5_runtime.vision import NORM_EPS


def add_vision(graph: Graph, spec: ModelSpec, weights: GraphWeights) -> None:
    """Adds inputs, blocks, merger and output to an empty graph."""
    vision, dtype = spec.vision, weights.dtype
    pixels = graph.input("pixels", dtype, ["P", vision.patch_dim])
    cos = graph.input("cos", dtype, ["P", vision.head_dim // 2])
    sin = graph.input("sin", dtype, ["P", vision.head_dim // 2])
    windows = graph.input("windows", torch.int64, ["W", "L"])
    mask = graph.input("window_mask", torch.int32, ["W", "L"])
    places = graph.input("places", torch.int64, ["P"])
    kernel = weights.tensor(
        "visual.patch_embed.proj.weight", (vision.hidden_size, vision.patch_dim)
    )
    x = graph.node("Gemm", pixels, kernel, transB=1)
    for index in range(vision.depth):
        name = f"visual.blocks.{index}"
        normed = _rms_norm(graph, weights, x, f"{name}.norm1.weight")
        qkv = weights.linear(normed, f"{name}.attn.qkv")
        rotated, value = graph.nodes(
            "Split",
            qkv,
            graph.constant([2 * vision.hidden_size, vision.hidden_size]),
            outputs=2,
            axis=-1,
        )
        rotated = graph.node(
            "RotaryEmbedding",
            graph.node("Unsqueeze", rotated, graph.constant([0])),
            graph.constant([0]),
            cos,
            sin,
            domain=CONTRIB,
            num_heads=2 * vision.num_heads,
        )
        value = graph.node("Unsqueeze", value, graph.constant([0]))
        if index in vision.fullatt_block_indexes:
            query, key = graph.nodes("Split", rotated, outputs=2, axis=-1, num_outputs=2)
            seen = _attention(graph, vision.num_heads, query, key, value)
            seen = graph.node("Reshape", seen, graph.constant([-1, vision.hidden_size]))
        else:
            joined = graph.node("Concat", rotated, value, axis=-1)
            joined = graph.node("Squeeze", joined, graph.constant([0]))
            own = graph.node("Gather", joined, windows)  # [W, L, 3 * hidden]
            query, key, value = graph.nodes("Split", own, outputs=3, axis=-1, num_outputs=3)
            seen = _attention(graph, vision.num_heads, query, key, value, mask)
            seen = graph.node("Reshape", seen, graph.constant([-1, vision.hidden_size]))
            seen = graph.node("Gather", seen, places)
        x = graph.node("Add", x, weights.linear(seen, f"{name}.attn.proj"))
        normed = _rms_norm(graph, weights, x, f"{name}.norm2.weight")
        x = graph.node("Add", x, gated_mlp(graph, weights, normed, f"{name}.mlp"))
    normed = _rms_norm(graph, weights, x, "visual.merger.ln_q.weight")
    merged = vision.merge_unit * vision.hidden_size
    rows = graph.node("Reshape", normed, graph.constant([-1, merged]))
    inner = graph.node("Gelu", weights.linear(rows, "visual.merger.mlp.0"))
    embeddings = weights.linear(inner, "visual.merger.mlp.2")
    graph.output("embeddings", embeddings, dtype, ["N", vision.out_hidden_size])


def _rms_norm(graph: Graph, weights: GraphWeights, x: str, name: str) -> str:
    return graph.node("RMSNormalization", x, weights.tensor(name), epsilon=NORM_EPS)


def _attention(
    graph: Graph, heads: int, query: str, key: str, value: str, mask: str | None = None
) -> str:
    """Every row of a batch over all rows of it that ``mask`` shows: [B, L, hidden] three times."""
    inputs = [query, key, value, *([] if mask is None else [None, mask])]
    return graph.node("MultiHeadAttention", *inputs, domain=CONTRIB, num_heads=heads)
