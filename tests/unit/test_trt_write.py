"""The folder of ``--trt-target onnx``, and compilation by TensorRT-RTX where it is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from helpers.exporting import quick_export, tree_hashes
from mmr5_export.finished import FinishedEngine, open_finished
from mmr5_export.onnx import build_engines
from mmr5_export.onnx.build_engines import BuildError, build, load_bindings
from mmr5_export.onnx.graph import DataFile, Graph
from mmr5_export.onnx.profiles import Limits, decoder_profiles
from mmr5_export.onnx.trt import write_tensorrt, write_vision
from mmr5_export.onnx.trt_decoder import decoder_graph
from mmr5_export.onnx.trt_linear import EngineWeights
from mmr5_export.options import OptionError
from mmr5_kernels.layout import INT4
from mmr5_runtime.types import ExportError

MINI = Path(str(resources.files("mmr5_runtime") / "assets" / "mini"))
LIMITS = Limits(capacity=512, prefill_tokens=256, max_patches=1024)
FILES = {"build.json", "build.py", "build.sh", "profiles.json"} | {
    f"{graph}.{suffix}" for graph in ("decoder", "vision") for suffix in ("onnx", "data")
}
Engines = Callable[..., FinishedEngine]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    root = tmp_path_factory.mktemp("engines")

    @cache
    def make(quant: str, **options: Any) -> FinishedEngine:
        folder = root / "-".join([quant, *map(str, options.values())])
        quick_export(MINI, quant, folder, **options)
        formats = open_finished(folder).formats.items()
        tops = {name: 8.0 for name, format in formats if format.activations}
        return open_finished(folder, None, tops)

    return make


@pytest.fixture(scope="module")
def rtx() -> Any:
    """TensorRT-RTX's bindings; they build without a GPU."""
    try:
        return load_bindings("rtx")
    except ImportError as error:
        pytest.skip(f"TensorRT-RTX compiles nothing here: {error}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_folder_is_whole_and_the_same_again(
    dtype: str, engines: Engines, tmp_path: Path
) -> None:
    facts = [
        write_tensorrt(engines("int4"), tmp_path / name, dtype=dtype, limits=LIMITS)
        for name in "ab"
    ]
    assert facts[0] == facts[1]
    assert tree_hashes(tmp_path / "a") == tree_hashes(tmp_path / "b")
    assert set(tree_hashes(tmp_path / "a")) == FILES
    assert facts[0]["opsets"] == {"vision": 23, "decoder": 24} and facts[0]["dtype"] == dtype
    assert facts[0]["verified"].endswith("not compiled, not executed")
    profiles = json.loads((tmp_path / "a" / "profiles.json").read_text())
    for name, given in profiles.items():
        onnx.checker.check_model(str(tmp_path / "a" / f"{name}.onnx"), full_check=True)
        graph = onnx.load(tmp_path / "a" / f"{name}.onnx", load_external_data=False).graph
        free = [
            value.name
            for value in graph.input
            if any(size.dim_param for size in value.type.tensor_type.shape.dim)
        ]
        # Exactly what may change its shape has a range, in every profile.
        assert all(sorted(profile["shapes"]) == sorted(free) for profile in given)


def test_every_weight_is_written_once_and_in_its_size(engines: Engines, tmp_path: Path) -> None:
    write_tensorrt(engines("int4"), tmp_path, limits=LIMITS)
    for name in ("vision", "decoder"):
        graph = onnx.load(tmp_path / f"{name}.onnx", load_external_data=False).graph
        places = [
            {entry.key: entry.value for entry in item.external_data}
            for item in graph.initializer
            if item.external_data
        ]
        spans = sorted((int(place["offset"]), int(place["length"])) for place in places)
        ends = [offset + length for offset, length in spans]
        assert all(end <= start for end, (start, _) in zip(ends, spans[1:], strict=False))
        assert ends[-1] == (tmp_path / f"{name}.data").stat().st_size
        assert sum(length for _, length in spans) + 64 * len(spans) > ends[-1]


def test_vision_alone(engines: Engines, tmp_path: Path) -> None:
    """The decoder's formats do not matter to it: these would be refused without calibration."""
    engine = open_finished(engines("int8").folder)
    facts = write_vision(engine, tmp_path, limits=LIMITS)
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.onnx",
        "model.data",
        "profile.json",
    }
    assert facts["opsets"] == {"model": 23}
    assert list(json.loads((tmp_path / "profile.json").read_text())) == ["model"]


def test_refusals_come_before_any_file(engines: Engines, tmp_path: Path) -> None:
    uncalibrated = open_finished(engines("int8").folder)
    output = tmp_path / "out"
    with pytest.raises(OptionError, match="calibration"):
        write_tensorrt(uncalibrated, output, limits=LIMITS)
    with pytest.raises(OptionError, match="dtype 'float8'"):
        write_tensorrt(engines("int4"), output, dtype="float8", limits=LIMITS)
    with pytest.raises(OptionError, match="--sym"):
        write_tensorrt(engines("int4", symmetric=False), output, limits=LIMITS)
    vision = open_finished(engines("bf16", quantize_vision="int8").folder)
    with pytest.raises(OptionError, match="visual.+calibration"):
        write_vision(vision, output, limits=LIMITS)
    assert not output.exists()


