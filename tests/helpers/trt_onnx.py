"""TensorRT's graphs, run by ONNX Runtime in fp32, the dtype that it computes on a CPU.

A graph is written in fp32 by the same builder, or written in bfloat16, as it ships, and every
constant of it widened: those have the values that ship then, and activations are not rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto
from torch import Tensor

from mmr5_export.finished import FinishedEngine
from mmr5_export.onnx.graph import DataFile, Graph
from mmr5_export.onnx.trt_decoder import decoder_graph
from mmr5_export.onnx.trt_vision import vision_graph
from mmr5_runtime.model import Model
from mmr5_runtime.onnx.windows import window_inputs
from mmr5_runtime.rope import Grid, TextRotary, vision_rotary


def torch_model(engine: FinishedEngine) -> Model:
    """The engine's model in fp32."""
    return Model.from_tensors(engine.spec, engine.get, engine.formats)


def session(path: Path, make: Callable[[DataFile], Graph]) -> onnxruntime.InferenceSession:
    """Writes, checks, widens and loads a graph, and keeps ONNX Runtime from rewriting it."""
    with DataFile(path.with_suffix(".data")) as data:
        graph = make(data)
    graph.save(path)
    onnx.checker.check_model(str(path), full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # else a line per KV buffer that is not bound in place
    model = _widened(path).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _widened(path: Path) -> onnx.ModelProto:
    """The graph with its weights in it, and fp32 wherever it says bfloat16."""
    narrow, wide = TensorProto.BFLOAT16, TensorProto.FLOAT
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.data_type == narrow:
            values = torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.bfloat16)
            tensor.raw_data = values.float().numpy().tobytes()
            tensor.data_type = wide
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == narrow:
            value.type.tensor_type.elem_type = wide
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == narrow:
                attribute.i = wide
    return model


def run(session: onnxruntime.InferenceSession, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs by name."""
    names = [output.name for output in session.get_outputs()]
    arrays = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in feeds.items()}
    outputs = session.run(names, arrays)
    return {name: torch.from_numpy(output) for name, output in zip(names, outputs, strict=True)}


class VisionOnnx:
    """The tower's graph of an engine."""

    def __init__(
        self, engine: FinishedEngine, folder: Path, dtype: torch.dtype = torch.float32
    ) -> None:
        self.spec = engine.spec.vision
        self.session = session(
            folder / "vision.onnx", lambda data: vision_graph(engine, data, dtype)
        )

    def __call__(self, pixels: Tensor, grid: Grid) -> Tensor:
        """pixels [P, patch_dim] in merge order -> [P / merge^2, out_hidden]."""
        cos, sin = vision_rotary(grid, self.spec)
        windows, mask, places = window_inputs(grid, self.spec)
        feeds = {"pixels": pixels, "cos": cos, "sin": sin, "windows": windows}
        return run(self.session, {**feeds, "window_mask": mask, "places": places})["embeddings"]


class DecoderOnnx:
    """The decoder's graph of an engine with its KV buffers, as a user would bind them."""

    def __init__(
        self,
        engine: FinishedEngine,
        folder: Path,
        capacity: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        spec = engine.spec.text
        self.rotary = TextRotary(spec)
        self.session = session(
            folder / "decoder.onnx",
            lambda data: decoder_graph(engine, data, dtype, capacity),
        )
        shape = (1, spec.num_kv_heads, capacity, spec.head_dim)
        self.buffers = {
            f"{part}.{layer}": torch.zeros(shape)
            for layer in range(spec.num_layers)
            for part in ("key", "value")
        }
        self.tokens = 0

    def __call__(
        self,
        embeds: Tensor,
        positions: Tensor,
        rows: Sequence[int] = (-1,),
        look: int | None = None,
    ) -> Tensor:
        """embeds [T, hidden], positions [3, T] -> logits [rows, V]; ``look`` places are read."""
        count = len(embeds)
        end = self.tokens + count
        cos, sin = self.rotary(positions)
        outputs = run(
            self.session,
            {
                "embeds": embeds,
                "cos": cos,
                "sin": sin,
                "places": torch.arange(self.tokens, end),
                "keys": torch.arange(look or end),
                "rows": torch.tensor([row % count for row in rows]),
                **{f"past_{name}": buffer for name, buffer in self.buffers.items()},
            },
        )
        self.buffers = {name: outputs[f"present_{name}"] for name in self.buffers}
        self.tokens = end
        return outputs["logits"]
