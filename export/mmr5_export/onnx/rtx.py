"""Ahead-of-time compilation with TensorRT-RTX, which needs no GPU: ``--aot rtx``.

Compiling shows that NVIDIA's parser takes every node and that its builder finds a kernel for each;
the ``.rtx`` files are for GPUs that TensorRT-RTX runs on, which data-centre GPUs need not be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmr5_export.onnx.build_engines import SUFFIXES, BuildError, build_file, load_bindings
from mmr5_export.onnx.profiles import Profile
from mmr5_runtime.types import ExportError

PACKAGES = ("tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu13-bindings")


def require_rtx() -> Any:
    """TensorRT-RTX's bindings; raises :class:`ExportError` naming the packages without them."""
    try:
        return load_bindings("rtx")
    except ImportError as error:
        raise ExportError(
            f"TensorRT-RTX cannot be used ({error}); install {' and '.join(PACKAGES)} or leave "
            "--aot rtx out."
        ) from error


def compile_graphs(folder: Path, profiles: Mapping[str, Sequence[Profile]]) -> dict[str, Any]:
    """Compiles each graph of ``folder`` into a file of its name with suffix ``.rtx``.

    Returns the version and, per graph, seconds and bytes. Raises :class:`ExportError` with the
    nodes that TensorRT-RTX does not take.
    """
    trt = require_rtx()
    facts: dict[str, Any] = {}
    for graph, given in profiles.items():
        wanted = [profile.to_json() for profile in given]
        output = folder / (graph + SUFFIXES["rtx"])
        try:
            facts[graph] = build_file(trt, folder / f"{graph}.onnx", wanted, output)
        except BuildError as error:
            raise ExportError(
                f"TensorRT-RTX {trt.__version__} cannot compile what was exported: {error}. Export "
                "without --aot rtx, or with another format for the linear at fault."
            ) from error
    return {"tensorrt_rtx": str(trt.__version__), "graphs": facts}
