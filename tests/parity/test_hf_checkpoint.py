"""The written checkpoint loads with transformers' own loader and computes what was quantized.

The golden is the dense transformers model in fp32 that holds the weights our stored tensors stand
for. Activations are quantized by readers in their own arithmetic, so W8A8 is held weight by weight.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from helpers.foreign import Parts, decoder, rtn
from helpers.inputs import GRIDS, hf_inputs, random_pages, random_prompt
from helpers.tiny import Layout, make_hf_model, read_spec, read_tensors, tiny_configs
from helpers.tiny import write_checkpoint as write_checkpoint_folder
from mmr5_export.checkpoint import open_checkpoint
from mmr5_export.hf_checkpoint import check_target, quantization_config, write_checkpoint
from mmr5_export.prequantized import open_quantized
from mmr5_kernels.layout import FP8, INT4, INT8, INT8_WEIGHT_ONLY, Format
from mmr5_kernels.reference import dequantize
from mmr5_runtime.model import Model, embed_prompt, prefill
from mmr5_runtime.rope import mrope_positions
from mmr5_runtime.spec import ModelSpec, linear_names
from mmr5_runtime.types import CheckpointError, ExportError

_REASON = "compressed-tensors comes with the export extra"
library = pytest.importorskip("compressed_tensors.quantization", reason=_REASON)
matching = pytest.importorskip("compressed_tensors.utils.match", reason=_REASON)

ASYM_32 = Format("int4", 32, symmetric=False)


def mixed(folder: Path) -> dict[str, Format]:
    """int4, but sensitive linears in 8 bit and one layer's o_proj dense."""
    formats = decoder(folder, INT4)
    for name in list(formats):
        if name.endswith("down_proj"):
            formats[name] = INT8_WEIGHT_ONLY
        elif name.startswith("model.layers.1.self_attn."):
            formats[name] = FP8
    del formats["model.layers.2.self_attn.o_proj"]
    return formats


SCHEMES = {
    "int4": lambda folder: decoder(folder, INT4),
    "int4-asym": lambda folder: decoder(folder, ASYM_32),
    "int8-weight-only": lambda folder: decoder(folder, INT8_WEIGHT_ONLY),
    "int8": lambda folder: decoder(folder, INT8),
    "fp8": lambda folder: decoder(folder, FP8),
    "mixed": mixed,
}


def write(source: Path, folder: Path, formats: dict[str, Format], **other: Any) -> Parts:
    """Writes the rounded checkpoint and returns what it holds."""
    checkpoint = open_checkpoint(source)
    parts = rtn(source, formats)
    write_checkpoint(folder, checkpoint, formats, parts.__getitem__, checkpoint.read, **other)
    return parts


def load(folder: Path, wide: bool = True) -> Any:
    """The checkpoint as transformers loads it, in its own dtype, bf16.

    ``wide`` then turns it into fp32 before the first pass, which unpacks the weights: a code times
    a scale is exact in fp32 and rounded in bf16.
    """
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    # The class refuses to cast a quantized model, since that misleads with other quantizers.
    return torch.nn.Module.float(hf) if wide else hf


@torch.no_grad()
def logits(hf: Any, spec: ModelSpec) -> Tensor:
    ids, pages = random_prompt(spec, GRIDS, 3), random_pages(spec, GRIDS, 3)
    found: Tensor = hf(**hf_inputs(spec, ids, pages, GRIDS)).logits[0]
    return found


def golden(source: Path, formats: dict[str, Format], parts: Parts, wide: bool) -> Any:
    hf = load(source, wide)
    for linear, stored in parts.items():
        weight = dequantize(formats[linear], stored, hf.dtype)
        hf.get_submodule(in_transformers(linear)).weight.data = weight
    return hf


