"""Writes what TensorRT builds engines from: graphs, their weights, profiles and commands.

``write_tensorrt`` fills the folder of ``--trt-target onnx``; ``write_vision`` writes the vision
graph alone, for an engine whose decoder TensorRT-LLM builds. Both read a finished engine tensor by
tensor and refuse what TensorRT cannot compute before they write anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch

import mmr5_export.onnx.build_engines as build_engines
from mmr5_export.assemble import Progress
from mmr5_export.finished import FinishedEngine
from mmr5_export.onnx.build_script import build_json, build_sh
from mmr5_export.onnx.graph import DataFile, Graph
from mmr5_export.onnx.profiles import Limits, decoder_profiles, vision_profiles
from mmr5_export.onnx.rtx import compile_graphs, require_rtx
from mmr5_export.onnx.trt_decoder import DECODER_OPSET, decoder_graph
from mmr5_export.onnx.trt_linear import refuse_formats
from mmr5_export.onnx.trt_vision import VISION_OPSET, vision_graph
from mmr5_export.options import OptionError

# bfloat16 is what the command line writes and what the checkpoint was trained in: its residual
# stream has values that float16, of eight times the precision, cannot hold.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DTYPE = "bfloat16"


def check_tensorrt(engine: FinishedEngine, dtype: str, aot: str | None = None) -> None:
    """Raises :class:`OptionError` or :class:`ExportError` where :func:`write_tensorrt` does."""
    refuse_formats(engine.formats, engine.input_absmax, _kind(dtype))
    if aot is not None:
        if aot != "rtx":
            raise OptionError(f"--aot {aot} is unknown; give rtx or leave it out.")
        require_rtx()


def write_tensorrt(
    engine: FinishedEngine,
    folder: Path,
    *,
    dtype: str = DEFAULT_DTYPE,
    limits: Limits,
    aot: str | None = None,
    progress: Progress = lambda stage, done, total, note="": None,
) -> dict[str, Any]:
    """Writes the folder of ``--trt-target onnx``; returns what the manifest says of it.

    ``folder`` is made if it is missing. ``dtype``: of activations, "bfloat16" or "float16".
    ``aot`` "rtx" compiles as well. Raises as :func:`check_tensorrt` and :class:`ExportError` when
    the compiler does not take a graph.
    """
    check_tensorrt(engine, dtype, aot)
    folder.mkdir(parents=True, exist_ok=True)
    steps = 2 if aot is None else 3
    kind = _kind(dtype)
    _write(folder, "vision", lambda data: vision_graph(engine, data, kind))
    progress("write", 1, steps, "vision.onnx")
    _write(folder, "decoder", lambda data: decoder_graph(engine, data, kind, limits.capacity))
    progress("write", 2, steps, "decoder.onnx")
    profiles = {
        "vision": vision_profiles(engine.spec.vision, limits),
        "decoder": decoder_profiles(engine.spec.text, limits),
    }
    _write_json(
        folder / "profiles.json",
        {graph: [profile.to_json() for profile in given] for graph, given in profiles.items()},
    )
    _write_json(folder / "build.json", build_json(profiles))
    (folder / "build.sh").write_text(build_sh(profiles))
    (folder / "build.sh").chmod(0o755)
    (folder / "build.py").write_text(Path(build_engines.__file__).read_text())
    facts = _facts(dtype, {"vision": VISION_OPSET, "decoder": DECODER_OPSET})
    facts["capacity"] = limits.capacity
    facts["verified"] = "checked by onnx; not compiled, not executed"
    if aot is not None:
        facts["aot"] = compile_graphs(folder, profiles)
        progress("write", 3, steps, "TensorRT-RTX")
        version = facts["aot"]["tensorrt_rtx"]
        facts["verified"] = f"compiled by TensorRT-RTX {version}; not executed"
    return facts


def write_vision(
    engine: FinishedEngine,
    folder: Path,
    *,
    dtype: str = DEFAULT_DTYPE,
    limits: Limits,
) -> dict[str, Any]:
    """Writes ``model.onnx``, ``model.data`` and ``profile.json``; returns facts for the manifest.

    Raises as :func:`check_tensorrt`, for the tower's linears alone.
    """
    kind = _kind(dtype)
    formats = {name: f for name, f in engine.formats.items() if name.startswith("visual.")}
    refuse_formats(formats, engine.input_absmax, kind)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, "model", lambda data: vision_graph(engine, data, kind))
    profiles = vision_profiles(engine.spec.vision, limits)
    _write_json(folder / "profile.json", {"model": [profile.to_json() for profile in profiles]})
    return _facts(dtype, {"model": VISION_OPSET})


def _kind(dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise OptionError(f"dtype {dtype!r} is unknown; give one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def _write(folder: Path, name: str, make: Callable[[DataFile], Graph]) -> None:
    with DataFile(folder / f"{name}.data") as data:
        graph = make(data)
    path = folder / f"{name}.onnx"
    graph.save(path)
    onnx.checker.check_model(str(path))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _facts(dtype: str, opsets: dict[str, int]) -> dict[str, Any]:
    return {"dtype": dtype, "opsets": opsets, "onnx": onnx.__version__}
