"""Opening and running graphs with ONNX Runtime, which is imported nowhere else."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmr5_runtime.types import EngineError

LEAST_VERSION = (1, 31)  # the first that the graphs were run with
_NATIVE = "or load the engine with backend='native'"
_NUMPY = {torch.float32: np.float32, torch.int32: np.int32, torch.int64: np.int64}
# What ONNX Runtime's kernels are chosen by, besides what torch says of a processor.
_INSTRUCTIONS = ("vnni", "amx", "avx2", "avx512", "bf16", "asimddp", "i8mm", "sve", "fp16")
_EXHAUSTED = ("failed to allocate", "bad_alloc", "bad allocation")


def obstacle() -> str | None:
    """Why the graphs cannot run on this machine's ONNX Runtime; None when they can."""
    try:
        import onnxruntime
    except ImportError as error:
        return f"onnxruntime cannot be imported ({error}); install mmr5-runtime[onnxruntime]"
    version = str(getattr(onnxruntime, "__version__", "of unknown version"))
    known = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if known < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        return f"onnxruntime {version} is too old for the graphs; install onnxruntime>={least}"
    return None


def runtime() -> Any:
    """The package; :class:`EngineError` where it is missing or too old."""
    if reason := obstacle():
        raise EngineError(f"{reason}, {_NATIVE}.")
    import onnxruntime

    return onnxruntime


def open_session(path: Path) -> Any:
    """An ``InferenceSession`` on the CPU, with as many threads as torch uses.

    Raises :class:`EngineError` for a graph that does not load, ``MemoryError`` for one that does
    not fit.
    """
    ort = runtime()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    # Every graph has threads of its own. Those of one would spin on after its run, on the cores
    # that the next graph computes on: a step of two graphs took twice the time of both. (One pool
    # for the process is no way out: other users of onnxruntime in it could then open nothing.)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3  # errors
    # Sizes differ from call to call, and remembered plans of memory would only pile up.
    options.enable_mem_pattern = False
    # Its pool would keep the most that a long prompt ever took, for good; no call was seen to take
    # longer without (docs/LOG.md).
    options.enable_cpu_mem_arena = False
    remedy = f"export the engine again, {_NATIVE}"
    with _errors(f"{path} cannot be loaded by onnxruntime {ort.__version__}", remedy):
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(
    session: Any, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], binding: Any = None
) -> None:
    """Runs a graph from and to the memory of CPU tensors; ``outputs`` are overwritten.

    ``binding`` binds everything else, and keeps what was bound here until the next call. Raises
    ``MemoryError`` and :class:`EngineError` like :func:`open_session`.
    """
    binding = binding or session.io_binding()
    # Held here while it runs: the binding knows addresses only.
    held = {name: value.contiguous() for name, value in inputs.items()}
    for name, value in held.items():
        bind(binding.bind_input, name, value)
    for name, value in outputs.items():
        bind(binding.bind_output, name, value)
    with _errors("onnxruntime failed in a graph of this engine", f"pass less, {_NATIVE}"):
        session.run_with_iobinding(binding)


def bind(into: Any, name: str, tensor: Tensor) -> None:
    """Binds a contiguous tensor on the CPU, by ``bind_input`` or ``bind_output`` of a binding."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is bound by its address and must be contiguous.")
    into(name, "cpu", 0, _NUMPY[tensor.dtype], list(tensor.shape), tensor.data_ptr())


def processor() -> dict[str, Any]:
    """What decides which of ONNX Runtime's kernels run here."""
    flags: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("flags", "features")):
                flags |= set(line.partition(":")[2].split())
    chosen = sorted(flag for flag in flags if any(part in flag for part in _INSTRUCTIONS))
    return {"machine": platform.machine(), "instructions": chosen}


@contextmanager
def _errors(what: str, remedy: str) -> Iterator[None]:
    """Its own exceptions, which have no class in common, as ours."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in _EXHAUSTED):
            raise MemoryError(str(error)) from None
        raise EngineError(f"{what} ({error}); {remedy}.") from error