@torch.no_grad()
def engine_logits(source: Path, formats: dict[str, Format], parts: Parts) -> Tensor:
    """What our own model gives on the prompt of :func:`logits`."""
    spec, stored = read_spec(source), read_tensors(source)
    for linear, tensors in parts.items():
        stored |= {f"{linear}.{suffix}": part for suffix, part in tensors.items()}
    model = Model.from_tensors(spec, stored.__getitem__, formats)
    ids, pages = random_prompt(spec, GRIDS, 3), random_pages(spec, GRIDS, 3)
    visual = [model.visual(page, grid) for page, grid in zip(pages, GRIDS, strict=True)]
    positions, _ = mrope_positions(ids, GRIDS, spec)
    embeds = embed_prompt(model, ids, visual)
    return prefill(model, embeds, positions, model.new_arena(len(ids)), all_logits=True)


def in_transformers(linear: str) -> str:
    """Path of a linear in the module tree of transformers 5."""
    if linear.startswith("visual."):
        return f"model.{linear}"
    return linear.replace("model.layers", "model.language_model.layers")


def in_servers(linear: str) -> str:
    """Path of a linear in vLLM and SGLang, before they fuse any."""
    return linear.replace("model.layers", "language_model.model.layers")


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", ["int4", "int4-asym", "int8-weight-only"])
def test_transformers_gives_the_logits_of_what_was_written(
    tiny_checkpoint: Path, tmp_path: Path, name: str, wide: bool
) -> None:
    formats = SCHEMES[name](tiny_checkpoint)
    parts = write(tiny_checkpoint, tmp_path / "out", formats)
    spec = read_spec(tiny_checkpoint)
    found = logits(load(tmp_path / "out", wide), spec)
    assert torch.equal(found, logits(golden(tiny_checkpoint, formats, parts, wide), spec))


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_transformers_rounds_activations_per_token_as_the_config_says(
    tiny_checkpoint: Path, tmp_path: Path, name: str
) -> None:
    formats = SCHEMES[name](tiny_checkpoint)
    parts = write(tiny_checkpoint, tmp_path / "out", formats)
    spec, dense = read_spec(tiny_checkpoint), golden(tiny_checkpoint, formats, parts, True)
    for linear in formats:
        module = dense.get_submodule(in_transformers(linear))
        module.register_forward_pre_hook(lambda _, x: (rounded(x[0], name),))
    found = logits(load(tmp_path / "out"), spec)
    assert (found - logits(dense, spec)).abs().max() <= 1e-4 * found.abs().max()
    # Our engine's int8 steps are amax / 127, so about every value is rounded elsewhere.
    error = (found - engine_logits(tiny_checkpoint, formats, parts)).norm() / found.norm()
    assert error <= {"int8": 0.05, "fp8": 0.005}[name]


def rounded(x: Tensor, kind: str) -> Tensor:
    """Activations [..., K] as compressed-tensors rounds them: int8 has 255 steps for 2 amax."""
    largest = 127.5 if kind == "int8" else 448.0
    scale = x.abs().amax(dim=-1, keepdim=True) / largest
    if kind == "int8":
        return (x / scale).round().clamp(-128, 127) * scale
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize("layout", ["new", "old"])
@pytest.mark.parametrize("name", ["tied", "three_heads"])
def test_other_shapes_load_too(tmp_path: Path, name: str, layout: Layout) -> None:
    # Columns that do not fill words, a tied head, and the flat config of the hub.
    model = make_hf_model(tiny_configs()[name], seed=2)
    source = write_checkpoint_folder(model, tmp_path / "in", layout, dtype=torch.bfloat16)
    formats = decoder(source, INT8_WEIGHT_ONLY)
    parts = write(source, tmp_path / "out", formats)
    spec = read_spec(source)
    expected = logits(golden(source, formats, parts, True), spec)
    assert torch.equal(logits(load(tmp_path / "out"), spec), expected)
    opened = open_quantized(tmp_path / "out")
    assert all(
        torch.equal(opened.parts(linear)["weight"], stored["weight"])
        for linear, stored in parts.items()
    )


