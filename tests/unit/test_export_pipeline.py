"""What a good export gives: the checkpoint's own values, every layout read alike, equal bytes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from helpers.exporting import quick_export
from helpers.tiny import make_hf_model, read_tensors, tiny_configs, write_checkpoint
from mmr5_export.checkpoint import open_checkpoint
from mmr5_export.quantize import quantize_linear
from mmr5_export.verify import summarize_sqnr
from mmr5_kernels.layout import FP8, INT4, INT8, INT8_WEIGHT_ONLY
from mmr5_runtime.artifact import (
    MANIFEST_NAME,
    Manifest,
    PixelRange,
    TensorReader,
    file_sha256,
    read_manifest,
    verify_hashes,
)
from mmr5_runtime.prompt import template_sha256

DECODER = {"int4": INT4, "int8": INT8, "int8-weight-only": INT8_WEIGHT_ONLY, "fp8": FP8}


def stored(engine: Path) -> dict[str, torch.Tensor]:
    with TensorReader(engine, manifest := read_manifest(engine)) as reader:
        return {name: reader.get(name) for name in manifest.tensors}


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir()}


def test_bf16_keeps_the_bits_of_the_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    manifest = quick_export(tiny_checkpoint, "bf16", tmp_path / "engine")
    source, found = read_tensors(tiny_checkpoint), stored(tmp_path / "engine")
    assert found.keys() == source.keys()
    assert all(torch.equal(found[name], source[name]) for name in source)
    assert manifest.formats == {} and manifest.quant.method == "none"
    assert manifest.report["sqnr_db"] == {} and summarize_sqnr(manifest) is None


@pytest.mark.parametrize("quant", DECODER)
def test_only_decoder_linears_and_the_head_are_quantized(
    quant: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    manifest = quick_export(tiny_checkpoint, quant, tmp_path / "engine")
    source, found = read_tensors(tiny_checkpoint), stored(tmp_path / "engine")
    assert len(manifest.formats) == 3 * 7 + 1
    for linear, format in manifest.formats.items():
        assert format == (INT8_WEIGHT_ONLY if linear == "lm_head" else DECODER[quant])
        weight = source.pop(f"{linear}.weight")
        wanted, _ = quantize_linear(weight, format)
        for suffix, tensor in wanted.items():
            assert torch.equal(found.pop(f"{linear}.{suffix}"), tensor)
    assert found.keys() == source.keys()
    assert all(torch.equal(found[name], source[name]) for name in source)


def test_the_report_has_every_quantized_layer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    four = quick_export(tiny_checkpoint, "int4", tmp_path / "four")
    eight = quick_export(tiny_checkpoint, "int8", tmp_path / "eight")
    low, high = four.report["sqnr_db"], eight.report["sqnr_db"]
    assert low.keys() == high.keys() == four.formats.keys()
    # Four more bits are 24 dB; a channel's 128 or 256 values are at least as many as a group's.
    for name in low:
        assert 40 < (high[name] or 0) < 47
        assert 17 < (low[name] or 0) < 22 or (name == "lm_head" and low[name] == high[name])
    summary = summarize_sqnr(four)
    assert summary is not None
    assert summary.lowest_db == low[summary.lowest_layer] == min(v or 0 for v in low.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_float_checkpoints_are_stored_as_bf16(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_hf_model(tiny_configs()["int4"], seed=5)
    checkpoint = write_checkpoint(model, tmp_path / "checkpoint", dtype=dtype)
    quick_export(checkpoint, "int4", tmp_path / "engine")
    source, found = read_tensors(checkpoint), stored(tmp_path / "engine")
    dense = (source.keys() & found.keys()) - {"lm_head.weight"}
    assert "model.embed_tokens.weight" in dense
    assert all(torch.equal(found[name], source[name].to(torch.bfloat16)) for name in dense)
    # Codes come from the values of the source, not from their bf16 roundings.
    linear = "model.layers.0.mlp.down_proj"
    wanted, _ = quantize_linear(source[f"{linear}.weight"], INT4)
    assert torch.equal(found[f"{linear}.weight_packed"], wanted["weight_packed"])


@pytest.mark.parametrize("name", ["three_heads", "small_patches", "int4"])
def test_naming_and_sharding_of_the_source_do_not_matter(name: str, tmp_path: Path) -> None:
    model = make_hf_model(tiny_configs()[name], seed=6)
    engines = []
    for layout, shards in (("new", 1), ("old", 1), ("new", 3), ("old", 3)):
        folder = tmp_path / f"{layout}-{shards}"
        checkpoint = write_checkpoint(model, folder, layout, shards)  # type: ignore[arg-type]
        quick_export(checkpoint, "int8", tmp_path / f"{folder.name}-engine")
        engines.append(stored(tmp_path / f"{folder.name}-engine"))
    for other in engines[1:]:
        assert other.keys() == engines[0].keys()
        assert all(torch.equal(other[key], engines[0][key]) for key in other)


def test_a_tied_head_is_not_stored(tmp_path: Path) -> None:
    tied = {n: c for n, c in tiny_configs().items() if c.tie_word_embeddings}
    name, config = next(iter(tied.items()))
    checkpoint = write_checkpoint(make_hf_model(config), tmp_path / name)
    manifest = quick_export(checkpoint, "int8", tmp_path / "engine", lm_head="bf16")
    assert manifest.spec.text.tie_word_embeddings
    assert "lm_head.weight" not in manifest.tensors


def test_a_tied_head_is_quantized_from_the_embeddings(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(make_hf_model(tiny_configs()["tied"]), tmp_path / "checkpoint")
    manifest = quick_export(checkpoint, "int8", tmp_path / "engine")
    source, found = read_tensors(checkpoint), stored(tmp_path / "engine")
    embeddings = source["model.embed_tokens.weight"]
    assert torch.equal(found["model.embed_tokens.weight"], embeddings.to(torch.bfloat16))
    wanted, _ = quantize_linear(embeddings, INT8_WEIGHT_ONLY)
    assert all(torch.equal(found[f"lm_head.{suffix}"], wanted[suffix]) for suffix in wanted)
    assert manifest.formats["lm_head"] == INT8_WEIGHT_ONLY
    assert manifest.report["sqnr_db"]["lm_head"] > 35


def test_equal_input_gives_equal_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    twin = Path(shutil.copytree(tiny_checkpoint, tmp_path / "elsewhere" / tiny_checkpoint.name))
    quick_export(tiny_checkpoint, "int4", tmp_path / "one")
    quick_export(twin, "int4", tmp_path / "two")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_the_manifest_describes_the_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    made = quick_export(tiny_checkpoint, "int4", tmp_path / "engine")
    read = read_manifest(tmp_path / "engine")
    assert made == read
    verify_hashes(tmp_path / "engine", read)
    assert read.source.name == tiny_checkpoint.name and read.source.revision is None
    assert read.source.files == {path.name: file_sha256(path) for path in tiny_checkpoint.iterdir()}
    assert read.template_sha256 == template_sha256()
    assert read.pixel_budget == PixelRange(3136, 12845056)
    assert read.image_settings["patch_size"] == read.spec.vision.patch_size
    assert {
        "torch", "mmr5-runtime", "python", "safetensors", "numpy", "pillow", "tokenizers"
    } == read.created_by.keys()  # fmt: skip
    assert read.spec == open_checkpoint(tiny_checkpoint).spec
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "engine" / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
    assert str(tiny_checkpoint.parent) not in (tmp_path / "engine" / MANIFEST_NAME).read_text()


def test_a_pixel_budget_can_be_given(tiny_checkpoint: Path, tmp_path: Path) -> None:
    made = quick_export(tiny_checkpoint, "bf16", tmp_path / "engine", max_pixels=50176)
    assert made.pixel_budget == PixelRange(3136, 50176)


def test_files_are_split_and_every_tensor_is_aligned(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quick_export(tiny_checkpoint, "int4", tmp_path / "one")
    manifest = quick_export(tiny_checkpoint, "int4", tmp_path / "many", max_file_bytes=100_000)
    files = sorted(set(manifest.tensors.values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    one, many = stored(tmp_path / "one"), stored(tmp_path / "many")
    assert all(torch.equal(one[name], many[name]) for name in one)
    for file in files:
        with safe_open(tmp_path / "many" / file, framework="pt") as reader:
            assert reader.metadata() == {"format": "pt"}
            for name in reader.keys():
                tensor = reader.get_tensor(name)
                assert tensor.data_ptr() % tensor.element_size() == 0


def test_force_replaces_an_engine_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quick_export(tiny_checkpoint, "int8", tmp_path / "engine")
    (tmp_path / "engine" / "note.txt").write_text("of the old engine")
    quick_export(tiny_checkpoint, "int4", tmp_path / "engine", force=True)
    assert read_manifest(tmp_path / "engine").quant_name == "int4"
    assert os.listdir(tmp_path) == ["engine"]
    assert not (tmp_path / "engine" / "note.txt").exists()


def test_missing_parents_of_the_output_are_made(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quick_export(tiny_checkpoint, "bf16", tmp_path / "a" / "b" / "engine")
    assert isinstance(read_manifest(tmp_path / "a" / "b" / "engine"), Manifest)


def test_progress_counts_up_to_its_total(tiny_checkpoint: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    quick_export(
        tiny_checkpoint,
        "bf16",
        tmp_path / "engine",
        progress=lambda stage, done, total, note="": calls.append((stage, done, total)),
    )
    assert list(dict.fromkeys(stage for stage, _, _ in calls)) == ["hash", "write"]
    for stage in ("hash", "write"):
        counts = [(done, total) for name, done, total in calls if name == stage]
        assert [done for done, _ in counts] == list(range(counts[-1][1] + 1))


def test_compressed_tensors_metadata_lets_other_readers_unpack(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    manifest = quick_export(tiny_checkpoint, "int4", tmp_path / "engine")
    found = stored(tmp_path / "engine")
    for linear, format in manifest.formats.items():
        if format != INT4:
            continue
        rows, columns = found[f"{linear}.weight_shape"].tolist()
        assert found[f"{linear}.weight_packed"].shape == (rows, columns // 8)
    assert json.loads((tmp_path / "engine" / MANIFEST_NAME).read_text())["quant"]["method"] == "rtn"
