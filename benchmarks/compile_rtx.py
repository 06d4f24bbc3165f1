"""Does TensorRT-RTX take our graphs? Compiles them at the width of the 7B, without a GPU.

    PYTHONPATH=.:kernels:export:benchmarks python benchmarks/compile_rtx.py \\
        --out benchmarks/results/tensorrt-rtx-aot.json

Random engines of two decoder layers, one windowed and one full vision block, embeddings and head
are written, exported and compiled, one format after the other, each in a process of its own whose
peak memory is recorded. ``--run`` then loads each file and runs every profile once at its usual
shapes, or records the exact words of the refusal: TensorRT-RTX is made for GeForce and RTX GPUs.
How much device memory an engine works in is told by a loaded one alone, so only with ``--run``.
Needs ``tensorrt-rtx-cu13-libs`` and ``tensorrt-rtx-cu13-bindings``. (The file is not called
tensorrt_rtx.py, since Python would import that in place of the bindings.)
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from torch import Tensor

from mmr5_bench.evidence.memory import peak_resident_bytes
from mmr5_bench.files import read_json, write_json
from mmr5_bench.provenance import provenance
from mmr5_bench.random_weights.engine_folder import write_engine_of
from mmr5_bench.random_weights.shapes import QUANTS, Quant, config_7b
from mmr5_export.finished import open_finished
from mmr5_export.onnx.build_engines import error_logger
from mmr5_export.onnx.profiles import Limits, decoder_profiles, vision_profiles
from mmr5_export.onnx.rtx import compile_graphs, require_rtx
from mmr5_export.onnx.trt import DTYPES, write_tensorrt

FORMATS = ("bf16", "int4", "int8", "int8-weight-only", "fp8")
INPUT_ABSMAX = 16.0  # of W8A8 linears; random weights have no calibration
_TORCH = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
}


def write_engine(folder: Path, quant: Quant, layers: int, blocks: int) -> None:
    """A random engine of the 7B's width."""
    write_engine_of(folder, config_7b(layers, blocks), "random 7b", quant)


def compile_engine(engine_folder: Path, output: Path, dtype: str) -> dict[str, Any]:
    """Exports and compiles one engine; what was written and what it took, in this process."""
    engine = open_finished(engine_folder)
    tops = {name: INPUT_ABSMAX for name, format in engine.formats.items() if format.activations}
    engine = replace(engine, input_absmax=tops)
    limits = Limits.of(engine.manifest)
    started = time.perf_counter()
    written = write_tensorrt(engine, output, dtype=dtype, limits=limits)
    seconds, resident = time.perf_counter() - started, peak_resident_bytes()
    profiles = {
        "vision": vision_profiles(engine.spec.vision, limits),
        "decoder": decoder_profiles(engine.spec.text, limits),
    }
    compiled = compile_graphs(output, profiles)
    return {
        "quant": engine.manifest.quant.name,
        "dtype": dtype,
        "opsets": written["opsets"],
        "capacity": limits.capacity,
        "max_patches": limits.max_patches,
        "export": {
            "seconds": round(seconds, 2),
            "bytes": {path.name: path.stat().st_size for path in sorted(output.glob("*.data"))},
            "peak_resident_bytes": resident,
        },
        "compile": compiled["graphs"],
        "peak_resident_bytes": peak_resident_bytes(),
    }


def run_engines(output: Path) -> dict[str, Any]:
    """Loads and runs every ``.rtx`` file of a folder once per profile; what happened, by graph."""
    profiles = read_json(output / "profiles.json", "compile first")
    return {graph: _run_engine(output / f"{graph}.rtx", given) for graph, given in profiles.items()}


def _run_engine(path: Path, profiles: list[Mapping[str, Any]]) -> dict[str, Any]:
    trt = require_rtx()
    logger = error_logger(trt)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        return {"ran": False, "refusal": logger.errors}
    seconds = {}
    for index, profile in enumerate(profiles):
        context = engine.create_execution_context()
        if context is None:
            return {"ran": False, "refusal": logger.errors}
        try:
            seconds[profile["name"]] = _run_profile(trt, engine, context, index, profile)
        except RuntimeError as error:
            return {"ran": False, "refusal": [str(error), *logger.errors]}
    # Not a latency: nothing is warm.
    memory = int(engine.device_memory_size_v2)
    return {"ran": True, "first_call_seconds": seconds, "working_bytes": memory}


