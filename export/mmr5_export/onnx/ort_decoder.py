"""The language model as two ONNX Runtime graphs: the layers, and the head.

::

    decoder   embeds [T, hidden]                      of T tokens behind the S that are cached
              cos, sin [T, D/2]                       their rotation, all three axes dealt out
              last_key int32 [1], keys int32 [1]      S + T - 1 and S + T
              past_key.i, past_value.i [1, K, C, D]   layer i of an arena of capacity C
           -> hidden [T, hidden]
              present_key.i, present_value.i          the same memory, tokens S .. S + T - 1 written
    head      hidden [M, hidden] -> logits [M, V]

``GroupQueryAttention`` (com.microsoft) writes new keys and values in place when past and present
are bound to the same memory, which is what the runtime does with its arena, and needs no mask. One
graph serves prompts, segments of prompts and decode steps. Positions come in as rotations, because
those of a page token differ by axis.
"""

from __future__ import annotations

import torch

from mmr5_export.onnx.graph import Graph
from mmr5_export.onnx.ort_linear import CONTRIB, GraphWeights
from mmr5_runtime.spec import ModelSpec

OPSET = 23  # has RMSNormalization


def add_decoder(graph: Graph, spec: ModelSpec, weights: GraphWeights) -> None:
    """Adds inputs, layers and outputs of ``decoder`` to an empty graph."""
    text, dtype = spec.text, weights.dtype
    x = graph.input("embeds", dtype, ["T", text.hidden_size])
    cos = graph.input("cos", dtype, ["T", text.head_dim // 2])
    sin = graph.input("sin", dtype, ["T", text.head_dim // 2])
    last_key = graph.input("last_key", torch.int32, [1])
    keys = graph.input("keys", torch.int32, [1])
    cache: list[int | str] = [1, text.num_kv_heads, "C", text.head_dim]
    first = graph.constant([0])
    added: str | None = None  # what the layer before adds to the residual stream
    for index in range(text.num_layers):
        name = f"model.layers.{index}"
        past_key = graph.input(f"past_key.{index}", dtype, cache)
        past_value = graph.input(f"past_value.{index}", dtype, cache)
        x, normed = _norm(graph, spec, weights, x, added, f"{name}.input_layernorm.weight")
        qkv = weights.linear(normed, *(f"{name}.self_attn.{part}_proj" for part in "qkv"))
        rotated, value = graph.nodes(
            "Split",
            qkv,
            _sizes(graph, text.q_size + text.kv_size, text.kv_size),
            outputs=2,
            axis=-1,
        )
        rotated = graph.node(
            "RotaryEmbedding",
            _batched(graph, rotated),
            first,
            cos,
            sin,
            domain=CONTRIB,
            num_heads=text.num_heads + text.num_kv_heads,
        )
        query, key = graph.nodes(
            "Split", rotated, _sizes(graph, text.q_size, text.kv_size), outputs=2, axis=-1
        )
        seen, present_key, present_value = graph.nodes(
            "GroupQueryAttention",
            query,
            key,
            _batched(graph, value),
            past_key,
            past_value,
            last_key,
            keys,
            outputs=3,
            domain=CONTRIB,
            num_heads=text.num_heads,
            kv_num_heads=text.num_kv_heads,
        )
        graph.output(f"present_key.{index}", present_key, dtype, cache)
        graph.output(f"present_value.{index}", present_value, dtype, cache)
        seen = graph.node("Reshape", seen, graph.constant([-1, text.q_size]))
        attended = weights.linear(seen, f"{name}.self_attn.o_proj")
        post = f"{name}.post_attention_layernorm.weight"
        x, normed = _norm(graph, spec, weights, x, attended, post)
        added = gated_mlp(graph, weights, normed, f"{name}.mlp")
    assert added is not None
    graph.output("hidden", graph.node("Add", x, added), dtype, ["T", text.hidden_size])


def add_head(graph: Graph, spec: ModelSpec, weights: GraphWeights) -> None:
    """Adds inputs, final norm and output head of ``head`` to an empty graph."""
    text = spec.text
    hidden = graph.input("hidden", weights.dtype, ["M", text.hidden_size])
    scale = weights.tensor("model.norm.weight")
    normed = graph.node("RMSNormalization", hidden, scale, epsilon=text.rms_norm_eps)
    logits = weights.linear(normed, "lm_head")
    graph.output("logits", logits, weights.dtype, ["M", text.vocab_size])


def gated_mlp(graph: Graph, weights: GraphWeights, x: str, name: str) -> str:
    """down(silu(gate(x)) * up(x)) over x [M, hidden]."""
    gate_up = weights.linear(x, f"{name}.gate_proj", f"{name}.up_proj")
    gate, up = graph.nodes("Split", gate_up, outputs=2, axis=-1, num_outputs=2)
    # x * sigmoid(alpha * x); with alpha 1 that is SiLU.
    gate = graph.node("QuickGelu", gate, domain=CONTRIB, alpha=1.0)
    return weights.linear(graph.node("Mul", gate, up), f"{name}.down_proj")


def _norm(
    graph: Graph, spec: ModelSpec, weights: GraphWeights, x: str, added: str | None, name: str
) -> tuple[str, str]:
    """The residual stream with what is added to it, and its norm."""
    scale, eps = weights.tensor(name), spec.text.rms_norm_eps
    if added is None:
        return x, graph.node("RMSNormalization", x, scale, epsilon=eps)
    normed, _, _, total = graph.nodes(
        "SkipSimplifiedLayerNormalization",
        x,
        added,
        scale,
        outputs=4,
        domain=CONTRIB,
        epsilon=eps,
    )
    return total, normed


def _batched(graph: Graph, x: str) -> str:
    """[T, n] -> [1, T, n]."""
    return graph.node("Unsqueeze", x, graph.constant([0]))


def _sizes(graph: Graph, *sizes: int) -> str:
    return graph.constant(sizes)
