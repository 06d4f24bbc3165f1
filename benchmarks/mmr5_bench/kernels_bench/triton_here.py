"""Whether Triton kernels can run here: on a GPU, or in Triton's interpreter for a dry run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from unittest.mock import patch

import torch

from mmr5_kernels.target import INTERPRETED, Target

_SWITCH = "TRITON_INTERPRET"


def allow_interpreter(device: torch.device) -> None:
    """Before the first Triton kernel is imported: lets a dry run on a CPU interpret them.

    Triton reads the switch once, when it defines its first kernel; on a GPU it is left alone.
    """
    if device.type == "cpu" and "triton" not in sys.modules:
        os.environ.setdefault(_SWITCH, "1")


def why_no_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel runs on ``device`` in ``dtype``; None when they do."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if dtype != torch.bfloat16:
        return f"the Triton kernels compute bfloat16, not {dtype}; pass --dtype bfloat16"
    if device.type == "cuda":
        return None
    from mmr5_kernels.ops.common import WIDE

    return None if WIDE else f"on a CPU Triton needs its interpreter; set {_SWITCH}=1"


def targets_of(device: torch.device, dtype: torch.dtype, *, interpret: bool) -> list[Target]:
    """What an engine on ``device`` uses by default, then every kernel that can run there.

    On a CPU the Triton kernels are among them with ``interpret`` only: they take seconds each.
    """
    targets = [Target.of(device)]
    if device.type == "cuda":
        targets.append(Target.of(device, "portable"))
        for kernels in ("triton", "cuda") if why_no_triton(device, dtype) is None else ():
            try:
                targets.append(Target.of(device, kernels))
            except ValueError:  # an old GPU or driver: the default has said so
                pass
    elif interpret and why_no_triton(device, dtype) is None:
        targets.append(INTERPRETED)
    return targets


@contextmanager
def coarse_tiles(device: torch.device) -> Iterator[None]:
    """Lets dry runs of whole models cut decode linears into few large pieces; nothing on a GPU.

    In the interpreter a program takes as long however much it computes, and a step has hundreds.
    """
    if device.type != "cpu" or find_spec("triton") is None:
        yield
        return
    from mmr5_kernels import tuning

    def coarse(family: str, n: int, gated: bool, capability: tuple[int, int]) -> tuning.Tile:
        return replace(tuning.tile(family, n, gated, capability), block_n=256, rows=64)

    with patch("mmr5_kernels.ops.skinny_linear.tile", coarse):
        yield
