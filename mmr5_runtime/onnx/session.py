"""Opening graphs with ONNX Runtime, which is imported nowhere else."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from mmr5_runtime.types import EngineError

PACKAGE = "onnxruntime"
_DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
_DTYPES["tensor(bfloat16)"] = torch.bfloat16
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def is_installed() -> bool:
    """Whether ONNX Runtime can be imported."""
    from importlib.util import find_spec

    return find_spec(PACKAGE) is not None


def runtime() -> Any:
    """The package; :class:`EngineError` where it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            "backend='onnxruntime' needs the package onnxruntime, which cannot be imported "
            f"({error}); install mmr5-runtime[onnxruntime], or pass backend='native'."
        ) from error
    return onnxruntime


def provider(device: torch.device) -> str:
    """The execution provider of a device; :class:`EngineError` where the package has none."""
    name, there = _PROVIDERS[device.type], runtime().get_available_providers()
    if name not in there:
        raise EngineError(
            f"the installed onnxruntime has no {name} ({', '.join(there)}); install "
            "onnxruntime-gpu, or pass device='cpu'."
        )
    return name


@cache
def shared_threads() -> int | None:
    """Threads of the pool that the sessions of this process share; None where there is none.

    A pool of its own for each of three graphs would have the threads of two spin on the cores that
    the third computes on: a step of two graphs took twice the time of both (docs/LOG.md). There can
    be one shared pool in a process, and it keeps its size.
    """
    threads = torch.get_num_threads()
    try:
        runtime().set_global_thread_pool_sizes(threads, 1)
    except Exception:  # somebody else has made it; how large is not said
        return None
    return threads


def open_session(path: Path, device: torch.device) -> Any:
    """An ``InferenceSession`` on ``device``, with as many threads as torch uses.

    Raises :class:`EngineError` for a graph that cannot be loaded.
    """
    ort = runtime()
    threads = torch.get_num_threads()
    options = ort.SessionOptions()
    if threads == shared_threads():
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors
    # Sizes differ from call to call, and remembered plans of memory would only pile up.
    options.enable_mem_pattern = False
    where: Any = provider(device)
    if device.type == "cuda":
        where = (where, {"device_id": device.index or 0})
    try:
        return ort.InferenceSession(str(path), options, providers=[where])
    except Exception as error:  # its exceptions have no common class
        raise EngineError(
            f"{path} cannot be loaded by onnxruntime {ort.__version__} ({error}); export the "
            "engine again."
        ) from error


def input_dtype(session: Any, name: str) -> torch.dtype:
    """The dtype of an input of a graph."""
    kinds = {given.name: given.type for given in session.get_inputs()}
    return _DTYPES[kinds[name]]