def _run_profile(
    trt: Any, engine: Any, context: Any, index: int, profile: Mapping[str, Any]
) -> float:
    """One call at the usual shapes; RuntimeError when it is refused or gives values not finite."""
    stream = torch.cuda.Stream()
    context.set_optimization_profile_async(index, stream.cuda_stream)
    tensors: dict[str, Tensor] = {}
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
    for name in inputs:
        shape = profile["shapes"].get(name, {}).get("opt") or engine.get_tensor_shape(name)
        context.set_input_shape(name, tuple(shape))
        tensors[name] = _values(name, tuple(shape), _dtype(engine, name))
    for name in sorted(set(names) - set(inputs)):
        # Keys and values are written where they are read.
        past = name.replace("present_", "past_")
        shape = tuple(context.get_tensor_shape(name))
        made = torch.empty(shape, dtype=_dtype(engine, name), device="cuda")
        tensors[name] = tensors[past] if past in inputs else made
    for name, tensor in tensors.items():
        context.set_tensor_address(name, tensor.data_ptr())
    torch.cuda.synchronize()
    started = time.perf_counter()
    done = context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()
    seconds = time.perf_counter() - started
    result = tensors["logits" if "logits" in tensors else "embeddings"]
    if not done:
        raise RuntimeError(f"{profile['name']} was not executed")
    if not bool(result.isfinite().all()):
        raise RuntimeError(f"{profile['name']} gave values that are not finite")
    return round(seconds, 4)


def _values(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Indices that are in range, buffers of zeros, everything else drawn."""
    if name.startswith("past_") or name in ("rows", "windows"):
        return torch.zeros(shape, dtype=dtype, device="cuda")
    if name == "window_mask":
        return torch.ones(shape, dtype=dtype, device="cuda")
    if name in ("places", "keys"):
        return torch.arange(shape[0], dtype=dtype, device="cuda")
    return torch.randn(shape, device="cuda").to(dtype)


def _dtype(engine: Any, name: str) -> torch.dtype:
    return _TORCH[engine.get_tensor_dtype(name).name]


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Compile 7B-wide graphs with TensorRT-RTX.")
    parser.add_argument("--out", type=Path, required=True, help="JSON that is written")
    parser.add_argument("--formats", nargs="+", choices=QUANTS, default=list(FORMATS))
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--layers", type=int, default=2, help="of the decoder")
    parser.add_argument("--blocks", type=int, default=2, help="of the vision tower")
    parser.add_argument("--run", action="store_true", help="load and run what was compiled")
    options = parser.parse_args()
    trt = require_rtx()
    threads = int(trt.Builder(error_logger(trt)).max_threads)
    results = []
    for quant in options.formats:
        with tempfile.TemporaryDirectory() as work:
            engine, output = Path(work) / "engine", Path(work) / "tensorrt"
            shape = (options.layers, options.blocks)
            _alone(write_engine, engine, cast(Quant, quant), *shape)
            facts = _alone(compile_engine, engine, output, options.dtype)
            if options.run:
                facts["run"] = _alone(run_engines, output)
        results.append(facts)
        sys.stderr.write(f"{quant}: {facts}\n")
    document = {
        "kind": "tensorrt-rtx-aot",
        "provenance": provenance()
        | {"onnx": onnx.__version__, "tensorrt_rtx": str(trt.__version__)}
        | {"builder_threads": threads, "torch_threads": torch.get_num_threads()}
        | {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"},
        "layers": options.layers,
        "blocks": options.blocks,
        "results": results,
    }
    write_json(document, options.out)
    return 0


def _alone(function: Any, *arguments: Any) -> Any:
    """The call in a fresh process, whose memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


if __name__ == "__main__":
    raise SystemExit(main())
