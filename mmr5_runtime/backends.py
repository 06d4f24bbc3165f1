"""Which engine runs a folder: the native one, or another that the folder was exported for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal, get_args

import torch

from mmr5_kernels.layout import Format
from mmr5_runtime.artifact import Manifest
from mmr5_runtime.onnx.files import BACKEND as ONNXRUNTIME
from mmr5_runtime.onnx.session import obstacle
from mmr5_runtime.spec import decoder_linear_shapes
from mmr5_runtime.types import RequestError

BackendName = Literal["auto", "native", "onnxruntime", "tensorrt-llm"]


def choose_backend(
    asked: str, folder: Path, manifest: Manifest, device: torch.device, native_only: bool
) -> str:
    """The backend to load: the one ``asked`` for, or for "auto" the fastest that was measured.

    That is ONNX Runtime on a CPU for a decoder in int4 or W8A8, which were measured (README), if
    the folder has graphs for it, and else the native engine. ``native_only``: options were given
    that no other engine has. Warns where only the package stands in the way. Raises
    :class:`RequestError` for an unknown name.
    """
    if asked not in get_args(BackendName):
        known = ", ".join(get_args(BackendName))
        raise RequestError(f"backend={asked!r} is unknown; pass {known}.")
    if asked != "auto":
        return asked
    if device.type != "cpu" or native_only or ONNXRUNTIME not in manifest.backends:
        return "native"
    linears = decoder_linear_shapes(manifest.spec)
    if not all(_measured(manifest.formats.get(name)) for name in linears):
        return "native"
    if (reason := obstacle()) is None:
        return ONNXRUNTIME
    warnings.warn(
        f"{folder} has graphs for ONNX Runtime, measured to be faster on a CPU with AVX2, but "
        f"{reason}, or pass backend='native'.",
        RuntimeWarning,
        stacklevel=4,  # whoever calls Reranker.load
    )
    return "native"


def _measured(format: Format | None) -> bool:
    return format is not None and (format.weights == "int4" or format.activations == "int8")
