"""A TensorRT-LLM checkpoint, read back, computes what the engine it was made from computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.exporting import write_samples
from helpers.inputs import GRIDS, random_pages, random_prompt
from helpers.tiny import make_hf_model, read_tensors, tiny_configs, write_checkpoint
from helpers.trtllm_checkpoint import EngineCheckpoint
from mmr5_export import export
from mmr5_export.finished import FinishedEngine, open_finished
from mmr5_export.options import ExportOptions
from mmr5_export.trtllm.engine_checkpoint import WEIGHTS_NAME, write_engine_checkpoint
from mmr5_kernels.reference import dequantize, sqnr_db
from mmr5_runtime.model import Model, embed_prompt, prefill
from mmr5_runtime.rope import mrope_positions
from mmr5_runtime.spec import decoder_linear_shapes

VOCABULARY = 576  # a multiple of 64, which int4 needs
ENGINES: dict[str, dict[str, Any]] = {
    "gptq": {"quant": "int4"},
    "awq": {"quant": "int4", "method": "awq", "lm_head": "int4"},
    "int8": {"quant": "int8"},
    "fp8": {"quant": "fp8", "lm_head": "bf16"},
    "bf16": {"quant": "bf16"},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_configs()["int4"]
    config.text_config.vocab_size = VOCABULARY
    folder = tmp_path_factory.mktemp("checkpoint")
    return write_checkpoint(make_hf_model(config, seed=4), folder, dtype=torch.bfloat16)


@pytest.fixture(scope="module", params=ENGINES)
def engine(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> FinishedEngine:
    options = dict(ENGINES[request.param])
    quant, root = options.pop("quant"), tmp_path_factory.mktemp(request.param)
    if quant in ("int4", "int8"):
        options["calib_data"] = write_samples(root / "data", 6, responses=True)
        options["calib_samples"] = 3
    made = export(checkpoint, quant, root / "engine", ExportOptions(verify=False, **options))
    absmax = made.report["input_absmax"]
    if quant == "fp8":  # which an export does not calibrate unasked
        absmax = dict.fromkeys(decoder_linear_shapes(made.spec), 8.0)
    return open_finished(root / "engine", read_tensors(checkpoint).__getitem__, absmax)


def fake_quantized(engine: FinishedEngine) -> dict[str, Tensor]:
    """The tensors of a dense model that computes with the quantized weights of the engine.

    Of fp8, those of the original rounded with one scale per weight, as the checkpoint has it.
    """
    found: dict[str, Tensor] = {}
    for name in engine.manifest.tensors:
        linear, _, suffix = name.rpartition(".")
        format = engine.formats.get(linear)
        if format is None or suffix == "bias":
            found[name] = engine.get(name)
        elif suffix == "weight_scale" and linear != "lm_head":
            parts = {part: engine.get(f"{linear}.{part}") for part in format.tensors(128, 128)}
            found[f"{linear}.weight"] = dequantize(format, parts, torch.float32)
    assert engine.original is not None
    found["lm_head.weight"] = engine.original("lm_head.weight")
    if engine.manifest.quant.name == "fp8":
        found |= fp8_by_tensor(engine.original, engine.spec.text.num_layers)
    return found


def fp8_by_tensor(original: Callable[[str], Tensor], layers: int) -> dict[str, Tensor]:
    """The linears of the decoder with one scale for all that are read from one input."""
    attention, mlp = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    groups = [("self_attn", attention), ("self_attn", ("o_proj",)), ("mlp", mlp)]
    found = {}
    for layer in range(layers):
        for block, members in (*groups, ("mlp", ("down_proj",))):
            names = [f"model.layers.{layer}.{block}.{member}.weight" for member in members]
            weights = [original(name).float() for name in names]
            scale = torch.cat(weights).abs().max() / 448
            for name, weight in zip(names, weights, strict=True):
                found[name] = (weight / scale).to(torch.float8_e4m3fn).float() * scale
    return found


@torch.no_grad()
def logits(engine: FinishedEngine, decoder: dict[str, Tensor]) -> Tensor:
    """Logits [T, V] of a prompt of several pages, in fp32, with this decoder."""
    tower = {name: engine.get(name) for name in engine.manifest.tensors if "visual." in name}
    model = Model.from_tensors(engine.spec, (tower | decoder).__getitem__, {})
    ids, pages = random_prompt(model.spec, GRIDS, 3), random_pages(model.spec, GRIDS, 3)
    embeds = embed_prompt(
        model, ids, [model.visual(page, grid) for page, grid in zip(pages, GRIDS, strict=True)]
    )
    positions, _ = mrope_positions(ids, GRIDS, model.spec)
    return prefill(model, embeds, positions, model.new_arena(len(ids)), all_logits=True)


def test_logits_are_those_of_the_fake_quantized_model(
    engine: FinishedEngine, tmp_path: Path
) -> None:
    """Not a bit differs in bfloat16, the dtype of the engine's dense tensors."""
    write_engine_checkpoint(engine, tmp_path, "bfloat16")
    found = dict(EngineCheckpoint(tmp_path, engine.spec).weights())
    expected = fake_quantized(engine)
    for name, tensor in found.items():
        assert torch.equal(tensor.float(), expected[name].float()), name
    assert torch.equal(logits(engine, found), logits(engine, expected))


def test_float16_rounds_only_what_is_nearly_zero(engine: FinishedEngine, tmp_path: Path) -> None:
    """bf16 has fewer digits than float16, but its small numbers reach further down."""
    write_engine_checkpoint(engine, tmp_path)
    found = dict(EngineCheckpoint(tmp_path, engine.spec).weights())
    expected = fake_quantized(engine)
    for name, tensor in found.items():
        assert (tensor.float() - expected[name].float()).abs().max() <= 2.0**-25, name
    assert sqnr_db(logits(engine, expected), logits(engine, found)) > 60


def test_static_scales_reach_the_largest_input_of_calibration(
    engine: FinishedEngine, tmp_path: Path
) -> None:
    facts = write_engine_checkpoint(engine, tmp_path)
    scales = {
        name.removesuffix(".activation_scaling_factor"): float(tensor)
        for name, tensor in load_file(tmp_path / WEIGHTS_NAME).items()
        if name.endswith(".activation_scaling_factor")
    }
    steps = {"W8A8_SQ_PER_CHANNEL": 127, "FP8": 448}.get(facts["quant_algo"])
    assert bool(scales) == (steps is not None)
    if steps is not None:
        largest = engine.input_absmax["model.layers.2.mlp.down_proj"]
        assert scales["transformer.layers.2.mlp.proj"] * steps == pytest.approx(largest, rel=1e-6)
        assert len(scales) == 5 * engine.spec.text.num_layers


def test_a_calibrated_export_keeps_the_largest_inputs(engine: FinishedEngine) -> None:
    kept = engine.manifest.report["input_absmax"]
    layers = json.loads((engine.folder / "report.json").read_text())["layers"]
    calibrated = engine.manifest.quant.calibration is not None
    assert set(kept) == (set(decoder_linear_shapes(engine.spec)) if calibrated else set())
    for name, largest in kept.items():
        assert layers[name]["input_absmax"] == largest > 0
    for layer in range(engine.spec.text.num_layers if calibrated else 0):
        own = [f"model.layers.{layer}.self_attn.{part}_proj" for part in "qkv"]
        assert len({kept[name] for name in own}) == 1