@pytest.mark.parametrize("name", list(SCHEMES))
def test_transformers_unpacks_every_weight_and_no_other(
    tiny_checkpoint: Path, tmp_path: Path, name: str
) -> None:
    formats = SCHEMES[name](tiny_checkpoint)
    parts = write(tiny_checkpoint, tmp_path / "out", formats)
    hf, source = load(tmp_path / "out"), read_tensors(tiny_checkpoint)
    logits(hf, read_spec(tiny_checkpoint))  # the first pass unpacks
    for linear in linear_names(read_spec(tiny_checkpoint)):
        module = hf.get_submodule(in_transformers(linear))
        expected = source[f"{linear}.weight"].float()
        if linear in formats:
            expected = dequantize(formats[linear], parts[linear], torch.float32)
        assert torch.equal(module.weight, expected), linear
        assert hasattr(module, "quantization_scheme") == (linear in formats), linear


@pytest.mark.parametrize("name", list(SCHEMES))
def test_the_written_codes_come_back_as_an_engines(
    tiny_checkpoint: Path, tmp_path: Path, name: str
) -> None:
    formats = SCHEMES[name](tiny_checkpoint)
    parts = write(tiny_checkpoint, tmp_path / "out", formats)
    opened, source = open_quantized(tmp_path / "out"), read_tensors(tiny_checkpoint)
    assert opened.formats == formats
    for linear, stored in parts.items():
        found = opened.parts(linear)
        assert set(found) == set(stored)
        for suffix, part in stored.items():
            same = found[suffix].view(torch.uint8), part.contiguous().view(torch.uint8)
            assert torch.equal(*same), (linear, suffix)
    for tensor in source:
        if tensor.removesuffix(".weight") not in formats:
            assert torch.equal(opened.read(tensor), source[tensor]), tensor


@pytest.mark.parametrize("name", list(SCHEMES))
def test_the_config_validates_and_names_just_the_quantized_linears(
    tiny_checkpoint: Path, name: str
) -> None:
    formats, spec = SCHEMES[name](tiny_checkpoint), read_spec(tiny_checkpoint)
    config = quantization_config(spec, formats)
    json.dumps(config)
    valid = library.QuantizationConfig.model_validate(config)
    assert valid.quantization_status == library.QuantizationStatus.COMPRESSED
    for linear in linear_names(spec):
        for named in (linear, in_transformers(linear), in_servers(linear)):
            ignored = any(matching.match_name(named, entry) for entry in valid.ignore)
            targeting = [
                group
                for group in valid.config_groups.values()
                if not ignored
                and any(t == "Linear" or matching.match_name(named, t) for t in group.targets)
            ]
            assert len(targeting) == (linear in formats), named
            if linear in formats:
                weights = targeting[0].weights
                assert weights.num_bits == (4 if formats[linear].weights == "int4" else 8)
                assert weights.symmetric == formats[linear].symmetric
                assert weights.group_size == formats[linear].group_size
                assert bool(targeting[0].input_activations) == bool(formats[linear].activations)


def test_each_format_has_a_group_with_its_layout(tiny_checkpoint: Path) -> None:
    config = quantization_config(read_spec(tiny_checkpoint), mixed(tiny_checkpoint))
    assert config["format"] == "mixed-precision"
    groups = config["config_groups"].values()
    assert sorted((group["format"], group["weights"]["num_bits"]) for group in groups) == [
        ("float-quantized", 8),
        ("pack-quantized", 4),
        ("pack-quantized", 8),
    ]
    (dense,) = (entry for entry in config["ignore"] if "o_proj" in entry)
    assert re.match(dense[3:], "model.language_model.layers.2.self_attn.o_proj")
    assert not re.match(dense[3:], "model.language_model.layers.12.self_attn.o_proj.x")


def test_the_head_and_the_tower_stay_dense(tiny_checkpoint: Path, tmp_path: Path) -> None:
    spec = read_spec(tiny_checkpoint)
    formats = decoder(tiny_checkpoint, INT4)
    more = {name: INT8 for name in linear_names(spec) if name.startswith("visual.")}
    checkpoint, parts = open_checkpoint(tiny_checkpoint), rtn(tiny_checkpoint, formats)
    write_checkpoint(
        tmp_path / "out",
        checkpoint,
        {**formats, **more, "lm_head": INT8_WEIGHT_ONLY},
        parts.__getitem__,
        checkpoint.read,
    )
    opened = open_quantized(tmp_path / "out")
    assert opened.formats == formats
    assert opened.read("lm_head.weight").dtype == torch.bfloat16
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head", "re:.*visual.*"]
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]


