"""A quantized checkpoint of another tool becomes an engine that computes the same.

Each layout is written from codes that are known; the golden is the dense model that holds the
weights those codes stand for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.foreign import (
    Parts,
    awq_config,
    coarse,
    decoder,
    gptq_config,
    packed_config,
    rtn,
    w8a8_config,
    write_quantized,
)
from helpers.inputs import GRIDS, random_pages, random_prompt
from helpers.tiny import read_spec, read_tensors
from mmr5_export.prequantized import QuantizedCheckpoint, is_quantized, open_quantized
from mmr5_export.quantize import quantize_linear
from mmr5_kernels.layout import FP8, INT8, INT8_WEIGHT_ONLY, Format
from mmr5_kernels.reference import dequantize
from mmr5_runtime.model import Model, embed_prompt, prefill
from mmr5_runtime.rope import mrope_positions
from mmr5_runtime.spec import linear_shapes, pad_vision, vision_linear_shapes
from mmr5_runtime.types import CheckpointError

INT4_32 = Format("int4", 32)
ASYM_64 = Format("int4", 64, symmetric=False)


def as_fp16(format: Format) -> Format:
    return Format(format.weights, format.group_size, format.symmetric, None, "fp16")


# layout, quantization_config, format to round to, format of the engine
WEIGHT_ONLY: list[Any] = [
    pytest.param("pack-quantized", packed_config(4, 128), Format("int4", 128), id="ct-g128"),
    pytest.param("pack-quantized", packed_config(4, 32), INT4_32, id="ct-g32"),
    pytest.param("pack-quantized", packed_config(4, 64, False), ASYM_64, id="ct-asym"),
    pytest.param("pack-quantized", packed_config(8, None), INT8_WEIGHT_ONLY, id="ct-w8"),
    pytest.param("pack-quantized", packed_config(8, 64), Format("int8", 64), id="ct-w8-g64"),
    pytest.param("gptq", gptq_config(4, 32, True), as_fp16(INT4_32), id="gptq"),
    pytest.param("gptq", gptq_config(4, 64, False), as_fp16(ASYM_64), id="gptq-asym"),
    pytest.param("gptq", gptq_config(8, 64, True), as_fp16(Format("int8", 64)), id="gptq-w8"),
    pytest.param("gptq", gptq_config(8, -1, True), as_fp16(INT8_WEIGHT_ONLY), id="gptq-row"),
    pytest.param(
        "gptq_v2",
        gptq_config(4, 64, False, checkpoint_format="gptq_v2"),
        as_fp16(ASYM_64),
        id="gptq-v2",
    ),
    pytest.param("awq", awq_config(64), as_fp16(ASYM_64), id="awq"),
    pytest.param(
        "modelopt",
        {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 128},
        Format("int4", 128, scale="fp32"),
        id="modelopt",
    ),
]


def known_parts(source: Path, format: Format) -> Parts:
    """Codes of every decoder linear; scales and zero points are of the kind ``format`` keeps."""
    plain = Format(format.weights, format.group_size, activations=format.activations)
    parts = rtn(source, decoder(source, plain))
    if format == as_fp16(INT8_WEIGHT_ONLY):
        # Rounding here leaves -128 out, others do not.
        for stored in parts.values():
            stored["weight"][::3, ::5] = -128
    if format.scale == "fp32":
        return {
            linear: {**stored, "weight_scale": stored["weight_scale"].float()}
            for linear, stored in parts.items()
        }
    if format.scale == "fp16" or not format.symmetric:
        parts = coarse(parts, zeros=not format.symmetric)
    if format.scale == "bf16":
        for stored in parts.values():
            stored["weight_scale"] = stored["weight_scale"].to(torch.bfloat16)
    return parts


def engine_model(opened: QuantizedCheckpoint) -> Model:
    """The engine's model of an opened checkpoint, in memory."""
    stored = {name: opened.parts(name) for name in opened.formats}

    def get(name: str) -> Tensor:
        linear, _, suffix = name.rpartition(".")
        if suffix in stored.get(linear, {}):
            return stored[linear][suffix]
        found = opened.read(name)
        return pad_vision(name, found, opened.spec) if linear in stored else found

    return Model.from_tensors(opened.spec, get, opened.formats)


