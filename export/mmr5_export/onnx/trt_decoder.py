"""The language model as a graph for TensorRT: embeddings in, logits of chosen tokens out.

One graph and one engine for prompts and for steps; they differ in their optimisation profile.
T new tokens follow S that the buffers hold; ``capacity`` is a constant of the graph.

==================== ========================== ======= ===========================================
embeds               [T, hidden]                dtype   token embeddings, pages put in
cos, sin             [T, D / 2]                 fp32    M-RoPE tables of the new tokens
places               [T]                        int64   S, S + 1, ...: where keys are written
keys                 [keys]                     int64   0, 1, 2, ...: how far attention looks
rows                 [M]                        int64   of which new tokens logits are wanted
past_key.i, value    [1, K, capacity, D]        dtype   buffers of layer i
logits               [M, V]                     fp32
present_key.i, value [1, K, capacity, D]        dtype   the same buffers, with the new tokens
==================== ========================== ======= ===========================================

Bind each ``present_*`` to the memory of its ``past_*``: TensorScatter (opset 24) becomes
TensorRT's KV cache update, which writes T rows in place. Its sequence length must be a constant;
what a step reads must not be, so attention looks at a slice of the buffers as long as ``keys``,
any number from S + T to ``capacity``. Query t sees the places up to its own, so ``keys`` may be
rounded up, to keep shapes for CUDA graphs; buffers must begin as zeros then, since a masked place
is multiplied by 0 and not skipped.

Written otherwise, it would not do what it says: growing the cache by Concat copies all of it every
step and needs two sets of buffers; ``Attention`` with past and present has three outputs, and
TensorRT-RTX 1.7.1 takes one; and with opset 24's ``nonpad_kv_seqlen`` it builds an engine that
ignores the input. All of this is known of TensorRT-RTX's parser and builder, and assumed of
TensorRT, which has run none of it. So is a fused kernel for ``Attention``: one that stores its
scores would need heads x T x keys values, 15 GB for 16,384 of both at 28 heads.

The head is part of the graph, after the chosen rows, so that a prompt computes one row of logits
and a drafted step all of its own.
"""

from __future__ import annotations

import torch

from mmr5_export.finished import FinishedEngine
from mmr5_export.onnx.graph import DataFile, Graph
from mmr5_export.onnx.trt_layers import cast, gated_mlp, rms_norm, rotate
from mmr5_export.onnx.trt_linear import EngineWeights
from mmr5_runtime.spec import TextSpec

DECODER_OPSET = 24


def decoder_graph(
    engine: FinishedEngine, data: DataFile, dtype: torch.dtype, capacity: int
) -> Graph:
    """The graph; its weights are written to ``data``. Raises as :class:`EngineWeights`.

    ``capacity``: tokens that the KV buffers hold.
    """
    spec = engine.spec.text
    graph = Graph("decoder", DECODER_OPSET)
    weights = EngineWeights(graph, data, engine, dtype)
    x = graph.input("embeds", dtype, ["T", spec.hidden_size])
    attention = _Attention(weights, spec, capacity)
    rows = graph.input("rows", torch.int64, ["M"])
    for index in range(spec.num_layers):
        name = f"model.layers.{index}"
        normed = rms_norm(weights, x, f"{name}.input_layernorm.weight", spec.rms_norm_eps)
        attended = attention.attend(index, normed)
        x = graph.node("Add", x, weights.linear(f"{name}.self_attn.o_proj", attended))
        normed = rms_norm(weights, x, f"{name}.post_attention_layernorm.weight", spec.rms_norm_eps)
        x = graph.node("Add", x, gated_mlp(weights, normed, f"{name}.mlp"))
    x = graph.node("Gather", x, rows, axis=0)
    x = rms_norm(weights, x, "model.norm.weight", spec.rms_norm_eps)
    tied = spec.tie_word_embeddings and "lm_head" not in engine.formats
    if tied:
        logits = weights.rows_product(x, weights.tensor("model.embed_tokens.weight"))
    else:
        logits = weights.linear("lm_head", x)
    logits = cast(graph, logits, dtype, torch.float32)
    graph.output("logits", logits, torch.float32, ["M", spec.vocab_size])
    return graph


class _Attention:
    """The inputs that say where tokens lie, and attention of every layer over its buffers."""

    def __init__(self, weights: EngineWeights, spec: TextSpec, capacity: int) -> None:
        graph = self.graph = weights.graph
        self.weights, self.spec = weights, spec
        self.cache = [1, spec.num_kv_heads, capacity, spec.head_dim]
        half = spec.head_dim // 2
        tables = (graph.input(name, torch.float32, ["T", half]) for name in ("cos", "sin"))
        one = graph.constant([1])
        self.cos, self.sin = (
            graph.node("Unsqueeze", cast(graph, table, torch.float32, weights.dtype), one)
            for table in tables
        )
        places = graph.input("places", torch.int64, ["T"])
        keys = graph.input("keys", torch.int64, ["keys"])
        self.start = graph.node("Slice", places, graph.constant([0]), one)
        self.length = graph.node("Shape", keys)
        seen = graph.node("LessOrEqual", keys, graph.node("Unsqueeze", places, one))
        self.mask = graph.node("Unsqueeze", seen, graph.constant([0, 1]))  # [1, 1, T, keys]

    def attend(self, layer: int, x: str) -> str:
        """x [T, hidden], normalised -> [T, H * D]."""
        graph, spec, name = self.graph, self.spec, f"model.layers.{layer}.self_attn"
        q, k, v = (
            graph.node(
                "Reshape",
                self.weights.linear(f"{name}.{part}_proj", x),
                graph.constant([-1, count, spec.head_dim]),
            )
            for part, count in zip(
                "qkv", (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), strict=True
            )
        )
        q, k = (self._heads(rotate(graph, part, self.cos, self.sin)) for part in (q, k))
        keys = self._cached(f"key.{layer}", k)
        values = self._cached(f"value.{layer}", self._heads(v))
        out = graph.node("Attention", q, keys, values, self.mask)
        out = graph.node("Transpose", out, perm=[0, 2, 1, 3])
        return graph.node("Reshape", out, graph.constant([-1, spec.q_size]))

    def _heads(self, x: str) -> str:
        """[T, heads, D] -> [1, heads, T, D]."""
        graph = self.graph
        return graph.node(
            "Unsqueeze", graph.node("Transpose", x, perm=[1, 0, 2]), graph.constant([0])
        )

    def _cached(self, name: str, new: str) -> str:
        """Writes [1, K, T, D] into a buffer and returns the part of it that attention reads."""
        graph, dtype = self.graph, self.weights.dtype
        past = graph.input(f"past_{name}", dtype, self.cache)
        present = f"present_{name}"
        value = graph.node("TensorScatter", past, new, self.start, axis=2)
        graph.output(present, value, dtype, self.cache)
        return graph.node("Slice", present, graph.constant([0]), self.length, graph.constant([2]))
