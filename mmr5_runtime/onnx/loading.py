"""An engine folder's graphs to an engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmr5_kernels.layout import Format
from mmr5_runtime.artifact import Manifest, TensorReader
from mmr5_runtime.compute import Compute
from mmr5_runtime.engine import Engine
from mmr5_runtime.onnx.files import BACKEND, GRAPHS
from mmr5_runtime.onnx.model import OnnxModel
from mmr5_runtime.onnx.session import runtime
from mmr5_runtime.spec import ModelSpec, decoder_linear_shapes, stored_tensors
from mmr5_runtime.types import EngineError, RequestError

# Options of ``Reranker.load`` that say how the native engine computes, with what says nothing.
_PLAIN: dict[str, tuple[object, ...]] = {
    "dtype": ("auto", "float32"),
    "kernels": ("auto", "portable"),
    "prefill": ("exact",),
    "kv": ("bf16",),
    "graphs": (None, False),
}


def native_option(options: Mapping[str, object]) -> str | None:
    """The first of ``options``, by name, that asks for what only the native engine has."""
    asking = (name for name, value in options.items() if value not in _PLAIN[name])
    return next(asking, None)


def check_options(options: Mapping[str, object]) -> None:
    """Raises :class:`RequestError` for an option that only the native engine has."""
    if (name := native_option(options)) is not None:
        raise RequestError(
            f"{name}={options[name]!r} is for the native engine, and this one runs in ONNX Runtime "
            f"as its graphs say; leave {name} out, or pass backend='native'."
        )


def open_onnx(folder: Path, manifest: Manifest, device: torch.device) -> Engine:
    """The engine of a folder with graphs.

    Raises :class:`EngineError` where the folder has none, ONNX Runtime is not installed or lacks
    the device, or a graph does not load.
    """
    if BACKEND not in manifest.backends:
        raise EngineError(
            f"{folder} has no graphs for ONNX Runtime; export it with --backend onnxruntime, or "
            "pass backend='native'."
        )
    with TensorReader(folder, manifest) as reader:
        embed_tokens = reader.get("model.embed_tokens.weight").to(device, copy=True)
    read = step_bytes(manifest.spec, manifest.formats)
    model = OnnxModel(folder, manifest.spec, embed_tokens, read, device)
    return Engine(model, device, Compute.plain(device, model.dtype))


def identity(manifest: Manifest) -> dict[str, Any]:
    """What of this backend may change a bit of a result, for the engine's identity."""
    graphs = {name: manifest.files[name].sha256 for name in GRAPHS}
    return {"backend": BACKEND, "onnxruntime": runtime().__version__, "graphs": graphs}


def rounds_activations(formats: Mapping[str, Format]) -> bool:
    """Whether a linear rounds its input: every quantized one does, in steps of 8 bits."""
    return bool(formats)


def step_bytes(spec: ModelSpec, formats: Mapping[str, Format]) -> int:
    """Bytes as stored of the weights that a decode step reads, dense ones as fp32."""
    linears = [*decoder_linear_shapes(spec), "lm_head"]
    total = 0
    for name, (shape, dtype) in stored_tensors(spec, formats).items():
        linear = name.rpartition(".")[0]
        if linear in linears and not name.endswith((".bias", ".weight_shape")):
            size = dtype.itemsize if linear in formats else torch.float32.itemsize
            total += size * math.prod(shape)
    if spec.text.tie_word_embeddings and "lm_head" not in formats:
        total += torch.float32.itemsize * spec.text.vocab_size * spec.text.hidden_size
    return total
