"""The ways of running one engine that are measured side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args
from unittest.mock import patch

import torch

from mmr5_bench.kernels_bench.triton_here import why_no_triton
from mmr5_bench.random_engine import random_engine
from mmr5_bench.random_weights.shapes import Quant, Shape
from mmr5_kernels.target import INTERPRETED
from mmr5_runtime.capacity import KVFormat
from mmr5_runtime.compute import Kernels, Prefill
from mmr5_runtime.cursor import Cursor
from mmr5_runtime.loading import LoadedEngine


@dataclass(frozen=True)
class Configuration:
    """Options of ``Reranker.load``: kernels, arithmetic of prompts, form of the KV cache, graphs.

    ``graphs`` says whether decode steps are recorded where they can be, ``lookahead`` whether the
    host launches a step before it has read the token of the one before.
    """

    kernels: str
    prefill: Prefill = "exact"
    kv: KVFormat = "bf16"
    graphs: bool = True
    lookahead: bool = True

    @property
    def name(self) -> str:
        """How it is called in results; options at their default are left out."""
        parts = [self.kernels]
        parts += [] if self.prefill == "exact" else [f"prefill {self.prefill}"]
        parts += [] if self.kv == "bf16" else [f"kv {self.kv}"]
        parts += [] if self.graphs else ["no graphs"]
        parts += [] if self.lookahead else ["no lookahead"]
        return ", ".join(parts)

    def why_not(self, device: torch.device) -> str | None:
        """Why it cannot be measured here; None when it may be tried."""
        if self.kernels not in get_args(Kernels):
            return f"this version has no kernels={self.kernels!r}"
        if self.kernels == "portable":
            return None
        if reason := why_no_triton(device, torch.bfloat16):
            return reason
        if device.type == "cpu" and self.kernels == "cuda":
            return "kernels in CUDA C++ are not interpreted"
        if device.type == "cpu" and not (self.graphs and self.lookahead):
            return "a CPU records no graphs and does not look ahead, with or without the option"
        if device.type == "cuda" and self.prefill == "fp8":
            if torch.cuda.get_device_capability(device) < (8, 9):
                return "this GPU multiplies no 8-bit floats"
        return None

    def load(self, shape: Shape, quant: Quant, device: torch.device) -> LoadedEngine:
        """The random engine of ``shape`` run this way, in bfloat16; raises as ``random_engine``.

        On a CPU, where Triton kernels are interpreted, nothing can be recorded.
        """
        return random_engine(shape, quant, str(device), "bfloat16", **self.options(device))

    def options(self, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of ``random_engine`` and ``load_engine``."""
        own = self.kernels != "portable"
        found: dict[str, Any] = {"prefill": self.prefill, "kv": self.kv}
        if device.type == "cpu":
            return found | {"kernels": "auto", "target": INTERPRETED if own else None}
        return found | {"kernels": self.kernels, "graphs": self.graphs if own else None}


@contextmanager
def decoding(configuration: Configuration) -> Iterator[None]:
    """Inside, answers are decoded as ``configuration`` says: lookahead is no option of an engine,
    it follows from the device, so it is switched off where the engine asks for that."""
    if configuration.lookahead:
        yield
        return
    # Every cursor sets it for itself, by its device.
    never = property(lambda self: False, lambda self, value: None)
    with patch.object(Cursor, "asynchronous", new=never):
        yield


PORTABLE = Configuration("portable")
TRITON = Configuration("triton")
TRITON_FP8 = Configuration("triton", prefill="fp8")
TRITON_INT8 = Configuration("triton", prefill="int8")
TRITON_KV8 = Configuration("triton", kv="int8")
TRITON_EAGER = Configuration("triton", graphs=False)
TRITON_WAITING = Configuration("triton", lookahead=False)
CUDA = Configuration("cuda")
ALL: tuple[Configuration, ...] = (
    TRITON,
    TRITON_FP8,
    TRITON_KV8,
    TRITON_INT8,
    CUDA,
    PORTABLE,
    TRITON_EAGER,
    TRITON_WAITING,
)
"""In the order they are measured: what matters most is there first when time runs out."""


def choose(names: Sequence[str]) -> tuple[Configuration, ...]:
    """Those whose name begins with one of ``names``, all for none; ValueError for no match."""
    if not names:
        return ALL
    for name in names:
        if not any(one.name.startswith(name) for one in ALL):
            known = "; ".join(one.name for one in ALL)
            raise ValueError(f"no configuration {name!r}; there are {known}")
    return tuple(one for one in ALL if one.name.startswith(tuple(names)))