def test_without_tensorrt_rtx_the_packages_are_named(
    engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ExportError, match="tensorrt-rtx-cu13-libs and tensorrt-rtx-cu13-bindings"):
        write_tensorrt(engines("bf16"), tmp_path / "out", limits=LIMITS, aot="rtx")
    assert not (tmp_path / "out").exists()


def test_build_py_needs_nothing_of_ours(engines: Engines, tmp_path: Path) -> None:
    """It runs in a bare Python, and says what is missing."""
    write_tensorrt(engines("bf16"), tmp_path, limits=LIMITS)
    text = (tmp_path / "build.py").read_text()
    assert text == Path(build_engines.__file__).read_text() and "import mmr5" not in text
    command = [sys.executable, "-I", "-S", str(tmp_path / "build.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "none of tensorrt is installed" in done.stderr


def test_an_interrupted_build_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is built cannot be written here, as on a full disk."""
    output = tmp_path / "decoder.plan"
    output.write_bytes(b"an engine")
    monkeypatch.setattr(build_engines, "build", lambda trt, graph, profiles: "no bytes")
    with pytest.raises(TypeError):
        build_engines.build_file(None, tmp_path / "decoder.onnx", [], output)
    assert output.read_bytes() == b"an engine"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tensorrt_rtx_compiles_mini(dtype: str, rtx: Any, engines: Engines, tmp_path: Path) -> None:
    facts = write_tensorrt(engines("int4"), tmp_path, dtype=dtype, limits=LIMITS, aot="rtx")
    assert set(tree_hashes(tmp_path)) == FILES | {"vision.rtx", "decoder.rtx"}
    for name, built in facts["aot"]["graphs"].items():
        assert built["bytes"] == (tmp_path / f"{name}.rtx").stat().st_size
        assert built["bytes"] > (tmp_path / f"{name}.data").stat().st_size  # the weights are in it
    assert facts["verified"] == f"compiled by TensorRT-RTX {rtx.__version__}; not executed"


@pytest.mark.parametrize("quant", ["bf16", "int8", "int8-weight-only", "fp8"])
def test_tensorrt_rtx_compiles_decoders_of_other_formats(
    quant: str, rtx: Any, engines: Engines, tmp_path: Path
) -> None:
    with DataFile(tmp_path / "decoder.data") as data:
        graph = decoder_graph(engines(quant), data, torch.bfloat16, LIMITS.capacity)
    graph.save(tmp_path / "decoder.onnx")
    profiles = decoder_profiles(engines(quant).spec.text, LIMITS)
    built = build(rtx, tmp_path / "decoder.onnx", [profile.to_json() for profile in profiles])
    assert built.nbytes > (tmp_path / "decoder.data").stat().st_size


def test_four_bits_stay_four_bits(rtx: Any, engines: Engines, tmp_path: Path) -> None:
    """The builder could unpack constants; an engine of one wide linear shows that it does not."""
    rows, columns = 2048, 4096

    class Wide(FinishedEngine):
        def get(self, name: str) -> Tensor:
            shape, dtype = INT4.tensors(rows, columns)[name.rpartition(".")[2]]
            drawn = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(1))
            return drawn.to(dtype) if name.endswith("weight_packed") else drawn.to(dtype) / 1000

    name = "model.layers.0.mlp.down_proj"
    wide = Wide(engines("int4").folder, engines("int4").manifest)
    graph = Graph("linear", 24)
    x = graph.input("x", torch.bfloat16, ["M", columns])
    with DataFile(tmp_path / "linear.data") as data:
        y = EngineWeights(graph, data, wide, torch.bfloat16).linear(name, x)
    graph.output("y", y, torch.bfloat16, ["M", rows])
    graph.save(tmp_path / "linear.onnx")
    shapes = {"x": {"min": [1, columns], "opt": [1, columns], "max": [64, columns]}}
    built = build(rtx, tmp_path / "linear.onnx", [{"name": "all", "shapes": shapes}])
    packed = rows * columns // 2
    assert packed < built.nbytes < 1.5 * packed


def test_a_node_that_is_not_taken_is_named(rtx: Any, tmp_path: Path) -> None:
    graph = Graph("wrong", 24)
    x = graph.input("x", torch.bfloat16, [1, 2, "T", 32])
    y = graph.node("Attention", x, x, x, softmax_precision=1)
    graph.output("y", y, torch.bfloat16, [1, 2, "T", 32])
    graph.save(tmp_path / "wrong.onnx")
    with pytest.raises(BuildError, match=r"wrong\.onnx: node Attention_0 \(Attention\): .+"):
        build(rtx, tmp_path / "wrong.onnx", [])


def test_a_profile_that_is_not_taken_is_named(rtx: Any, tmp_path: Path) -> None:
    """The builder only says -1, and would go on without it."""
    graph = Graph("twice", 24)
    x = graph.input("x", torch.float32, ["M"])
    graph.output("y", graph.node("Add", x, x), torch.float32, ["M"])
    graph.save(tmp_path / "twice.onnx")
    profile = {"name": "step", "shapes": {"x": {"min": [8], "opt": [4], "max": [2]}}}
    with pytest.raises(BuildError, match=r"twice\.onnx does not take profile step: .+MIN<=OPT"):
        build(rtx, tmp_path / "twice.onnx", [profile])
