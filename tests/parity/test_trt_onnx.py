"""TensorRT's graphs against the torch engine, in fp32: see ``helpers.trt_onnx``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding

from helpers.exporting import quick_export
from helpers.inputs import GRIDS, random_pages, random_prompt
from helpers.tiny import make_hf_model, tiny_configs, write_checkpoint
from helpers.trt_onnx import DecoderOnnx, VisionOnnx, torch_model
from mmr5_export.finished import FinishedEngine, open_finished
from mmr5_kernels.layout import FP8_MAX, INT8_MAX, Format
from mmr5_kernels.reference import dequantize
from mmr5_runtime.linear import Linear
from mmr5_runtime.model import Model, decode_step, embed_prompt, prefill
from mmr5_runtime.rope import mrope_positions

CONFIGS = ("three_heads", "tied", "small_patches")
MINI = Path(str(resources.files("mmr5_runtime") / "assets" / "mini"))
TOLERANCE = 1e-4
STEPS = 32
# What two orders of summing lose to W8A8: a value beside a rounding boundary takes the other code,
# more often in the tower. Scales that are not rounded to bfloat16 lose 42 dB here and 30 dB there.
EIGHT_BIT_DB, TOWER_DB = 45.0, 40.0

# The linears that one module of a layer joins.
JOINED = {
    "model.layers": {
        "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "o_proj": ["self_attn.o_proj"],
        "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.down": ["mlp.down_proj"],
    },
    "visual.blocks": {
        "qkv": ["attn.qkv"],
        "proj": ["attn.proj"],
        "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.down": ["mlp.down_proj"],
    },
}

Engines = Callable[..., FinishedEngine]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """Engines by config ("mini" or a tiny one), quantization and that of the vision tower."""
    root = tmp_path_factory.mktemp("engines")

    @cache
    def make(config: str, quant: str, vision: str = "bf16") -> FinishedEngine:
        source = MINI
        if config != "mini":
            source = root / config
            model = make_hf_model(tiny_configs()[config], seed=3)
            write_checkpoint(model, source, dtype=torch.bfloat16)
        output = root / f"{config}-{quant}-{vision}"
        quick_export(source, quant, output, quantize_vision=vision)
        return open_finished(output)

    return make


def _prompt(model: Model) -> tuple[Tensor, Tensor, int]:
    """Embeddings and positions of a prompt with two pages, and the position after it."""
    grids = [GRIDS[0], GRIDS[2]]
    ids = random_prompt(model.spec, grids, seed=1)
    pages = random_pages(model.spec, grids, seed=2)
    images = [model.visual(page, grid) for page, grid in zip(pages, grids, strict=True)]
    positions, following = mrope_positions(ids, grids, model.spec)
    return embed_prompt(model, ids, images), positions, following


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


def _noise_db(found: Tensor, expected: Tensor) -> float:
    noise = (found - expected).square().sum() / expected.square().sum()
    return 10 * math.log10(float(noise))


@pytest.mark.parametrize("config", [*CONFIGS, "mini"])
def test_vision_is_that_of_torch(config: str, engines: Engines, tmp_path: Path) -> None:
    engine = engines(config, "bf16")
    model, graph = torch_model(engine), VisionOnnx(engine, tmp_path)
    for seed, grid in enumerate(GRIDS):
        (page,) = random_pages(engine.spec, [grid], seed)
        expected = model.visual(page, grid)
        scale = max(1.0, float(expected.abs().max()))
        assert _error(graph(page, grid), expected) <= TOLERANCE * scale, grid


@pytest.mark.parametrize("config", [*CONFIGS, "mini"])
def test_decoder_is_that_of_torch(config: str, engines: Engines, tmp_path: Path) -> None:
    """A prompt in one call and in two, then greedy steps: the same logits and the same tokens."""
    engine = engines(config, "bf16")
    model = torch_model(engine)
    embeds, positions, position = _prompt(model)
    capacity = len(embeds) + STEPS + 3
    whole = DecoderOnnx(engine, tmp_path, capacity)
    arena = model.new_arena(capacity)
    expected = prefill(model, embeds, positions, arena)
    assert _error(whole(embeds, positions)[0], expected) <= TOLERANCE

    graph = DecoderOnnx(engine, tmp_path, capacity)
    graph(embeds[:9], positions[:, :9], look=capacity)
    found = graph(embeds[9:], positions[:, 9:])[0]
    for _ in range(STEPS):
        assert _error(found, expected) <= TOLERANCE
        token = expected.argmax()
        assert int(found.argmax()) == int(token)
        where = torch.tensor([[position]])
        expected = decode_step(model, token.view(1, 1), where, [arena])[0, 0]
        step = embedding(token.view(1), model.decoder.embed_tokens)
        # Two lengths in turn: as many places as there are, and all the buffers have.
        look = capacity if position % 2 else None
        found = graph(step, where.expand(3, 1), look=look)[0]
        position += 1


def test_a_drafted_step_has_logits_of_every_token(engines: Engines, tmp_path: Path) -> None:
    engine = engines("three_heads", "bf16")
    model = torch_model(engine)
    embeds, positions, position = _prompt(model)
    graph, arena = DecoderOnnx(engine, tmp_path, 80), model.new_arena(80)
    prefill(model, embeds, positions, arena)
    graph(embeds, positions)
    tokens = torch.tensor([[5, 7, 11]])
    where = torch.arange(position, position + 3)[None]
    expected = decode_step(model, tokens, where, [arena])[0]
    drafted = embedding(tokens[0], model.decoder.embed_tokens)
    found = graph(drafted, where.expand(3, 3), rows=(0, 1, 2))
    assert _error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "quant"),
    [("int4", "int4"), ("mini", "int4"), ("mini", "int8-weight-only")],
)
def test_weight_only_is_the_dequantized_engine(
    config: str, quant: str, dtype: torch.dtype, engines: Engines, tmp_path: Path
) -> None:
    engine = engines(config, quant)
    golden = _dequantized(engine)
    embeds, positions, _ = _prompt(golden)
    expected = prefill(golden, embeds, positions, golden.new_arena(80), all_logits=True)
    found = DecoderOnnx(engine, tmp_path, 80, dtype)(embeds, positions, rows=range(len(embeds)))
    assert _error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant", ["int8", "fp8"])
def test_eight_bit_products_are_those_with_one_scale_per_linear(
    quant: str, dtype: torch.dtype, engines: Engines, tmp_path: Path
) -> None:
    """The golden rounds what enters each linear to the grid that calibration's maximum gives.

    Of the scale too it takes what the graph's dtype holds: bfloat16 has eight bits of it.
    """
    stored = engines("mini", quant)
    golden = _dequantized(stored)
    embeds, positions, _ = _prompt(golden)

    def all_logits() -> Tensor:
        return prefill(golden, embeds, positions, golden.new_arena(80), all_logits=True)

    engine = _calibrated(stored, golden, all_logits)
    _round_inputs(golden, engine, dtype)
    found = DecoderOnnx(engine, tmp_path, 80, dtype)(embeds, positions, rows=range(len(embeds)))
    assert _noise_db(found, all_logits()) < -EIGHT_BIT_DB


@pytest.mark.parametrize("quant", ["int8", "fp8"])
def test_a_tower_in_eight_bits(quant: str, engines: Engines, tmp_path: Path) -> None:
    stored = engines("mini", "bf16", quant)
    golden, grid = _dequantized(stored), GRIDS[2]
    (page,) = random_pages(stored.spec, [grid], seed=4)
    engine = _calibrated(stored, golden, lambda: golden.visual(page, grid))
    assert any(name.startswith("visual.") for name in engine.formats)
    _round_inputs(golden, engine, torch.bfloat16)
    found = VisionOnnx(engine, tmp_path, torch.bfloat16)(page, grid)
    assert _noise_db(found, golden.visual(page, grid)) < -TOWER_DB


def _dequantized(engine: FinishedEngine) -> Model:
    """The dense fp32 model that stored codes and scales stand for."""

    def get(name: str) -> Tensor:
        linear, _, suffix = name.rpartition(".")
        format = engine.formats.get(linear)
        if format is None or suffix != "weight":
            return engine.get(name)
        suffixes = format.tensors(1, 128)
        parts = {part: engine.get(f"{linear}.{part}") for part in suffixes}
        return dequantize(format, parts, torch.float32)

    spec = engine.spec
    text = spec.text
    if text.tie_word_embeddings and "lm_head" in engine.formats:
        # A quantized head is a matrix of its own; the dense model keeps it so.
        spec = replace(spec, text=replace(text, tie_word_embeddings=False))
    return Model.from_tensors(spec, get)


def _linears(model: Model) -> list[tuple[list[str], Linear]]:
    """The linears of both towers, each with the canonical names of those that it joins."""
    towers = {"model.layers": model.decoder.layers, "visual.blocks": model.visual.blocks}
    merger = {"0": model.visual.merger_in, "2": model.visual.merger_out}
    found = [([f"visual.merger.mlp.{index}"], linear) for index, linear in merger.items()]
    for prefix, tower in towers.items():
        for name, module in tower.named_modules():
            if isinstance(module, Linear):
                index, _, rest = name.partition(".")
                parts = [f"{prefix}.{index}.{part}" for part in JOINED[prefix][rest]]
                found.append((parts, module))
    return found


def _calibrated(engine: FinishedEngine, model: Model, run: Callable[[], Tensor]) -> FinishedEngine:
    """The engine with the largest inputs that one run has, as calibration on it alone would."""
    seen: dict[str, float] = {}
    handles = []
    for names, linear in _linears(model):

        def observe(module: object, given: tuple[Tensor], names: list[str] = names) -> None:
            seen.update(dict.fromkeys(names, float(given[0].abs().max())))

        handles.append(linear.register_forward_pre_hook(observe))
    run()
    for handle in handles:
        handle.remove()
    return replace(engine, input_absmax=seen)


def _round_inputs(model: Model, engine: FinishedEngine, dtype: torch.dtype) -> None:
    """From now on, inputs of linears with quantized activations lie on the grid of their scale."""
    for names, linear in _linears(model):
        format = engine.formats.get(names[0])
        if format is not None and format.activations:
            top = engine.input_absmax[names[0]]
            linear.register_forward_pre_hook(_rounding(top, format, dtype))


def _rounding(
    top: float, format: Format, dtype: torch.dtype
) -> Callable[[object, tuple[Tensor]], tuple[Tensor]]:
    integer = format.weights == "int8"
    scale = float(torch.tensor(top / (INT8_MAX if integer else FP8_MAX), dtype=dtype))

    def hook(module: object, given: tuple[Tensor]) -> tuple[Tensor]:
        if integer:
            return ((given[0] / scale).round().clamp(-128, 127) * scale,)
        codes = (given[0] / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        return (codes.float() * scale,)

    return hook
