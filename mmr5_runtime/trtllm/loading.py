"""An engine folder's TensorRT-LLM bundle to an engine."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmr5_runtime.artifact import Manifest, file_sha256
from mmr5_runtime.compute import Compute
from mmr5_runtime.engine import Engine
from mmr5_runtime.prompt import PromptTokenizer
from mmr5_runtime.stopping.vocabulary import token_bytes
from mmr5_runtime.trtllm.bundle import DESCRIPTION, check_bundle, find_bundle, read_json
from mmr5_runtime.trtllm.model import BundleModel
from mmr5_runtime.trtllm.options import check_load
from mmr5_runtime.trtllm.prompt import Runner
from mmr5_runtime.trtllm.runner import installed_versions, open_runner
from mmr5_runtime.trtllm.stops import StopWords

__all__ = ["BACKEND", "bundle_model", "check_load", "context", "identity", "open_bundle"]

BACKEND = "tensorrt-llm"
_GENERATION = "generation_config.json"


def open_bundle(
    folder: Path,
    manifest: Manifest,
    tokenizer: PromptTokenizer,
    device: torch.device,
    check_hashes: bool,
) -> Engine:
    """The engine of a folder with a bundle for TensorRT-LLM.

    Raises :class:`EngineError` when the folder has none, a file of it is missing or altered
    (sizes are always compared, hashes with ``check_hashes``), TensorRT-LLM is not installed or of
    another version, and when engines were not built or do not load. Warns where that version
    ignores a setting of the checkpoint.
    """
    bundle = find_bundle(folder)
    check_bundle(bundle, check_hashes)
    spec = manifest.spec
    runner = open_runner(bundle, spec, device, tokenizer)
    _warn_of_penalty(folder, runner)
    vocabulary = token_bytes(tokenizer.tokenizer, spec.text.vocab_size)
    stops = StopWords.of(tokenizer.text_ids, vocabulary)
    # The LLM API computes in processes of its own; nothing of ours is on its device.
    where = torch.device("cpu") if runner.encodes_pages else device
    model = BundleModel(spec, runner, stops, where)
    return Engine(model, where, Compute.plain(where, runner.dtype))


def bundle_model(engine: Engine) -> BundleModel | None:
    """The model of an engine that :func:`open_bundle` made; None of any other."""
    return engine.model if isinstance(engine.model, BundleModel) else None


def context(manifest: Manifest, engine: Engine) -> int:
    """Tokens of prompt and reply together: what the model has positions and the engine room for."""
    model, most = bundle_model(engine), manifest.spec.text.max_position_embeddings
    return most if model is None else min(most, model.runner.limits.sequence)


def identity(folder: Path) -> Mapping[str, Any]:
    """What of this backend may change a bit of a result, for the engine's identity."""
    bundle = find_bundle(folder)
    return {
        "backend": BACKEND,
        "target": bundle.target,
        "bundle": file_sha256(bundle.folder / DESCRIPTION),
        "built": bundle.stamps(),  # nothing lists these: a build on the same machine may differ
        "packages": installed_versions(bundle),
    }


def _warn_of_penalty(folder: Path, runner: Runner) -> None:
    """Says so where answers come without the repetition penalty of the checkpoint."""
    if "repetition_penalty" not in runner.ignores or not (folder / _GENERATION).is_file():
        return
    penalty = read_json(folder / _GENERATION, "export the engine again").get("repetition_penalty")
    if penalty is not None and penalty != 1.0:
        warnings.warn(
            f"the LLM API of this TensorRT-LLM ignores repetition_penalty={penalty}, with which "
            "the checkpoint answers elsewhere; install TensorRT-LLM 1.4 for it.",
            RuntimeWarning,
            stacklevel=4,
        )
