"""The three targets of ``--backend tensorrt-llm``: for each what it refuses, takes and writes.

=========== ==================== ==================================================================
target      folder               what is in it
=========== ==================== ==================================================================
``engine``  tensorrt-llm/engine  a checkpoint for ``trtllm-build``, the vision tower as ONNX, and
                                 the commands that make engines of both
``llm-api`` tensorrt-llm/llm-api a ModelOpt checkpoint and the arguments of the LLM API
``onnx``    tensorrt             decoder and vision tower as ONNX for TensorRT alone
=========== ==================== ==================================================================

Each folder has a ``bundle.json``; see :mod:`mmr5_export.trtllm.bundle`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmr5_export.assemble import Progress
from mmr5_export.finished import FinishedEngine
from mmr5_export.options import ExportOptions
from mmr5_export.trtllm import refusals
from mmr5_export.wish import GRAPHS_BYTES, Part, Planned, Wish
from mmr5_runtime.artifact import tool_versions

if TYPE_CHECKING:  # imports onnx, which is asked for by name where it is needed
    from mmr5_export.onnx.profiles import Limits as OnnxLimits

ENGINE_FOLDER, API_FOLDER = Path("tensorrt-llm/engine"), Path("tensorrt-llm/llm-api")
ONNX_FOLDER = Path("tensorrt")
DTYPE = "bfloat16"  # of what stays in 16 bits; float16 does not hold all activations of this model
POINTER = (
    "target engine is for TensorRT-LLM 1.2.1, the last stable release that builds engines; what "
    "NVIDIA supports today is --trt-target llm-api"
)
API_VERIFIED = (
    "names, dtypes and shapes of tensors and keys of configs compared with ModelOpt 0.47.0, tensor "
    "bytes equal to its own for its codes and scales; not executed"
)

_AOT_MEMORY = 4  # bytes per byte of weights: 14.3 GB were measured for 4.46 GB, 28 layers of a 7B


def _check_engine(wish: Wish) -> None:
    from mmr5_export.onnx.trt_linear import refuse_formats
    from mmr5_export.trtllm.modelopt_formats import require_supported

    refusals.engine_version(wish.options)
    require_supported(
        wish.spec, wish.formats, calibrated=wish.ranges, original=wish.original, dtype=DTYPE
    )
    tower = {name: kind for name, kind in wish.formats.items() if name.startswith("visual.")}
    refuse_formats(tower, wish.input_absmax)
    assert wish.limits.max_multimodal_len


def _plan_engine(wish: Wish) -> Planned:
    memory = {"writing the TensorRT-LLM checkpoint": 4 * wish.largest_bytes}
    return Planned((f"{ENGINE_FOLDER.as_posix()}/",), _around(wish.dense_bytes), memory)


def _write_engine(
    engine: FinishedEngine, options: ExportOptions, progress: Progress
) -> dict[str, Any]:
    from mmr5_export.onnx.trt import write_vision
    from mmr5_export.trtllm.bundle import (
        decoder_step,
        run_steps,
        vision_step,
        write_build,
        write_bundle,
    )
    from mmr5_export.trtllm.engine_checkpoint import write_engine_checkpoint

    folder, limits = engine.folder / ENGINE_FOLDER, _limits(engine, options)
    version = refusals.engine_version(options)
    progress("engine", 0, 2)
    (folder / "ckpt").mkdir(parents=True)
    facts = write_engine_checkpoint(engine, folder / "ckpt", dtype=DTYPE)
    progress("engine", 1, 2)
    vision = write_vision(
        engine, folder / "vision", dtype=DTYPE, limits=_onnx_limits(engine, limits)
    )
    profile = json.loads((folder / "vision" / "profile.json").read_text(encoding="utf-8"))
    shapes = profile["model"][0]["shapes"]
    steps = (decoder_step(version, limits, DTYPE), vision_step(shapes))
    write_build(folder, version, steps)
    verified = f"checkpoint: {facts.pop('verified')}; vision ONNX: checked by onnx, not executed"
    write_bundle(folder, "engine", tool_versions(), verified, steps)
    built = run_steps(folder, version, steps)
    if built:
        verified += f"; engines built by TensorRT-LLM {version.name}, not executed"
    progress("engine", 2, 2)
    return {
        "folder": ENGINE_FOLDER.as_posix(),
        "verified": verified,
        "tensorrt_llm": version.name,
        "built": built,
        **facts,
        "vision": vision,
    }


def _check_api(wish: Wish) -> None:
    refusals.api_versions(wish.options)
    refusals.refuse_for_api(wish.spec, wish.formats)
    refusals.refuse_lost(wish.formats, wish.original, "llm-api")
    assert wish.limits.max_input_len


def _plan_api(wish: Wish) -> Planned:
    memory = {"writing the ModelOpt checkpoint": 4 * wish.largest_bytes}
    return Planned((f"{API_FOLDER.as_posix()}/",), _around(wish.dense_bytes), memory)


def _write_api(
    engine: FinishedEngine, options: ExportOptions, progress: Progress
) -> dict[str, Any]:
    from mmr5_export.trtllm import llm_args
    from mmr5_export.trtllm.bundle import serve_step, write_bundle, write_json
    from mmr5_export.trtllm.unified import quant_config, write_unified

    folder, limits = engine.folder / API_FOLDER, _limits(engine, options)
    versions = refusals.api_versions(options)
    progress("llm-api", 0, 1)
    write_unified(engine, folder)
    for version in versions:
        text = llm_args.to_yaml(
            llm_args.llm_args(version, limits), f"LLM arguments of TensorRT-LLM {version.name}"
        )
        (folder / llm_args.file_name(version)).write_text(text, encoding="utf-8")
    write_json(folder / llm_args.SAMPLING_NAME, llm_args.sampling_params(limits, _stops(engine)))
    steps = [serve_step(version) for version in versions]
    write_bundle(folder, "llm-api", tool_versions(), API_VERIFIED, steps)
    progress("llm-api", 1, 1)
    format = refusals.refuse_for_api(engine.spec, engine.formats)
    return {
        "folder": API_FOLDER.as_posix(),
        "verified": API_VERIFIED,
        "tensorrt_llm": [version.name for version in versions],
        "quant_algo": quant_config(format)["quantization"]["quant_algo"],
    }


def _stops(engine: FinishedEngine) -> tuple[str, ...]:
    """Texts to stop at, in the vocabulary of the engine."""
    from mmr5_runtime.prompt import PromptTokenizer
    from mmr5_runtime.stopping.vocabulary import token_bytes
    from mmr5_runtime.trtllm.stops import StopWords

    tokenizer = PromptTokenizer.from_file(engine.folder / "tokenizer.json")
    vocabulary = token_bytes(tokenizer.tokenizer, engine.spec.text.vocab_size)
    return StopWords.of(tokenizer.text_ids, vocabulary).texts


def _check_onnx(wish: Wish) -> None:
    from mmr5_export.onnx.rtx import require_rtx
    from mmr5_export.onnx.trt_linear import refuse_formats

    refuse_formats(wish.formats, wish.input_absmax)
    assert wish.limits.max_input_len
    if wish.options.aot == "rtx":
        require_rtx()


def _plan_onnx(wish: Wish) -> Planned:
    memory = {"writing ONNX for TensorRT": 4 * wish.largest_bytes}
    total = _around(wish.dense_bytes)
    if wish.options.aot is not None:
        memory["compiling with TensorRT-RTX"] = _AOT_MEMORY * wish.decoder_bytes
        total *= 2
    return Planned((f"{ONNX_FOLDER.as_posix()}/",), total, memory)


def _write_onnx(
    engine: FinishedEngine, options: ExportOptions, progress: Progress
) -> dict[str, Any]:
    from mmr5_export.onnx.trt import write_tensorrt
    from mmr5_export.trtllm.bundle import Step, write_bundle

    folder = engine.folder / ONNX_FOLDER

    def told(stage: str, done: int, total: int, note: str = "") -> None:
        progress("onnx", done, total, note)

    facts = write_tensorrt(
        engine,
        folder,
        dtype=DTYPE,
        limits=_onnx_limits(engine, _limits(engine, options)),
        aot=options.aot,
        progress=told,
    )
    if options.aot is not None:  # and not how long it took: equal input gives equal manifests
        facts["aot"] = {"tensorrt_rtx": facts["aot"]["tensorrt_rtx"]}
    build = json.loads((folder / "build.json").read_text(encoding="utf-8"))
    steps = [Step(f"{name}.plan", tuple(words)) for name, words in build["trtexec"].items()]
    write_bundle(folder, "onnx", tool_versions(), facts["verified"], steps)
    return {"folder": ONNX_FOLDER.as_posix(), **facts}


def _limits(engine: FinishedEngine, options: ExportOptions) -> refusals.Limits:
    return refusals.resolve_limits(engine.spec, engine.manifest.pixel_budget, options)


def _onnx_limits(engine: FinishedEngine, limits: refusals.Limits) -> OnnxLimits:
    from mmr5_export.onnx.profiles import Limits

    return Limits.of(engine.manifest, limits.max_seq_len, limits.max_input_len)


def _around(size: int) -> int:
    """With what lies beside weights: scales in fp32 instead of bf16, graphs, tokenizer, configs."""
    return size + size // 20 + GRAPHS_BYTES


TENSORRT_PARTS = (
    Part("engine", _check_engine, _plan_engine, _write_engine),
    Part("llm-api", _check_api, _plan_api, _write_api),
    Part("onnx", _check_onnx, _plan_onnx, _write_onnx),
)
