"""One linear at a time: the nodes and constants TensorRT gets, against the reference arithmetic."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from torch import Tensor

from helpers.exporting import quick_export
from helpers.trt_onnx import run, session
from mmr5_export.finished import FinishedEngine, open_finished
from mmr5_export.onnx.graph import DataFile, Graph
from mmr5_export.onnx.trt_linear import EngineWeights, refuse_formats, signed_nibbles
from mmr5_export.options import OptionError
from mmr5_kernels.layout import FP8, INT4, INT8, INT8_WEIGHT_ONLY, Format
from mmr5_kernels.reference import dequantize
from mmr5_runtime.types import ExportError

MINI = Path(str(resources.files("mmr5_runtime") / "assets" / "mini"))
BIASED, PLAIN = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"
ENGINES: dict[str, dict[str, Any]] = {
    "bf16": {"quant": "bf16"},
    "int4": {"quant": "int4"},
    "int4-g64": {"quant": "int4", "group_size": 64},
    "int8-weight-only": {"quant": "int8-weight-only"},
    "int8": {"quant": "int8"},
    "fp8": {"quant": "fp8"},
}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("engines")

    @cache
    def make(name: str) -> FinishedEngine:
        quick_export(MINI, output=root / name, **ENGINES[name])
        engine = open_finished(root / name)
        tops = {linear: 4.0 for linear, format in engine.formats.items() if format.activations}
        return replace(engine, input_absmax=tops)

    return make


def _graph(engine: FinishedEngine, data: DataFile, name: str, dtype: torch.dtype) -> Graph:
    columns = _dense(engine, name).shape[1]
    graph = Graph("linear", 24)
    x = graph.input("x", dtype, ["M", columns])
    y = EngineWeights(graph, data, engine, dtype).linear(name, x)
    graph.output("y", y, dtype, ["M", "N"])
    return graph


def _dense(engine: FinishedEngine, name: str) -> Tensor:
    format = engine.formats.get(name)
    if format is None:
        return engine.get(f"{name}.weight").float()
    parts = {suffix: engine.get(f"{name}.{suffix}") for suffix in format.tensors(1, 128)}
    return dequantize(format, parts, torch.float32)


def _golden(engine: FinishedEngine, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """With the scale of x in ``dtype``, the graph's."""
    format = engine.formats.get(name)
    if format is not None and format.activations == "int8":
        scale = float(torch.tensor(4 / 127, dtype=dtype))
        x = (x / scale).round().clamp(-128, 127) * scale
    if format is not None and format.activations == "fp8":
        scale = float(torch.tensor(4 / 448, dtype=dtype))
        x = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    y = x @ _dense(engine, name).T
    bias = f"{name}.bias"
    return y + engine.get(bias).float() if bias in engine.manifest.tensors else y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("linear", [BIASED, PLAIN])
@pytest.mark.parametrize("name", ENGINES)
def test_a_linear_is_the_reference(
    name: str, linear: str, dtype: torch.dtype, engines: Any, tmp_path: Path
) -> None:
    """Also outside of the calibrated range, where codes saturate: 4 is the largest input."""
    engine = engines(name)
    made = session(tmp_path / "linear.onnx", lambda data: _graph(engine, data, linear, dtype))
    columns = _dense(engine, linear).shape[1]
    x = 2 * torch.randn(9, columns, generator=torch.Generator().manual_seed(5))
    expected = _golden(engine, linear, x, dtype)
    assert float((run(made, {"x": x})["y"] - expected).abs().max()) <= 1e-4


