"""The model that writes answers to calibration samples, built straight from a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmr5_export.checkpoint import Checkpoint, read_json
from mmr5_export.processor import image_settings, read_processor
from mmr5_export.quantize import quantize_linear
from mmr5_kernels.layout import INT8_WEIGHT_ONLY, Format
from mmr5_runtime.artifact import file_sha256
from mmr5_runtime.compute import resolve_device, resolve_dtype
from mmr5_runtime.engine import Engine
from mmr5_runtime.image import PixelBudget
from mmr5_runtime.loading import LoadedEngine
from mmr5_runtime.model import Model
from mmr5_runtime.options import DEFAULT_MAX_NEW_TOKENS
from mmr5_runtime.prompt import DEFAULT_PROFILE, PromptTokenizer, load_template, template_sha256
from mmr5_runtime.spec import ModelSpec, decoder_linear_shapes, linear_shapes
from mmr5_runtime.types import ExportError

QUANTS = ("bf16", "int8-weight-only")


def weights_sha256(hashes: Mapping[str, str]) -> str:
    """One hash for all weight files of a checkpoint, from the sha256 of each by file name."""
    lines = "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


@dataclass(frozen=True)
class Generator:
    """What writes the answers: everything they depend on besides the sample.

    ``weights_sha256`` stands for the weights of ``checkpoint`` (see :func:`weights_sha256`).
    ``device`` and ``dtype`` are those of :meth:`mmr5_runtime.Reranker.load`. ``quant``
    "int8-weight-only" keeps the decoder's linears in half the memory, for devices that cannot hold
    them in bf16; which to take is for the caller to decide. ``profile`` names the prompt.
    """

    checkpoint: Checkpoint
    weights_sha256: str
    budget: PixelBudget
    device: str = "cpu"
    dtype: str = "auto"
    quant: str = "bf16"
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    profile: str = DEFAULT_PROFILE

    def __post_init__(self) -> None:
        if self.quant not in QUANTS:
            raise ExportError(
                f"responses cannot be generated in {self.quant!r}; use {' or '.join(QUANTS)}."
            )
        if self.max_new_tokens < 1:
            raise ExportError(
                f"responses of {self.max_new_tokens} tokens hold nothing; allow 1 or more."
            )

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    def image_settings(self) -> dict[str, Any]:
        """Keyword arguments of :func:`mmr5_runtime.image.preprocess`."""
        found = image_settings(read_processor(self.folder), self.checkpoint.spec.vision)
        return {**asdict(found), "mean": found.mean, "std": found.std}

    def generation_config(self) -> dict[str, Any]:
        """The checkpoint's ``generation_config.json``; empty when it has none."""
        path = self.folder / "generation_config.json"
        return read_json(path) if path.is_file() else {}

    def identity(self) -> str:
        """JSON of all that decides a response besides the sample, for the keys of a cache."""
        device = resolve_device(self.device)
        return json.dumps(
            {
                "weights": self.weights_sha256,
                "spec": self.checkpoint.spec.to_json(),
                "tokenizer": file_sha256(self.folder / "tokenizer.json"),
                "template": template_sha256(self.profile),
                "budget": asdict(self.budget),
                "image": self.image_settings(),
                "penalty": self.generation_config().get("repetition_penalty"),
                "max_new_tokens": self.max_new_tokens,
                "format": [self.quant, str(resolve_dtype(self.dtype, device)), device.type],
            },
            sort_keys=True,
        )

    def load(self) -> LoadedEngine:
        """The checkpoint as an engine in memory, as an export to ``quant`` would give it.

        Weights pass through bf16 whatever the checkpoint has, because an engine stores them so.
        Raises :class:`CheckpointError` for weights that do not fit the config.
        """
        spec, device = self.checkpoint.spec, resolve_device(self.device)
        formats = _weight_only(spec) if self.quant == "int8-weight-only" else {}
        model = Model.from_tensors(
            spec,
            _Reader(self.checkpoint, formats),
            formats,
            resolve_dtype(self.dtype, device),
            device,
        )
        return LoadedEngine(
            engine=Engine(model, device),
            tokenizer=PromptTokenizer.from_file(
                self.folder / "tokenizer.json", load_template(self.profile)
            ),
            budget=self.budget,
            image_settings=self.image_settings(),
            generation_config=self.generation_config(),
            context=spec.text.max_position_embeddings,
            # Good within a process, which is as long as anything is remembered of this engine.
            identity=hashlib.sha256(self.identity().encode()).digest(),
        )


def _weight_only(spec: ModelSpec) -> dict[str, Format]:
    """int8 weights for the decoder, and for ``lm_head`` where it has weights of its own."""
    linears = [
        *decoder_linear_shapes(spec),
        *(["lm_head"] if "lm_head" in linear_shapes(spec) else []),
    ]
    return dict.fromkeys(linears, INT8_WEIGHT_ONLY)


class _Reader:
    """Stored tensors of an engine that was never written; one linear is quantized at a time."""

    def __init__(self, checkpoint: Checkpoint, formats: Mapping[str, Format]) -> None:
        self._checkpoint, self._formats = checkpoint, formats
        self._linear = ""
        self._parts: dict[str, Tensor] = {}  # of the last linear asked for

    def __call__(self, name: str) -> Tensor:
        linear, _, suffix = name.rpartition(".")
        if linear not in self._formats or suffix == "bias":
            return self._checkpoint.read(name).to(torch.bfloat16)
        if linear != self._linear:
            weight = self._checkpoint.read(f"{linear}.weight")
            self._parts, _ = quantize_linear(weight, self._formats[linear])
            self._linear = linear
        return self._parts[suffix]
