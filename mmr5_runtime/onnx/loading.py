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
from mmr5_runtime.exhaustion import memory_errors
from mmr5_runtime.onnx.files import BACKEND, GRAPHS
from mmr5_runtime.onnx.model import OnnxModel
from mmr5_runtime.onnx.session import processor, runtime
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

    Raises :class:`EngineError` where the folder has none, the device is no CPU, ONNX Runtime is
    missing or too old, or a graph does not load; :class:`OutOfMemoryError` where it does not fit.
    """
    if not set(GRAPHS) <= set(manifest.files):
        raise EngineError(
            f"{folder} has no graphs for ONNX Runtime; export it with --backend onnxruntime, or "
            "pass backend='native'."
        )
    if device.type != "cpu":
        raise EngineError(
            f"the graphs of {folder} compute in float32 on a CPU, and {device} was asked for; pass "
            "device='cpu', or backend='native'."
        )
    read = step_bytes(manifest.spec, manifest.formats)
    with TensorReader(folder, manifest) as reader, memory_errors(device, _shortage):
        embed_tokens = reader.get("model.embed_tokens.weight").clone()
        model = OnnxModel(folder, manifest.spec, embed_tokens, read)
        return Engine(model, device, Compute.plain(device, model.dtype))


def _shortage(free: int | None) -> str:
    return (
        "the weights do not fit into memory: ONNX Runtime keeps dense ones in fp32, and joins and "
        "widens constants while it loads them; free memory, or load with backend='native', which "
        "needs less."
    )


def identity(manifest: Manifest) -> dict[str, Any]:
    """What of this backend may change a bit of a result, for the engine's identity."""
    graphs = {name: manifest.files[name].sha256 for name in GRAPHS}
    version = runtime().__version__
    return {"backend": BACKEND, "onnxruntime": version, "graphs": graphs, **processor()}


def rounds_activations(formats: Mapping[str, Format]) -> bool:
    """Whether a linear rounds its input: every quantized one does, in steps of 8 bits."""
    return bool(formats)


def step_bytes(spec: ModelSpec, formats: Mapping[str, Format]) -> int:
    """Bytes of the weights that a decode step reads: codes as stored, what is dense as fp32."""
    linears = [*decoder_linear_shapes(spec), "lm_head"]
    total = 0
    for name, (shape, dtype) in stored_tensors(spec, formats).items():
        linear = name.rpartition(".")[0]
        if linear in linears and not name.endswith(".weight_shape"):
            stored = linear in formats and not name.endswith(".bias")
            total += (dtype.itemsize if stored else torch.float32.itemsize) * math.prod(shape)
    if spec.text.tie_word_embeddings and "lm_head" not in formats:
        total += torch.float32.itemsize * spec.text.vocab_size * spec.text.hidden_size
    return total