def test_shards_have_an_index_and_give_the_same(tiny_checkpoint: Path, tmp_path: Path) -> None:
    formats = decoder(tiny_checkpoint, INT4)
    write(tiny_checkpoint, tmp_path / "one", formats)
    write(tiny_checkpoint, tmp_path / "many", formats, max_file_bytes=100_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    one, many = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "many")
    assert set(one) == set(many) == set(index["weight_map"])
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    spec = read_spec(tiny_checkpoint)
    assert torch.equal(logits(load(tmp_path / "one"), spec), logits(load(tmp_path / "many"), spec))


def test_everything_but_the_weights_is_taken_over(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write(tiny_checkpoint, tmp_path / "out", decoder(tiny_checkpoint, INT4))
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
    assert read_spec(tmp_path / "out") == read_spec(tiny_checkpoint)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for block in (config, config["text_config"], config["vision_config"]):
        assert block.get("dtype", block.get("torch_dtype")) in (None, "bfloat16")


def test_nothing_quantized_is_an_ordinary_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write(tiny_checkpoint, tmp_path / "out", {})
    found, source = open_checkpoint(tmp_path / "out"), read_tensors(tiny_checkpoint)
    assert all(torch.equal(found.read(name), tensor) for name, tensor in source.items())


def test_equal_input_gives_equal_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tiny_checkpoint, tmp_path / name, mixed(tiny_checkpoint))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_folder_that_is_there_is_left_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="exists already"):
        write(tiny_checkpoint, tmp_path / "out", {})
    assert list((tmp_path / "out").iterdir()) == []


def test_scales_that_bf16_does_not_hold_are_refused_and_nothing_is_left(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    format = Format("int4", 128, scale="fp16")
    formats, checkpoint = decoder(tiny_checkpoint, format), open_checkpoint(tiny_checkpoint)
    parts = rtn(tiny_checkpoint, formats)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj .* bf16"):
        write_checkpoint(tmp_path / "out", checkpoint, formats, parts.__getitem__, checkpoint.read)
    assert list(tmp_path.iterdir()) == []


def test_pairs_that_are_misread_are_refused(tiny_checkpoint: Path) -> None:
    for target in ("transformers", "vllm", "sglang"):
        check_target(mixed(tiny_checkpoint), target)
    check_target(decoder(tiny_checkpoint, FP8), "tensorrt-llm")
    check_target({"lm_head": INT8_WEIGHT_ONLY}, "tensorrt-llm")  # written as bf16
    with pytest.raises(ExportError, match="takes 8-bit compressed-tensors weights for fp8"):
        check_target(decoder(tiny_checkpoint, INT8), "tensorrt-llm")
    with pytest.raises(ExportError, match="w4a16-g128, which TensorRT-LLM does not read"):
        check_target(decoder(tiny_checkpoint, INT4), "tensorrt-llm")
    with pytest.raises(ExportError, match="target 'tgi' is unknown"):
        check_target({}, "tgi")


def test_a_quantized_source_is_written_again_unless_its_head_is(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    write(tiny_checkpoint, tmp_path / "once", mixed(tiny_checkpoint))
    opened = open_quantized(tmp_path / "once")
    write_checkpoint(tmp_path / "twice", opened, opened.formats, opened.parts, opened.read)
    for path in (tmp_path / "once").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes()
    more = replace(opened, formats={**opened.formats, "lm_head": INT8_WEIGHT_ONLY})
    with pytest.raises(CheckpointError, match="lm_head of the source is quantized"):
        write_checkpoint(tmp_path / "new", more, opened.formats, opened.parts, opened.read)
