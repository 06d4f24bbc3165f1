"""bitsandbytes in transformers' model: NF4 (Dettmers et al., QLoRA) and LLM.int8().

Decoder linears are replaced one by one by the library's own modules, which is what its integration
in transformers does, but leaves the vision tower dense as in our engines. The library has CPU
kernels too: 0.50.2 has been run on a CPU, on CUDA it has not. LLM.int8() computes in float16 inside
and says so at every linear of every step; that line is held back, writing it would be timed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from torch import nn

from mmr5_bench.peers.base import Peer, Setting
from mmr5_bench.peers.huggingface import (
    TransformersSession,
    dense_model,
    missing,
    replace_decoder_linears,
)

_OUTLIERS = 6.0  # the threshold of LLM.int8() as published, and the integration's default


@dataclass(frozen=True)
class BitsAndBytesPeer(Peer):
    """Decoder linears in ``nf4`` or ``int8``."""

    kind: Literal["nf4", "int8"]

    @property
    def name(self) -> str:
        return f"bitsandbytes-{self.kind}"

    def subject(self, setting: Setting) -> str:
        title = "NF4" if self.kind == "nf4" else "LLM.int8()"
        return f"bitsandbytes {title} {setting.dtype}"

    def axes(self, setting: Setting) -> dict[str, Any]:
        return {"quant": self.kind, "stop": "eos"}

    def why_not(self, setting: Setting) -> str | None:
        if find_spec("bitsandbytes") is None:
            return "bitsandbytes is not installed; pip install bitsandbytes"
        return missing(setting)

    @contextmanager
    def open(self, setting: Setting) -> Iterator[TransformersSession]:
        """Quantizes on the setting's device; raises as the library does."""

        def make(linear: nn.Linear) -> nn.Module:
            return _quantized(linear, self.kind).to(setting.device)

        with dense_model(setting) as model, _silent("bitsandbytes.autograd._functions"):
            replace_decoder_linears(model, make)
            yield TransformersSession(model, setting)


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Holds back what a library's logger says below an error."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _quantized(linear: nn.Linear, kind: Literal["nf4", "int8"]) -> nn.Module:
    """The library's module with the weight of ``linear``; it quantizes when it is moved."""
    import bitsandbytes as library

    # Quantizing happens on the way from the CPU to the device.
    weight = linear.weight.detach().cpu()
    shape = (linear.in_features, linear.out_features)
    bias = linear.bias is not None
    module: Any
    if kind == "nf4":
        module = library.nn.Linear4bit(
            *shape, bias=bias, compute_dtype=linear.weight.dtype, quant_type="nf4"
        )
        module.weight = library.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        module = library.nn.Linear8bitLt(
            *shape, bias=bias, has_fp16_weights=False, threshold=_OUTLIERS
        )
        module.weight = library.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if linear.bias is not None:
        module.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    made: nn.Module = module.eval()
    return made
