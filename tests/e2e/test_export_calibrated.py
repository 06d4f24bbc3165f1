"""Calibrated exports of a tiny checkpoint, from samples to a verified and described engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.exporting import quick_export, tree_hashes, write_samples
from mmr5_export import export
from mmr5_export.agreement import VerificationFailed
from mmr5_export.job import DEFAULT_QUANT
from mmr5_export.options import ExportOptions
from mmr5_runtime.artifact import Manifest, TensorReader, read_manifest, verify_hashes
from mmr5_runtime.types import ExportError


@pytest.fixture(scope="module")
def data(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("data"), 12, own_of=tiny_checkpoint)


def run(checkpoint: Path, data: Path, quant: str | None, output: Path, **options: Any) -> Manifest:
    settings = {"calib_data": data, "calib_samples": 6, "held_out": 3, "max_new_tokens": 12}
    return export(checkpoint, quant, output, ExportOptions(**{**settings, **options}))


@pytest.fixture(scope="module")
def gptq(tiny_checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("gptq") / "engine"
    run(tiny_checkpoint, data, None, output)
    return output


def test_int4_by_gptq_is_the_default_and_describes_itself(gptq: Path) -> None:
    manifest = read_manifest(gptq)
    verify_hashes(gptq, manifest)
    assert DEFAULT_QUANT == manifest.quant.name == "int4" and manifest.quant.method == "gptq"
    decoder = [name for name in manifest.formats if name.startswith("model.layers.")]
    assert {manifest.formats[name].name for name in decoder} == {"w4a16-g128"}
    assert manifest.formats["lm_head"].name == "w8a16"
    assert set(manifest.formats) == {*decoder, "lm_head"}  # no vision tensor unasked
    report = json.loads((gptq / "report.json").read_text())
    assert {report["layers"][name]["method"] for name in decoder} == {"gptq"}
    for name in decoder:
        assert 0 < report["layers"][name]["error"] < 1 and report["layers"][name]["sqnr_db"] > 8
    assert len(report["worst_layers"]) == 10
    calibration = report["calibration"]
    assert calibration["samples"] == 6 and calibration["held_out"] == 3
    assert all(count > 0 for count in calibration["tokens"].values())
    assert report["verification"]["ranks"]["lists"] == 3
    assert report["verification"]["tokens"]["kl_nats"] > 0
    assert report["command"].startswith("mmr5-export --model ")
    assert "## " in (gptq / "README.md").read_text()


def test_equal_exports_have_equal_bytes(
    gptq: Path, tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere" / data.name
    shutil.copytree(data, elsewhere)
    run(tiny_checkpoint, elsewhere, None, tmp_path / "engine")
    assert tree_hashes(tmp_path / "engine") == tree_hashes(gptq)
    command = json.loads((gptq / "report.json").read_text())["command"]
    assert f"--calib-data {data.name} " in command and str(data.parent) not in command


def test_the_original_answers_for_itself_where_the_data_has_other_words(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    given = write_samples(tmp_path / "given", 12, responses=True)
    cache = tmp_path / "answers.jsonl"
    run(tiny_checkpoint, given, "int4", tmp_path / "engine", response_cache=cache)
    report = json.loads((tmp_path / "engine" / "report.json").read_text())
    calibration, ranks = report["calibration"], report["verification"]["ranks"]
    assert calibration["answers_given"] == 6 and calibration["answers_generated"] == 3
    assert calibration["answers_by"] == ranks["reference_by"] == "bf16"
    answers = [json.loads(line) for line in cache.read_text().splitlines()]
    assert [sample["reference"]["order"] for sample in ranks["samples"]] == [
        answer["order"] for answer in answers
    ]
    written = sum(len(answer["token_ids"]) for answer in answers)
    assert report["verification"]["tokens"]["tokens"] == written
    assert calibration["held_out_tokens"]["response"] == written


def test_gptq_loses_less_at_the_outputs_than_rounding(
    gptq: Path, tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    # A rule that asks for bits nobody has makes the walk measure what rounding costs.
    recipe = tmp_path / "rounded.toml"
    recipe.write_text(
        '[quant]\nname = "rounded"\nformat = "int4"\nmethod = "rtn"\n'
        '[[layers]]\nmatch = "model.layers.2.mlp.down_proj"\nformat = "int4"\nmethod = "gptq"\n'
    )
    run(tiny_checkpoint, data, str(recipe), tmp_path / "engine")
    rounded = json.loads((tmp_path / "engine" / "report.json").read_text())["layers"]
    fitted = json.loads((gptq / "report.json").read_text())["layers"]
    first = [name for name in fitted if name.startswith("model.layers.0.")]
    assert len(first) == 7
    for name in first:  # equal inputs: nothing before them is quantized
        assert fitted[name]["error"] < rounded[name]["error"], name


@pytest.mark.parametrize(
    ("quant", "options", "method"),
    [
        ("int4", {"method": "awq"}, "awq"),
        ("int4", {"symmetric": False, "group_size": 64}, "gptq"),
        ("int8", {}, "smoothquant+gptq"),
        ("int8-weight-only", {"method": "gptq"}, "gptq"),
        ("fp8", {"quantize_vision": "fp8", "lm_head": "bf16"}, "rtn"),
        ("int4", {"method": "rtn", "lm_head": "int4", "quantize_vision": "int8"}, "rtn"),
    ],
)
def test_every_method_gives_a_verified_engine(
    tiny_checkpoint: Path,
    data: Path,
    tmp_path: Path,
    quant: str,
    options: dict[str, Any],
    method: str,
) -> None:
    manifest = run(tiny_checkpoint, data, quant, tmp_path / "engine", **options)
    assert manifest.quant.method == method
    tokens = manifest.report["verification"]["tokens"]
    assert 0 < tokens["kl_nats"] < 0.5  # noise logits would be several nats away
    assert any(tmp_path.iterdir()) and [p.name for p in tmp_path.iterdir()] == ["engine"]


def test_smoothing_changes_norms_and_nothing_else_dense(
    tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    run(tiny_checkpoint, data, "int4", tmp_path / "awq", method="awq", verify=False)
    quick_export(tiny_checkpoint, "bf16", tmp_path / "dense")
    dense, smoothed = read_manifest(tmp_path / "dense"), read_manifest(tmp_path / "awq")
    with (
        TensorReader(tmp_path / "dense", dense) as original,
        TensorReader(tmp_path / "awq", smoothed) as changed,
    ):
        common = sorted(set(dense.tensors) & set(smoothed.tensors) - {"lm_head.weight"})
        different = [n for n in common if not torch.equal(original.get(n), changed.get(n))]
    assert different and all(name.endswith("layernorm.weight") for name in different)


def test_mixed_precision_keeps_its_budget(
    tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    manifest = run(tiny_checkpoint, data, "int4-mixed", tmp_path / "engine", bits=5.5)
    kinds = {
        name: format.name for name, format in manifest.formats.items() if "model.layers" in name
    }
    assert set(kinds.values()) == {"w4a16-g128", "w8a16"}
    weights = size = 0
    with TensorReader(tmp_path / "engine", manifest) as reader:
        for name in kinds:
            keys = [key for key in manifest.tensors if key.startswith(f"{name}.weight")]
            parts = {key: reader.get(key) for key in keys}
            size += sum(part.nbytes for part in parts.values())
            scale = parts[f"{name}.weight_scale"]
            packed = parts.get(f"{name}.weight_packed")
            weights += scale.shape[0] * (
                packed.shape[1] * 8 if packed is not None else parts[f"{name}.weight"].shape[1]
            )
    assert 4.0 < 8 * size / weights <= 5.5
    report = json.loads((tmp_path / "engine" / "report.json").read_text())
    assert report["sensitivity"]["model.layers.0.qkv"]["int4"] > 0
    described = (manifest.quant.calibration, manifest.report, report["calibration"])
    assert "sensitivity" not in json.dumps(described)
    assert "sensitivity" not in (tmp_path / "engine" / "README.md").read_text()


def test_a_missed_threshold_keeps_the_engine_aside(
    tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    options = {"method": "rtn", "group_size": 128, "symmetric": True}
    with pytest.raises(VerificationFailed, match=r"engine\.rejected"):
        # Random weights decode noise: their first page cannot survive in every list of twelve.
        run(
            tiny_checkpoint,
            data,
            "int4",
            tmp_path / "engine",
            min_top1_agreement=1.0,
            held_out=11,
            calib_samples=1,
            **options,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["engine.rejected"]
    report = json.loads((tmp_path / "engine.rejected" / "report.json").read_text())
    assert report["verification"]["passed"] is False
    read_manifest(tmp_path / "engine.rejected")  # it is whole


def test_calibration_without_data_says_what_to_pass(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--calib-data.*--method rtn --no-verify"):
        export(tiny_checkpoint, "int4", tmp_path / "engine")
    with pytest.raises(ExportError, match="verification needs.*--no-verify"):
        export(tiny_checkpoint, "int8-weight-only", tmp_path / "engine")
    assert not list(tmp_path.iterdir())
