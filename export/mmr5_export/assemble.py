"""The tensors of an engine, wherever they come from, and writing them to its files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mmr5_export.checkpoint import Checkpoint
from mmr5_export.finite import require_finite
from mmr5_export.plan import Plan
from mmr5_export.prequantized import QuantizedCheckpoint
from mmr5_export.quantize import quantize_linear, scale_search
from mmr5_export.write import TensorWriter
from mmr5_kernels.layout import Format
from mmr5_runtime.spec import ModelSpec, pad_vision


class Progress(Protocol):
    """Called with a stage, how much of it is done, its total, and perhaps something to say."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...


class EngineTensors(Protocol):
    """What is stored: quantized linears by their parts, everything else as it is."""

    def parts(self, linear: str) -> Mapping[str, Tensor]:
        """Stored tensors of a quantized linear by suffix, its bias left out."""

    def dense(self, name: str) -> Tensor:
        """Any other tensor, bf16."""


class QuantizedHere:
    """Tensors of a checkpoint this export quantizes.

    ``layers`` gives the tensors that calibration made or changed in a decoder layer; what is not
    among them is rounded to nearest when asked for, and ``sqnr_db`` then says what that cost.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        formats: Mapping[str, Format],
        methods: Mapping[str, str],
        layers: Callable[[int], Mapping[str, Tensor]],
    ) -> None:
        self._checkpoint, self._formats, self._layers = checkpoint, formats, layers
        self._methods = methods
        self._index, self._layer = -1, dict[str, Tensor]()
        self.sqnr_db: dict[str, float | None] = {}

    @property
    def _spec(self) -> ModelSpec:
        return self._checkpoint.spec

    def parts(self, linear: str) -> dict[str, Tensor]:
        """See :class:`EngineTensors`; raises :class:`CheckpointError` for a weight with NaN."""
        made = self._made(linear)
        if f"{linear}.weight_scale" in made:
            own = f"{linear}.weight"  # and weight_scale, weight_packed, ..., but not the bias
            return {name[len(linear) + 1 :]: made[name] for name in made if name.startswith(own)}
        name = f"{linear}.weight"
        if linear == "lm_head" and self._spec.text.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        weight = self._checkpoint.read(name)
        require_finite(name, weight)
        parts, decibels = quantize_linear(
            _as_wide_as_stored(name, weight, self._spec, self._formats),
            self._formats[linear],
            scale_search(self._methods[linear]),
        )
        self.sqnr_db[linear] = round(decibels, 3) if math.isfinite(decibels) else None
        return parts

    def dense(self, name: str) -> Tensor:
        """See :class:`EngineTensors`; raises :class:`CheckpointError` for a tensor with NaN."""
        made = self._made(name)
        if name in made:
            return made[name]
        tensor = self._checkpoint.read(name)
        require_finite(name, tensor)
        return _as_wide_as_stored(name, tensor, self._spec, self._formats).to(torch.bfloat16)

    def _made(self, name: str) -> Mapping[str, Tensor]:
        """What calibration made of the layer that ``name`` belongs to; one layer is kept."""
        if not name.startswith("model.layers."):
            return {}
        index = int(name.split(".")[2])
        if index != self._index:
            self._index, self._layer = index, dict(self._layers(index))
        return self._layer


class TakenOver:
    """Tensors of a checkpoint that is quantized already: the very codes and scales it holds."""

    def __init__(self, checkpoint: QuantizedCheckpoint) -> None:
        self._checkpoint = checkpoint

    def parts(self, linear: str) -> dict[str, Tensor]:
        """See :class:`EngineTensors`."""
        parts = self._checkpoint.parts(linear)
        for suffix, part in parts.items():
            if part.dtype in (torch.bfloat16, torch.float16, torch.float32):
                require_finite(f"{linear}.{suffix}", part)
        return parts

    def dense(self, name: str) -> Tensor:
        """See :class:`EngineTensors`."""
        tensor = self._checkpoint.read(name)
        require_finite(name, tensor)
        formats = self._checkpoint.formats
        return _as_wide_as_stored(name, tensor, self._checkpoint.spec, formats).to(torch.bfloat16)


def _as_wide_as_stored(
    name: str, tensor: Tensor, spec: ModelSpec, formats: Mapping[str, Format]
) -> Tensor:
    """A vision tensor as wide as its block is stored, any other as it is."""
    linear = name.rpartition(".")[0]
    block = linear.startswith("visual.blocks.") and linear in formats
    return pad_vision(name, tensor, spec) if block else tensor


def write_tensors(source: EngineTensors, plan: Plan, folder: Path, progress: Progress) -> None:
    """Streams every planned tensor into its file; memory holds one linear at a time."""
    linears: set[str] = set()
    with TensorWriter(folder, plan.stored) as writer:
        for done, stored in enumerate(plan.stored):
            progress("write", done, len(plan.stored))
            linear, _, suffix = stored.name.rpartition(".")
            if linear not in plan.formats or suffix == "bias":
                writer.write(stored.name, source.dense(stored.name))
            elif linear not in linears:
                linears.add(linear)
                for part, tensor in source.parts(linear).items():
                    writer.write(f"{linear}.{part}", tensor)
        writer.finish()
    progress("write", len(plan.stored), len(plan.stored))
