"""The three targets of ``--backend tensorrt-llm``: for each what it refuses, takes and writes.

=========== ==================== ==================================================================
target      folder               what is in it
=========== ==================== ==================================================================
``engine``  tensorrt-llm/engine  a checkpoint for ``trtllm-build``, the vision tower as ONNX, and
                                 the commands that make engines of both
``llm-api`` tensorrt-llm/llm-api a ModelOpt checkpoint and the arguments of the LLM API
``onnx``    tensorrt             decoder and vision tower as ONNX for TensorRT alone
=========== ==================== ==================================================================

Each folder has a ``bundle.json``; see :mod:`mmr5_export.trtllm.bundle`. Where TensorRT-LLM is
installed, target ``engine`` is built as well. Built engines are nobody's files: no manifest and no
bundle lists them, because ``build.sh`` makes them again, and not the same bytes.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmr5_export.assemble import Progress
from mmr5_export.finished import FinishedEngine
from mmr5_export.options import ExportOptions, OptionError
from mmr5_export.trtllm import bundle, refusals
from mmr5_export.wish import GRAPHS_BYTES, Part, Planned, Wish
from mmr5_runtime.artifact import tool_versions

if TYPE_CHECKING:  # imports onnx, which is asked for by name where it is needed
    from mmr5_export.onnx.profiles import Limits as OnnxLimits

ENGINE_FOLDER, API_FOLDER = Path("tensorrt-llm/engine"), Path("tensorrt-llm/llm-api")
ONNX_FOLDER = Path("tensorrt")
EMBEDDINGS = "model.embed_tokens.weight"  # which no graph of TensorRT holds
DTYPE = "bfloat16"  # of what stays in 16 bits; float16 does not hold all activations of this model
POINTER = (
    "target engine is for TensorRT-LLM 1.2.1, the last stable release that builds engines; what "
    "NVIDIA supports today is --trt-target llm-api"
)
_BUILT = tuple((ENGINE_FOLDER / name).as_posix() for name in bundle.ENGINES)

# Bytes per byte of weights. 14.9 GB were measured for 4.46 GB, the 28 layers of a 7B with random
# weights, no two of which are alike (benchmarks/results/export-7b-backends.json).
_AOT_MEMORY = 4


def is_built(name: str) -> bool:
    """Whether a file of an engine folder, by its path in it, is what a build has made."""
    return any(name == built or name.startswith(f"{built}/") for built in _BUILT)


def require_onnx(option: str) -> None:
    """Raises :class:`OptionError` where onnx is missing, which ``option`` writes graphs with."""
    if importlib.util.find_spec("onnx") is None:
        raise OptionError(
            f"{option} writes graphs with the package onnx, which is not installed; install "
            "mmr5-runtime[export], or leave the option out."
        )


def _check_engine(wish: Wish) -> None:
    require_onnx("--trt-target engine")
    from mmr5_export.onnx.trt_linear import refuse_formats
    from mmr5_export.trtllm.modelopt_formats import require_supported

    version = refusals.engine_version(wish.options)
    bundle.check_builder(version)
    require_supported(
        wish.spec, wish.formats, calibrated=wish.ranges, original=wish.original, dtype=DTYPE
    )
    tower = {name: kind for name, kind in wish.formats.items() if name.startswith("visual.")}
    refuse_formats(tower, wish.input_absmax)
    assert wish.limits.max_multimodal_len


def _plan_engine(wish: Wish) -> Planned:
    memory = {"writing the TensorRT-LLM checkpoint": 4 * wish.largest_bytes}
    files = _around(wish.dense_bytes)
    if bundle.builder_installed():
        files += wish.dense_bytes  # the engines
    return Planned((f"{ENGINE_FOLDER.as_posix()}/",), files, memory)


def _write_engine(
    engine: FinishedEngine, options: ExportOptions, progress: Progress
) -> dict[str, Any]:
    from mmr5_export.onnx.trt import write_vision
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
    steps = (bundle.decoder_step(version, limits, DTYPE), bundle.vision_step(shapes))
    bundle.write_build(folder, version, steps)
    verified = f"checkpoint: {facts.pop('verified')}; vision ONNX: checked by onnx, not executed"
    lines = bundle.build_lines(steps)
    bundle.write_bundle(folder, "engine", tool_versions(), verified, lines)
    unbuilt: str | None = "TensorRT-LLM is not installed where this was exported"
    if bundle.builder_installed():
        unbuilt = bundle.run_steps(folder, steps)
    if unbuilt is None:
        verified += f"; engines built by TensorRT-LLM {version.name}, not executed"
    progress("engine", 2, 2)
    return {
        "folder": ENGINE_FOLDER.as_posix(),
        "verified": verified,
        "tensorrt_llm": version.name,
        "built": unbuilt is None,
        "unbuilt": unbuilt,
        **facts,
        "vision": vision,
    }


def _check_api(wish: Wish) -> None:
    from mmr5_export.trtllm.modelopt_formats import refuse_for_api

    refusals.api_versions(wish.options)
    refuse_for_api(wish.spec, wish.formats)
    refusals.refuse_lost(wish.formats, wish.original, "llm-api")
    assert wish.limits.max_input_len


def _plan_api(wish: Wish) -> Planned:
    memory = {"writing the ModelOpt checkpoint": 4 * wish.largest_bytes}
    return Planned((f"{API_FOLDER.as_posix()}/",), _around(wish.dense_bytes), memory)


def _write_api(
    engine: FinishedEngine, options: ExportOptions, progress: Progress
) -> dict[str, Any]:
    from mmr5_export.trtllm import llm_args
    from mmr5_export.trtllm.compared import compared
    from mmr5_export.trtllm.unified import write_unified

    folder, limits = engine.folder / API_FOLDER, _limits(engine, options)
    versions = refusals.api_versions(options)
    progress("llm-api", 0, 1)
    algorithm = write_unified(engine, folder)
    for version in versions:
        text = llm_args.to_yaml(
            llm_args.llm_args(limits), f"LLM arguments of TensorRT-LLM {version.name}"
        )
        (folder / llm_args.file_name(version)).write_text(text, encoding="utf-8")
    params = llm_args.sampling_params(limits, _stops(engine), engine.spec.eos_token_ids)
    bundle.write_json(folder / llm_args.SAMPLING_NAME, params)
    verified = compared(algorithm, "Qwen2.5-VL")
    lines = {"serve": {each.name: list(bundle.serve_step(each).argv) for each in versions}}
    bundle.write_bundle(folder, "llm-api", tool_versions(), verified, lines)
    progress("llm-api", 1, 1)
    return {
        "folder": API_FOLDER.as_posix(),
        "verified": verified,
        "tensorrt_llm": [version.name for version in versions],
        "quant_algo": algorithm,
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
    require_onnx("--trt-target onnx")
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
    lines = {"build": list(build["trtexec"].values()), "embeddings": _embeddings(engine)}
    bundle.write_bundle(folder, "onnx", tool_versions(), facts["verified"], lines)
    return {"folder": ONNX_FOLDER.as_posix(), **facts}


def _embeddings(engine: FinishedEngine) -> dict[str, str]:
    """Where the table lies that turns token ids into the decoder's ``embeds``."""
    return {"tensor": EMBEDDINGS, "file": f"../{engine.manifest.tensors[EMBEDDINGS]}"}


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
