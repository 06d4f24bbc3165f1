"""An engine folder's TensorRT-LLM bundle to an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmr5_runtime.artifact import Manifest, file_sha256
from mmr5_runtime.compute import Compute
from mmr5_runtime.engine import Engine
from mmr5_runtime.prompt import PromptTokenizer
from mmr5_runtime.stopping.vocabulary import token_bytes
from mmr5_runtime.trtllm.bundle import DESCRIPTION, check_bundle, find_bundle
from mmr5_runtime.trtllm.model import BundleModel
from mmr5_runtime.trtllm.options import check_load
from mmr5_runtime.trtllm.runner import open_runner
from mmr5_runtime.trtllm.stops import StopWords

__all__ = ["BACKEND", "bundle_model", "check_load", "context", "identity", "open_bundle"]

BACKEND = "tensorrt-llm"
_EMBEDDINGS = torch.float16  # what the exported vision graph gives


def open_bundle(
    folder: Path,
    manifest: Manifest,
    tokenizer: PromptTokenizer,
    device: torch.device,
    check_hashes: bool,
) -> Engine:
    """The engine of a folder with a bundle for TensorRT-LLM.

    Raises :class:`EngineError` when the folder has none or two, a file of it is missing or altered
    (sizes are always compared, hashes with ``check_hashes``), TensorRT-LLM is not installed or of
    another version, and when engines were not built or do not load.
    """
    bundle = find_bundle(folder)
    check_bundle(bundle, check_hashes)
    spec = manifest.spec
    runner = open_runner(bundle, spec, device)
    vocabulary = token_bytes(tokenizer.tokenizer, spec.text.vocab_size)
    stops = StopWords.of(tokenizer.text_ids, vocabulary)
    # The LLM API computes in processes of its own; nothing of ours is on its device.
    where = torch.device("cpu") if runner.encodes_pages else device
    model = BundleModel(spec, runner, stops, where, _EMBEDDINGS)
    return Engine(model, where, Compute.plain(where, _EMBEDDINGS))


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
    described = file_sha256(bundle.folder / DESCRIPTION)
    return {"backend": BACKEND, "target": bundle.target, "bundle": described}