def dense_model(source: Path, parts: Parts, format: Format) -> Model:
    """The dense model whose decoder linears hold what ``parts`` stand for."""
    tensors = read_tensors(source)
    for linear, stored in parts.items():
        tensors[f"{linear}.weight"] = dequantize(format, stored, torch.float32)
    return Model.from_tensors(read_spec(source), tensors.__getitem__)


@torch.no_grad()
def logits(model: Model) -> Tensor:
    """[T, V] on one prompt with pages."""
    ids, pages = random_prompt(model.spec, GRIDS, 3), random_pages(model.spec, GRIDS, 3)
    visual = [model.visual(page, grid) for page, grid in zip(pages, GRIDS, strict=True)]
    positions, _ = mrope_positions(ids, GRIDS, model.spec)
    embeds = embed_prompt(model, ids, visual)
    return prefill(model, embeds, positions, model.new_arena(len(ids)), all_logits=True)


@pytest.mark.parametrize(("layout", "config", "format"), WEIGHT_ONLY)
def test_an_import_gives_the_logits_of_its_dequantized_weights(
    tiny_checkpoint: Path, tmp_path: Path, layout: str, config: dict[str, Any], format: Format
) -> None:
    parts, formats = known_parts(tiny_checkpoint, format), decoder(tiny_checkpoint, format)
    folder = write_quantized(tiny_checkpoint, tmp_path / layout, layout, config, formats, parts)
    assert is_quantized(folder) and not is_quantized(tiny_checkpoint)
    opened = open_quantized(folder)
    assert opened.formats == formats
    assert opened.weight_files == ["model.safetensors"]
    for linear, stored in parts.items():
        found = opened.parts(linear)
        shapes = {suffix: (tuple(part.shape), part.dtype) for suffix, part in found.items()}
        assert shapes == format.tensors(*linear_shapes(opened.spec)[linear])
        assert all(torch.equal(found[suffix], part) for suffix, part in stored.items()), linear
    golden = logits(dense_model(tiny_checkpoint, parts, format))
    assert (logits(engine_model(opened)) - golden).abs().max() <= 1e-5 * golden.abs().max()


@pytest.mark.parametrize(("kind", "format"), [("int", INT8), ("float", FP8)])
def test_an_import_of_8_bit_activations_is_the_engine_of_its_codes(
    tiny_checkpoint: Path, tmp_path: Path, kind: str, format: Format
) -> None:
    formats = decoder(tiny_checkpoint, format)
    parts = rtn(tiny_checkpoint, formats)
    folder = write_quantized(
        tiny_checkpoint, tmp_path / kind, "plain", w8a8_config(kind), formats, parts
    )
    opened = open_quantized(folder)
    assert opened.formats == formats
    tensors = read_tensors(tiny_checkpoint) | {
        f"{linear}.{suffix}": part
        for linear, stored in parts.items()
        for suffix, part in stored.items()
    }
    golden = Model.from_tensors(opened.spec, tensors.__getitem__, formats)
    assert torch.equal(logits(engine_model(opened)), logits(golden))


