"""Walks through the decoder one layer at a time, calibrating and quantizing as it goes.

Two sets of prompts travel from layer to layer, both as hidden states on disk::

    calibration   runs through the layers as quantized so far: a layer sees the input it will really
                  get, though its o_proj and down see what its own qkv and gate_up, still in the
                  checkpoint's precision, make of it (all statistics of a layer come from one run)
    reference     held-out prompts through the layers as they were; what comes out at the end are
                  the logits that verification compares the engine with

One layer is in memory, and one sample. Every layer is a step of the journal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mmr5_export.calibration import Prompt
from mmr5_export.checkpoint import Checkpoint
from mmr5_export.finite import require_finite
from mmr5_export.hidden import HiddenStates
from mmr5_export.journal import Journal
from mmr5_export.layer_pass import LayerPass
from mmr5_export.layer_quant import quantize_layer
from mmr5_kernels.layout import Format
from mmr5_runtime.layers import RMSNorm
from mmr5_runtime.spec import ModelSpec, tensor_shapes
from mmr5_runtime.vision import VisionTower
from mmr5_runtime.weights import Weights

CALIBRATION, REFERENCE = "calibration", "reference"
LayerProgress = Callable[[int, int, float | None], None]
"""Called with finished layers, their total, and the largest output error of the last one."""


@dataclass(frozen=True)
class Prepared:
    """A prompt with its answer, and what reads its pages: pixel values [P, patch_dim] by page."""

    prompt: Prompt
    pixel_values: Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Walk:
    """What one walk through the decoder works with; ``formats`` and ``methods`` are by linear.

    ``visual_weight`` is how much a visual token counts in the statistics, next to 1 for a text
    token. Without calibration prompts nothing is quantized on the way.
    """

    checkpoint: Checkpoint
    calibration: Sequence[Prepared]
    reference: Sequence[Prepared]
    formats: Mapping[str, Format]
    methods: Mapping[str, str]
    damp: float
    visual_weight: float
    dtype: torch.dtype
    device: torch.device

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec

    def samples(self, stream: str) -> Sequence[Prepared]:
        """The prompts of a stream."""
        return self.calibration if stream == CALIBRATION else self.reference


def walk_decoder(
    walk: Walk, journal: Journal, hidden: HiddenStates, progress: LayerProgress
) -> None:
    """Takes every step the journal does not have yet: embedding, then layer by layer.

    Afterwards the journal holds the quantized tensors of every layer (step ``layer-NN``) and
    ``hidden`` what the reference prompts came to. Raises :class:`CheckpointError` for weights or
    statistics that are not finite.
    """
    layers = walk.spec.text.num_layers
    streams = [stream for stream in (CALIBRATION, REFERENCE) if walk.samples(stream)]
    if not journal.done("embed"):
        hashes = {
            _stage(stream, 0): hidden.write(_stage(stream, 0), embed(walk, walk.samples(stream)))
            for stream in streams
        }
        journal.finish("embed", None, hidden=hashes)
    _expect(hidden, journal.hidden("embed"))
    for index in range(layers):
        step = f"layer-{index:02}"
        if not journal.done(step):
            hidden.keep_only(*(_stage(stream, index) for stream in streams))
            report, tensors, hashes = _take_layer(walk, hidden, index)
            journal.finish(step, report, tensors, hashes)
        _expect(hidden, journal.hidden(step))
        errors = [linear["error"] for linear in journal.result(step).values()]
        progress(index + 1, layers, max(errors, default=None))
    hidden.keep_only(_stage(REFERENCE, layers))


def _expect(hidden: HiddenStates, stages: Mapping[str, Sequence[str]]) -> None:
    for stage, hashes in stages.items():
        hidden.expect(stage, hashes)


def _take_layer(
    walk: Walk, hidden: HiddenStates, index: int
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor], dict[str, list[str]]]:
    """Quantizes layer ``index``, if there is anything to calibrate with; advances all streams.

    Returns the report by linear, the tensors, and the sha256 of the new hidden states by stage.
    """
    hashes: dict[str, list[str]] = {}
    dense = read_layer(walk.checkpoint, index)
    original = LayerPass(walk.spec, index, dense, {}, walk.dtype, walk.device)
    if walk.reference:
        hashes |= _advance(walk, hidden, REFERENCE, index, original)
    if not walk.calibration:
        return {}, {}, hashes
    stats = original.observe(_weighted(walk, hidden, index))
    del original
    made = quantize_layer(walk.spec, index, dense, stats, walk.formats, walk.methods, walk.damp)
    del stats
    if index + 1 < walk.spec.text.num_layers:
        stored = dict(dense) | dict(made.tensors)
        quantized = LayerPass(walk.spec, index, stored, walk.formats, walk.dtype, walk.device)
        hashes |= _advance(walk, hidden, CALIBRATION, index, quantized)
    report = {name: asdict(linear) for name, linear in made.report.items()}
    return report, dict(made.tensors), hashes


def reference_logits(walk: Walk, hidden: HiddenStates, index: int) -> Tensor:
    """Logits [R, V] fp32 of the unquantized model for every token of a held-out answer.

    Row r is what the model expects in place of answer token r, having read everything before it.
    """
    prompt = walk.reference[index].prompt
    state = hidden.read(_stage(REFERENCE, walk.spec.text.num_layers), index)
    state = state[prompt.prompt_tokens - 1 : len(prompt.token_ids) - 1]
    weights = Weights(walk.spec, walk.checkpoint.read, {}, walk.dtype, walk.device)
    norm = RMSNorm(weights.tensor("model.norm.weight"), walk.spec.text.rms_norm_eps)
    tied = walk.spec.text.tie_word_embeddings
    head = weights.tensor("model.embed_tokens.weight" if tied else "lm_head.weight")
    logits: Tensor = norm(state.to(walk.device, walk.dtype)) @ head.T
    return logits.float()


def read_layer(checkpoint: Checkpoint, index: int) -> dict[str, Tensor]:
    """Every tensor of decoder layer ``index`` by canonical name.

    Raises :class:`CheckpointError` naming one that holds NaN or infinite values.
    """
    prefix = f"model.layers.{index}."
    names = [name for name in tensor_shapes(checkpoint.spec) if name.startswith(prefix)]
    tensors = {name: checkpoint.read(name) for name in names}
    for name, tensor in tensors.items():
        require_finite(name, tensor)
    return tensors


def _advance(
    walk: Walk, hidden: HiddenStates, stream: str, index: int, layer: LayerPass
) -> dict[str, list[str]]:
    samples, after = walk.samples(stream), _stage(stream, index + 1)

    def step(sample: int, state: Tensor) -> Tensor:
        return layer.run(state, samples[sample].prompt.positions)

    return {after: hidden.advance(_stage(stream, index), after, len(samples), step)}


def _weighted(
    walk: Walk, hidden: HiddenStates, index: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for number, sample in enumerate(walk.calibration):
        visual = sample.prompt.visual
        weights = torch.where(visual, walk.visual_weight, 1.0)
        yield hidden.read(_stage(CALIBRATION, index), number), sample.prompt.positions, weights


@torch.no_grad()
def embed(walk: Walk, samples: Sequence[Prepared]) -> Iterator[Tensor]:
    """Token embeddings of each prompt with its pages' embeddings in place, [T, hidden]."""
    weights = Weights(walk.spec, walk.checkpoint.read, {}, walk.dtype, walk.device)
    tower = VisionTower(walk.spec.vision, weights)
    table = weights.tensor("model.embed_tokens.weight")
    for sample in samples:
        ids = sample.prompt.token_ids.to(walk.device)
        state = torch.nn.functional.embedding(ids, table)
        pages = zip(sample.pixel_values(), sample.prompt.grids, strict=True)
        encoded = [tower(pixels, grid) for pixels, grid in pages]
        state[sample.prompt.visual.to(walk.device)] = torch.cat(encoded).to(state)
        yield state


def _stage(stream: str, layer: int) -> str:
    return f"{stream}-{layer:02}"
