"""What both towers are made of, in plain operators.

Norms and rotations are written out instead of using opset 23's operators for them: their arithmetic
is then that of the torch engine, cast by cast, and nothing depends on which release learned which
operator. Statistics are in fp32. Softmax is left to ``Attention``, whose attribute
``softmax_precision`` TensorRT-RTX 1.7.1 refuses; its precision is the kernel's choice.
"""

from __future__ import annotations

import torch

from mmr5_export.onnx.graph import Graph, tensor_type
from mmr5_export.onnx.trt_linear import EngineWeights


def cast(graph: Graph, x: str, source: torch.dtype, target: torch.dtype) -> str:
    """``x`` in another dtype; no node where there is nothing to do."""
    return x if source == target else graph.node("Cast", x, to=tensor_type(target))


def rms_norm(weights: EngineWeights, x: str, name: str, eps: float) -> str:
    """x [M, hidden] / rms(x) * weight: rounded to the activations' dtype before the weight."""
    graph, dtype = weights.graph, weights.dtype
    wide = cast(graph, x, dtype, torch.float32)
    mean = graph.node("ReduceMean", graph.node("Mul", wide, wide), graph.constant([-1]))
    root = graph.node("Sqrt", graph.node("Add", mean, graph.constant(eps)))
    normed = cast(graph, graph.node("Div", wide, root), torch.float32, dtype)
    return graph.node("Mul", normed, weights.tensor(name))


def rotate(graph: Graph, x: str, cos: str, sin: str) -> str:
    """x [M, heads, D] turned by cos, sin [M, 1, D / 2], all of one dtype."""
    first, second = graph.nodes("Split", x, outputs=2, axis=-1, num_outputs=2)
    turned = (
        graph.node("Sub", graph.node("Mul", first, cos), graph.node("Mul", second, sin)),
        graph.node("Add", graph.node("Mul", second, cos), graph.node("Mul", first, sin)),
    )
    return graph.node("Concat", *turned, axis=-1)


def gated_mlp(weights: EngineWeights, x: str, name: str) -> str:
    """down(silu(gate(x)) * up(x)) of x [M, hidden]."""
    graph = weights.graph
    gate = weights.linear(f"{name}.gate_proj", x)
    up = weights.linear(f"{name}.up_proj", x)
    silu = graph.node("Mul", gate, graph.node("Sigmoid", gate))
    return weights.linear(f"{name}.down_proj", graph.node("Mul", silu, up))
