"""Which engine runs a folder: the native one, or another that the folder was exported for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal, get_args

import torch

from mmr5_runtime.artifact import Manifest
from mmr5_runtime.onnx.files import BACKEND as ONNXRUNTIME
from mmr5_runtime.onnx.session import is_installed
from mmr5_runtime.types import RequestError

BackendName = Literal["auto", "native", "onnxruntime", "tensorrt-llm"]


def choose_backend(
    asked: str, folder: Path, manifest: Manifest, device: torch.device, native_only: bool
) -> str:
    """The backend to load: the one ``asked`` for, or for "auto" the fastest that was measured.

    That is ONNX Runtime for a quantized engine on a CPU if the folder has graphs for it (README),
    and else the native engine. ``native_only``: options were given that no other engine has. Warns
    where only the missing package stands in the way. Raises :class:`RequestError` for an unknown
    name.
    """
    if asked not in get_args(BackendName):
        known = ", ".join(get_args(BackendName))
        raise RequestError(f"backend={asked!r} is unknown; pass {known}.")
    if asked != "auto":
        return asked
    if device.type != "cpu" or native_only or not manifest.formats:
        return "native"
    if ONNXRUNTIME not in manifest.backends:
        return "native"
    if is_installed():
        return ONNXRUNTIME
    warnings.warn(
        f"{folder} has graphs for ONNX Runtime, which is faster for quantized engines on a CPU and "
        "not installed; install mmr5-runtime[onnxruntime], or pass backend='native'.",
        RuntimeWarning,
        stacklevel=3,
    )
    return "native"