@pytest.mark.parametrize(
    ("name", "types", "operators"),
    [
        ("bf16", {"weight": TensorProto.BFLOAT16}, ["Gemm"]),
        (
            "int4",
            {"weight": TensorProto.INT4, "weight_scale": TensorProto.BFLOAT16},
            ["DequantizeLinear", "MatMul"],
        ),
        (
            "int8-weight-only",
            {"weight": TensorProto.INT8, "weight_scale": TensorProto.BFLOAT16},
            ["DequantizeLinear", "Gemm"],
        ),
        (
            "int8",
            {"weight": TensorProto.INT8, "weight_scale": TensorProto.BFLOAT16},
            ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Gemm"],
        ),
        (
            "fp8",
            {"weight": TensorProto.FLOAT8E4M3FN, "weight_scale": TensorProto.BFLOAT16},
            ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Gemm"],
        ),
    ],
)
def test_types_are_strong(
    name: str, types: dict[str, int], operators: list[str], engines: Any, tmp_path: Path
) -> None:
    """A code stays a code of its size, and every scale has the dtype of the activations."""
    with DataFile(tmp_path / "x.data") as data:
        _graph(engines(name), data, PLAIN, torch.bfloat16).save(tmp_path / "x.onnx")
    graph = onnx.load(tmp_path / "x.onnx", load_external_data=False).graph
    weights = {
        item.name.removeprefix(f"{PLAIN}."): item.data_type
        for item in graph.initializer
        if item.data_location == TensorProto.EXTERNAL
    }
    assert weights == types
    inline = {item.data_type for item in graph.initializer if not item.external_data}
    assert inline <= {types["weight"], TensorProto.BFLOAT16}
    assert [node.op_type for node in graph.node] == operators


@given(
    st.integers(1, 9).flatmap(
        lambda rows: st.lists(st.integers(-8, 7), min_size=2 * rows, max_size=12 * rows).map(
            lambda codes: codes[: len(codes) // (2 * rows) * 2 * rows]
        )
    )
)
def test_nibbles_are_those_that_onnx_reads(codes: list[int]) -> None:
    packed = signed_nibbles(torch.tensor(codes, dtype=torch.int8).view(-1, 2))
    proto = TensorProto(data_type=TensorProto.INT4, dims=[len(codes)])
    proto.raw_data = packed.numpy().tobytes()
    assert numpy_helper.to_array(proto).astype(int).tolist() == codes


@pytest.mark.parametrize(
    ("format", "tops", "said"),
    [
        (Format("int4", 128, symmetric=False), {}, "--sym"),
        (Format("int4", 32), {}, "w4a16-g32, .+ groups of 64 or 128"),
        (Format("int8", 128), {}, "w8a16-g128, .+ int8 by whole rows"),
        (INT8, {}, "calibration"),
        (FP8, {"another": 1.0}, "calibration"),
        (INT8, {"linear": float("inf")}, "reached inf"),
    ],
)
def test_what_tensorrt_cannot_compute_is_refused(
    format: Format, tops: dict[str, float], said: str
) -> None:
    with pytest.raises(OptionError, match=said):
        refuse_formats({"linear": format}, tops)


def test_everything_else_is_taken() -> None:
    formats = {"a": INT4, "b": INT8_WEIGHT_ONLY, "c": INT8, "d": Format("int4", 64)}
    refuse_formats(formats, {"c": 0.0})


def test_a_scale_that_float16_rounds_to_zero_is_refused() -> None:
    refuse_formats({"linear": FP8}, {"linear": 1.3e-5}, torch.bfloat16)
    refuse_formats({"linear": FP8}, {"linear": 1.4e-5}, torch.float16)
    with pytest.raises(OptionError, match="reached 1.3e-05 .+ no scale in float16"):
        refuse_formats({"linear": FP8}, {"linear": 1.3e-5}, torch.float16)


def test_a_value_beyond_float16_is_refused(engines: Any, tmp_path: Path) -> None:
    engine = engines("bf16")

    class Large(FinishedEngine):
        def get(self, name: str) -> Tensor:
            return 1e6 * super().get(name)

    large = Large(engine.folder, engine.manifest)
    with DataFile(tmp_path / "x.data") as data:
        weights = EngineWeights(Graph("linear", 24), data, large, torch.float16)
        with pytest.raises(ExportError, match=r"float16 cannot; write .+ in bfloat16"):
            weights.tensor("model.norm.weight")
