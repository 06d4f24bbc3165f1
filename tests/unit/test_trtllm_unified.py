"""ModelOpt checkpoints for the LLM API: as ModelOpt writes them, and readable back to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from helpers.exporting import quick_export
from helpers.for_tensorrt import MAX_PIXELS, write_untied
from helpers.unified_oracle import bytes_sha256
from mmr5_export.checkpoint import open_checkpoint
from mmr5_export.finished import open_finished
from mmr5_export.options import OptionError
from mmr5_export.prequantized import open_quantized
from mmr5_export.processor import pixel_budget
from mmr5_export.trtllm.unified import (
    EXCLUDED,
    limited,
    linear_parts,
    planned_tensors,
    quant_config,
    write_unified,
)
from mmr5_kernels.layout import FP8, INT4, Format
from mmr5_runtime.artifact import TensorReader, read_manifest
from mmr5_runtime.manifest import PixelRange
from mmr5_runtime.spec import ModelSpec, canonical_name, decoder_linear_shapes

GOLDEN = Path(__file__).parents[1] / "golden" / "modelopt" / "unified"
FORMATS = {"w4a16": INT4, "fp8": FP8}
QUANTS = {"w4a16": "int4", "fp8": "fp8"}
DTYPES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}
cases = pytest.mark.parametrize("case", FORMATS)


def golden(case: str, file: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / case / file).read_text())
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untied(tmp_path_factory.mktemp("untied"))


def written(checkpoint: Path, folder: Path, quant: str, **options: Any) -> Path:
    """An engine of the checkpoint, and in its folder ``api`` what the LLM API reads."""
    quick_export(checkpoint, quant, folder, max_pixels=MAX_PIXELS, **options)
    engine = open_finished(folder, open_checkpoint(checkpoint).read)
    write_unified(engine, folder / "api", max_file_bytes=300_000)
    return folder / "api"


@cases
def test_names_dtypes_and_shapes_are_those_of_modelopt(case: str) -> None:
    spec = ModelSpec.from_hf_config(golden(case, "config.json"))
    planned = {
        tensor.name: {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        for tensor in planned_tensors(spec, FORMATS[case])
    }
    expected = {
        name: {key: entry[key] for key in ("dtype", "shape")}
        for name, entry in golden(case, "tensors.json").items()
    }
    assert planned == expected


@cases
def test_the_bytes_are_those_of_modelopt_for_its_codes_and_scales(case: str) -> None:
    values, expected = load_file(GOLDEN / case / "values.safetensors"), golden(case, "tensors.json")
    linears = sorted({name.rpartition(".")[0] for name in values})
    assert len(linears) == 7
    for linear in linears:
        stored = {
            name.rpartition(".")[2]: tensor
            for name, tensor in values.items()
            if name.startswith(f"{linear}.")
        }
        parts = linear_parts(linear, FORMATS[case], stored)
        for suffix in ("weight", "weight_scale"):
            found = bytes_sha256(parts[suffix])
            assert found == expected[f"{linear}.{suffix}"]["sha256"], f"{linear}.{suffix}"
        assert f"{linear}.pre_quant_scale" in expected or "pre_quant_scale" not in parts


@cases
def test_the_configs_say_what_those_of_modelopt_say(case: str, tmp_path: Path) -> None:
    theirs, ours = golden(case, "hf_quant_config.json"), quant_config(FORMATS[case])
    left_out = theirs["quantization"].pop("exclude_modules")
    assert set(left_out) <= set(EXCLUDED)
    assert ours["quantization"].pop("exclude_modules") == list(EXCLUDED)
    assert ours == theirs


@cases
def test_config_json_has_the_same_keys_on_quantization(
    case: str, checkpoint: Path, tmp_path: Path
) -> None:
    folder = written(checkpoint, tmp_path / "engine", QUANTS[case])
    theirs = golden(case, "config.json")["quantization_config"]
    config = json.loads((folder / "config.json").read_text())
    ours = config["quantization_config"]
    assert list(ours) == list(theirs)
    assert {**ours, "ignore": 0} == {**theirs, "ignore": 0}
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    source = json.loads((checkpoint / "config.json").read_text())
    assert "quantization_config" not in source
    assert config["text_config"]["vocab_size"] == source["text_config"]["vocab_size"]


def test_int4_reads_back_to_the_very_codes_and_scales(checkpoint: Path, tmp_path: Path) -> None:
    folder = written(checkpoint, tmp_path / "engine", "int4")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    manifest = read_manifest(tmp_path / "engine")
    opened = open_quantized(folder)
    linears = decoder_linear_shapes(manifest.spec)
    assert opened.formats == dict.fromkeys(linears, Format("int4", 128, scale="fp32"))
    with TensorReader(tmp_path / "engine", manifest) as reader:
        for linear in linears:
            parts = opened.parts(linear)
            packed, scale = parts["weight_packed"], parts["weight_scale"]
            assert torch.equal(packed, reader.get(f"{linear}.weight_packed"))
            assert torch.equal(scale, reader.get(f"{linear}.weight_scale").float())
        for name in ("model.norm.weight", "model.embed_tokens.weight", "visual.merger.mlp.0.bias"):
            assert torch.equal(opened.read(name), reader.get(name))
    source = open_checkpoint(checkpoint)
    assert torch.equal(opened.read("lm_head.weight"), source.read("lm_head.weight"))


def test_an_engine_made_from_it_computes_with_the_same_numbers(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = written(checkpoint, tmp_path / "engine", "int4", lm_head="bf16")
    quick_export(folder, None, tmp_path / "again", method=None, verify=True)  # type: ignore[arg-type]
    first, again = tensors(tmp_path / "engine"), tensors(tmp_path / "again")
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor.float(), again[name].float()), name


def test_fp8_keeps_codes_and_one_scale_per_row(checkpoint: Path, tmp_path: Path) -> None:
    folder = written(checkpoint, tmp_path / "engine", "fp8")
    own, found = tensors(tmp_path / "engine"), tensors(folder)
    for linear in decoder_linear_shapes(read_manifest(tmp_path / "engine").spec):
        codes = found[f"{linear}.weight"]
        assert torch.equal(codes.view(torch.int8), own[f"{linear}.weight"].view(torch.int8))
        assert torch.equal(found[f"{linear}.weight_scale"], own[f"{linear}.weight_scale"][:, 0])


def test_a_quantized_tower_and_head_are_written_as_the_source_has_them(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = written(checkpoint, tmp_path / "engine", "int4", quantize_vision="int8")
    source, found = tensors(checkpoint), tensors(folder)
    names = [name for name in source if name.startswith(("visual.", "lm_head."))]
    assert any(name.endswith("mlp.gate_proj.bias") for name in names)
    for name in names:
        assert torch.equal(source[name], found[name]), name


def test_old_names_whatever_the_source_calls_them(tmp_path: Path) -> None:
    names = []
    for layout in ("new", "old"):
        source = write_untied(tmp_path / layout, layout)
        folder = written(source, tmp_path / f"{layout}-engine", "int4")
        found: set[str] = set()
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as reader:
                found |= set(reader.keys())
        names.append(found)
        assert all(
            name.startswith(("visual.", "model.layers.", "model.", "lm_head.")) for name in found
        )
        assert not any("language_model" in name for name in found)
    assert names[0] == names[1]


def test_an_engine_without_its_source_and_with_a_quantized_head_is_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    quick_export(checkpoint, "int4", tmp_path / "engine", max_pixels=MAX_PIXELS)
    with pytest.raises(OptionError, match=r"lm_head in 16 bits.*original bf16 checkpoint\.$"):
        write_unified(open_finished(tmp_path / "engine"), tmp_path / "api")
    assert not (tmp_path / "api").exists()


def test_the_pixel_budget_is_written_wherever_a_processor_keeps_one() -> None:
    budget = PixelRange(3136, 37632)
    edges = {"shortest_edge": 3136, "longest_edge": 12845056}
    flat = {"image_mean": [0.5] * 3, "size": edges, "max_pixels": 12845056, "min_pixels": 9}
    given = {"image_processor": flat, "processor_class": "P", "size": None}
    kept = json.loads(json.dumps(given))
    expected = {
        "image_mean": [0.5] * 3,
        "size": {"shortest_edge": 3136, "longest_edge": 37632},
        "max_pixels": 37632,
        "min_pixels": 3136,
    }
    assert limited(flat, budget) == expected
    assert limited(given, budget) == {**given, "image_processor": expected}
    assert pixel_budget(limited(flat, budget)) == budget
    assert limited({"processor_class": "P"}, budget) == {"processor_class": "P"}
    assert given == kept  # nothing is changed in place


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= {canonical_name(name): tensor for name, tensor in load_file(file).items()}
    return found
