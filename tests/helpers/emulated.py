"""``csrc/w4_linear.cu`` compiled by g++ and run by ``cuda_emulator`` on CPU tensors."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import mmr5_kernels
from mmr5_kernels.cuda.w4_linear import LAYOUT, Arguments, Weight, arguments, output
from mmr5_kernels.cuda.w4_plan import DEFAULT, Gpu, Tuning, plan
from mmr5_kernels.fused import Norm

COMPILER = shutil.which("g++")
SOURCES = Path(mmr5_kernels.__file__).parent / "csrc"
EMULATOR = Path(__file__).parent / "cuda_emulator"
SMALL_GPU = Gpu(sms=1, shared_bytes=232_448)  # three units make its block compute all of them
POISON = 0x7FC1  # a NaN in bf16


def build(folder: Path, source: str | None = None) -> ctypes.CDLL:
    """Compiles the kernel, or ``source`` in its place, into ``folder``; a second or two."""
    assert COMPILER is not None
    text = (SOURCES / "w4_linear.cu").read_text() if source is None else source
    (folder / "w4_linear.cu").write_text(text)
    made = folder / "w4_linear.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    paths = ["-I", str(folder), "-I", str(EMULATOR), "-o", str(made)]
    command = [COMPILER, *flags, *paths, str(EMULATOR / "w4_linear.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(made))
    assert library.arguments_size() == ctypes.sizeof(Arguments)
    return library


@dataclass(frozen=True, eq=False)
class Emulator:
    """``run`` is :func:`mmr5_kernels.cuda.w4_linear.w4_linear` on the CPU."""

    binary: ctypes.CDLL
    gpu: Gpu = SMALL_GPU

    def run(
        self,
        x: Tensor,
        weight: Weight,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        swiglu: bool = False,
        order: int = 0,
        tuning: Tuning = DEFAULT,
    ) -> tuple[Tensor, int]:
        """The result, and how many copies of weights began before the previous kernel was over.

        Raises ``RuntimeError`` for what the emulator does not let pass, or a write beside y.
        """
        shape = output(x, weight, norm, residual, swiglu).shape
        guarded = torch.full((shape.numel() + 64,), POISON, dtype=torch.int16)
        y = guarded[32:-32].view(torch.bfloat16).view(shape)
        zeros = "zeros" in weight.operands[LAYOUT]
        planned = plan(x.shape[0], weight.n, weight.k, zeros, norm is not None, self.gpu, tuning)
        v = planned.variant
        wanted = (ctypes.c_int * 5)(v.warps, v.stages, v.tiles, v.zeros, v.shared_x)
        given = arguments(x, weight, norm, residual, swiglu, y, planned)
        ranges = _ranges(list(weight.operands[LAYOUT].values()))
        error, early = ctypes.create_string_buffer(256), ctypes.c_longlong()
        failed = self.binary.emulate(
            ctypes.byref(given), wanted, *planned.grid, planned.shared_bytes, order,
            ranges, len(ranges) // 2, error, ctypes.byref(early),
        )  # fmt: skip
        if failed:
            raise RuntimeError(error.value.decode())
        if not (guarded[:32].eq(POISON).all() and guarded[-32:].eq(POISON).all()):
            raise RuntimeError("wrote beside the result")
        return y, early.value


def _ranges(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    ends = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]
    flat = [end for pair in ends for end in pair]
    return (ctypes.c_void_p * len(flat))(*flat)
