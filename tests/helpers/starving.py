"""Models that run out of memory: torch is told to, ONNX Runtime gets a graph that asks for more."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from mmr5_runtime import Reranker
from mmr5_runtime.onnx.model import OnnxModel
from mmr5_runtime.onnx.session import open_session

Part = Literal["decoder", "vision"]
TOO_MANY = 1 << 45  # fp64 values: twice the addresses that a program has
_NATIVE = {
    "decoder": "mmr5_runtime.model.causal_attention",
    "vision": "mmr5_runtime.vision.window_attention",
}


def no_memory(*_: object, **__: object) -> Any:
    """Stands for whatever allocates."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def starve(patch: pytest.MonkeyPatch, reranker: Reranker, part: Part, folder: Path) -> None:
    """From now on, ``part`` of a reranker of ``folder`` does not get the memory that it needs."""
    model = reranker._require_loaded().engine.model
    if not isinstance(model, OnnxModel):
        patch.setattr(_NATIVE[part], no_memory)
        return
    path = folder / "starving.onnx"  # beside the weights that it names
    onnx.save(_starving(folder / f"{part}.onnx"), str(path))
    patch.setattr(model, f"_{part}", open_session(path))
    path.unlink()


def _starving(graph: Path) -> onnx.ModelProto:
    """The graph, adding to its first output the sum of :data:`TOO_MANY` zeros as it runs."""
    model = onnx.load(str(graph), load_external_data=False)
    nodes, output, given = model.graph.node, model.graph.output[0].name, model.graph.input[0].name
    [last] = [node for node in nodes if output in node.output]
    last.output[list(last.output).index(output)] = "before"
    size = helper.make_tensor("too_many", TensorProto.INT64, [1], [TOO_MANY])
    axes = helper.make_tensor("all", TensorProto.INT64, [2], [0, 1])
    model.graph.initializer.extend([size, axes])
    nodes.extend(
        [  # from an input, so that nothing can be computed as the graph is loaded
            helper.make_node("ReduceMin", [given, "all"], ["least"], keepdims=0),
            helper.make_node("Cast", ["least"], ["wide"], to=TensorProto.DOUBLE),
            helper.make_node("Sub", ["wide", "wide"], ["zero"]),
            helper.make_node("Expand", ["zero", "too_many"], ["zeros"]),
            helper.make_node("ReduceSum", ["zeros"], ["sum"], keepdims=0),
            helper.make_node("Cast", ["sum"], ["added"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["before", "added"], [output]),
        ]
    )
    return model