def test_an_int4_scale_per_row_is_repeated(tiny_checkpoint: Path, tmp_path: Path) -> None:
    format = Format("int4", 128, scale="fp16")
    parts, formats = known_parts(tiny_checkpoint, format), decoder(tiny_checkpoint, format)
    for stored in parts.values():
        stored["weight_scale"] = stored["weight_scale"][:, :1].expand_as(stored["weight_scale"])
    # Written with one scale: the files hold only the first of the equal ones.
    change: dict[str, Tensor | None] = {}
    for linear, stored in parts.items():
        rows, columns = linear_shapes(read_spec(tiny_checkpoint))[linear]
        change[f"{linear}.scales"] = stored["weight_scale"][:, 0][None].clone()
        change[f"{linear}.qzeros"] = torch.full((1, rows // 8), 0x77777777, dtype=torch.int32)
        change[f"{linear}.g_idx"] = torch.zeros(columns, dtype=torch.int32)
    folder = write_quantized(
        tiny_checkpoint, tmp_path / "row", "gptq", gptq_config(4, -1, True), formats, parts, change
    )
    opened = open_quantized(folder)
    assert opened.formats == formats
    for linear, stored in parts.items():
        assert torch.equal(opened.parts(linear)["weight_scale"], stored["weight_scale"])
    golden = logits(dense_model(tiny_checkpoint, parts, format))
    assert (logits(engine_model(opened)) - golden).abs().max() <= 1e-5 * golden.abs().max()


@pytest.mark.parametrize(("kind", "format"), [("int", INT8), ("float", FP8)])
def test_a_quantized_tower_is_padded_as_an_engine_keeps_it(
    tiny_checkpoint: Path, tmp_path: Path, kind: str, format: Format
) -> None:
    spec = read_spec(tiny_checkpoint)
    assert spec.vision.padded_intermediate > spec.vision.intermediate_size
    formats = decoder(tiny_checkpoint, format) | dict.fromkeys(vision_linear_shapes(spec), format)
    parts = rtn(tiny_checkpoint, formats)
    config = {**w8a8_config(kind), "ignore": ["lm_head"]}
    folder = write_quantized(tiny_checkpoint, tmp_path / kind, "plain", config, formats, parts)
    opened = open_quantized(folder)
    assert opened.formats == formats
    shapes = linear_shapes(spec, formats)
    for linear, stored in parts.items():
        found = opened.parts(linear)
        for suffix, (shape, dtype) in format.tensors(*shapes[linear]).items():
            assert (tuple(found[suffix].shape), found[suffix].dtype) == (shape, dtype)
        rows, columns = stored["weight"].shape
        weight = dequantize(format, found, torch.float32)
        assert torch.equal(weight[:rows, :columns], dequantize(format, stored, torch.float32))
        assert not weight[rows:].any() and not weight[:, columns:].any()
    tensors = {
        name: pad_vision(name, tensor, spec) if name.rpartition(".")[0] in formats else tensor
        for name, tensor in read_tensors(tiny_checkpoint).items()
    }
    for linear in formats:
        weight = tensors.pop(f"{linear}.weight")
        for suffix, part in quantize_linear(weight, format)[0].items():
            tensors[f"{linear}.{suffix}"] = part
    golden = Model.from_tensors(spec, tensors.__getitem__, formats)
    assert torch.equal(logits(engine_model(opened)), logits(golden))


def test_a_tower_without_quantized_activations_is_refused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    formats = dict.fromkeys(vision_linear_shapes(read_spec(tiny_checkpoint)), INT8_WEIGHT_ONLY)
    config = {**packed_config(8, None), "ignore": ["lm_head"]}
    parts = rtn(tiny_checkpoint, formats)
    folder = write_quantized(
        tiny_checkpoint, tmp_path / "tower", "pack-quantized", config, formats, parts
    )
    with pytest.raises(CheckpointError, match=r"visual\.blocks\.0\.attn\.qkv .* no weight-only"):
        open_quantized(folder)


def test_a_quantized_head_is_taken_over(tiny_checkpoint: Path, tmp_path: Path) -> None:
    formats = {"lm_head": as_fp16(INT4_32)}
    parts = coarse(rtn(tiny_checkpoint, {"lm_head": INT4_32}), zeros=False)
    config = gptq_config(4, 32, True, lm_head=True)
    folder = write_quantized(tiny_checkpoint, tmp_path / "head", "gptq", config, formats, parts)
    opened = open_quantized(folder)
    assert opened.formats == formats
    golden = logits(dense_model(tiny_checkpoint, parts, formats["lm_head"]))
    assert (logits(engine_model(opened)) - golden).abs().max() <= 1e-5 * golden.abs().max()


def test_the_newer_naming_and_dense_fp16_are_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    format = as_fp16(ASYM_64)
    parts, formats = known_parts(tiny_checkpoint, format), decoder(tiny_checkpoint, format)
    folder = write_quantized(
        tiny_checkpoint, tmp_path / "awq", "awq", awq_config(64), formats, parts
    )
    path = folder / "model.safetensors"
    renamed = {
        name.replace("visual.", "model.visual.", 1)
        if name.startswith("visual.")
        else name.replace("model.", "model.language_model.", 1): tensor.half()
        if tensor.dtype == torch.bfloat16
        else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(renamed, path)
    opened = open_quantized(folder)
    assert opened.read("model.norm.weight").dtype == torch.float16
    for linear, stored in parts.items():
        found = opened.parts(linear)
        assert all(torch.equal(found[suffix], part) for suffix, part in stored.items())
