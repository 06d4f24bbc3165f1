"""Reading engine folders: round trips, and one clear sentence for everything that is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmr5_kernels.layout import INT4, INT8_WEIGHT_ONLY
from mmr5_runtime.artifact import (
    MANIFEST_NAME,
    Manifest,
    TensorReader,
    read_manifest,
    verify_hashes,
    write_manifest,
)
from mmr5_runtime.spec import stored_shapes
from mmr5_runtime.types import EngineError

FIELDS = INT8_WEIGHT_ONLY.to_json()
EngineFactory = Callable[[str], Path]
WEIGHTS = "model-00001-of-00001.safetensors"


@pytest.fixture
def engine(tiny_engine: EngineFactory, tmp_path: Path) -> Path:
    """A copy of the int4 engine that a test may damage."""
    return Path(shutil.copytree(tiny_engine("int4"), tmp_path / "engine"))


def change_manifest(engine: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = engine / MANIFEST_NAME
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def refusal(engine: Path) -> str:
    with pytest.raises(EngineError) as caught:
        read_manifest(engine)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    return message


def test_a_manifest_reads_back_as_it_was_written(engine: Path) -> None:
    manifest = read_manifest(engine)
    data = json.loads((engine / MANIFEST_NAME).read_text())
    assert json.loads(json.dumps(manifest.to_json())) == data
    assert Manifest.from_json(data, "here") == manifest
    verify_hashes(engine, manifest)
    assert manifest.quant_name == "int4"
    assert manifest.quant.method == "rtn" and set(manifest.formats.values()) == {
        INT4,
        INT8_WEIGHT_ONLY,
    }
    assert manifest.num_bytes == sum(
        file.stat().st_size for file in engine.iterdir() if file.name != MANIFEST_NAME
    )


def test_recipe_and_calibration_read_back(engine: Path) -> None:
    recipe = {"layers": [{"match": "lm_head", "format": "int4"}], "name": "mine"}
    manifest = read_manifest(engine)
    quant = replace(manifest.quant, recipe=recipe, calibration={"samples": 3})
    write_manifest(engine, replace(manifest, quant=quant, report={"sqnr_db": {}, "free": [1]}))
    found = read_manifest(engine)
    assert found.quant == quant and found.report["free"] == [1]


def test_every_format_is_described_once(engine: Path) -> None:
    quant = json.loads((engine / MANIFEST_NAME).read_text())["quant"]
    assert quant["formats"] == {"w4a16-g128": INT4.to_json(), "w8a16": FIELDS}
    assert quant["layers"]["lm_head"] == "w8a16" and len(quant["layers"]) == 3 * 7 + 1


def test_a_format_that_does_not_fit_its_linear(engine: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["architecture"]["text"]["intermediate_size"] = 144

    change_manifest(engine, change)
    assert "down_proj cannot be stored as w4a16-g128: 144 columns are no" in refusal(engine)


def test_the_reader_gives_every_tensor_in_its_planned_shape(engine: Path) -> None:
    manifest = read_manifest(engine)
    shapes = stored_shapes(manifest.spec, manifest.formats)
    with TensorReader(engine, manifest) as reader:
        found = {name: reader.get(name) for name in manifest.tensors}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes
    stored = load_file(engine / WEIGHTS)
    assert all(torch.equal(found[name], stored[name]) for name in stored)


def test_the_reader_has_no_other_tensor(engine: Path) -> None:
    with TensorReader(engine, read_manifest(engine)) as reader:
        with pytest.raises(EngineError, match="has no tensor lm_head.nothing"):
            reader.get("lm_head.nothing")


def test_no_folder(tmp_path: Path) -> None:
    assert "there is no engine folder" in refusal(tmp_path / "none")


def test_no_manifest(engine: Path) -> None:
    (engine / MANIFEST_NAME).unlink()
    assert f"no {MANIFEST_NAME}" in refusal(engine)


def test_what_an_export_left_behind(engine: Path) -> None:
    left = engine.rename(engine.with_name("engine.partial-123"))
    assert "never finished" in refusal(left)


def test_no_json(engine: Path) -> None:
    (engine / MANIFEST_NAME).write_text('{"schema_version": 1,')
    assert "is not readable JSON" in refusal(engine)


@pytest.mark.parametrize("version", [None, "1", 0, True, 1.5])
def test_an_unknown_schema(engine: Path, version: object) -> None:
    change_manifest(engine, lambda data: data.update(schema_version=version))
    assert "unknown schema version" in refusal(engine)


def test_a_newer_schema(engine: Path) -> None:
    change_manifest(engine, lambda data: data.update(schema_version=4))
    assert "made by a newer mmr5-runtime" in refusal(engine)
    assert "upgrade mmr5-runtime or export" in refusal(engine)


def test_an_older_schema(engine: Path) -> None:
    change_manifest(engine, lambda data: data.update(schema_version=1))
    assert "made by an older mmr5-runtime; export the engine again" in refusal(engine)


def test_a_manifest_that_is_no_object(engine: Path) -> None:
    (engine / MANIFEST_NAME).write_text("[1]")
    assert "unknown schema version None" in refusal(engine)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data.pop("files"), "it lacks 'files'"),
        (lambda data: data["quant"].update(bits=4), "unexpected keyword argument 'bits'"),
        (lambda data: data["quant"].pop("calibration"), "it lacks 'calibration'"),
        (lambda data: data["quant"].update(recipe=[1]), "recipe is [1] and not an object"),
        (lambda data: data["quant"].update(method=None), "a name is not text"),
        (lambda data: data["quant"]["layers"].update(lm_head="w2a16"), "format w2a16 is used but"),
        (lambda data: data["quant"]["formats"].update(w9=FIELDS), "w9 has the fields of w8a16"),
        (
            lambda data: data["quant"]["formats"]["w8a16"].update(weights="int2"),
            "int2 weights with 16-bit activations are not supported",
        ),
        (lambda data: data.update(report=[]), "cannot be read"),
        (lambda data: data["files"][WEIGHTS].update(size="many"), "size is 'many'"),
        (lambda data: data["pixel_budget"].update(min_pixels=2.5), "min_pixels is 2.5"),
        (lambda data: data["image"].update(mean=[0.5]), "not enough values"),
        (lambda data: data.update(tensors=["a"]), "cannot be read"),
        (lambda data: data["architecture"]["text"].pop("vocab_size"), "architecture"),
    ],
)
def test_a_damaged_manifest(
    engine: Path, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    change_manifest(engine, change)
    assert reason in refusal(engine)
    assert "export the engine again" in refusal(engine)


def test_a_missing_file(engine: Path) -> None:
    (engine / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refusal(engine)


def test_a_truncated_file(engine: Path) -> None:
    path = engine / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{WEIGHTS} has" in refusal(engine) and "cut off" in refusal(engine)


def test_an_altered_file_of_the_same_size(engine: Path) -> None:
    path = engine / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    manifest = read_manifest(engine)  # sizes alone do not tell
    with pytest.raises(EngineError, match="was altered since the export"):
        verify_hashes(engine, manifest)


def test_a_file_outside_the_folder(engine: Path) -> None:
    entry = {"sha256": "0", "size": 1}
    change_manifest(engine, lambda data: data["files"].update({"../secret": entry}))
    assert "outside its folder" in refusal(engine)


def test_tensors_in_a_file_that_is_not_listed(engine: Path) -> None:
    change_manifest(engine, lambda data: data["files"].pop(WEIGHTS))
    assert "its manifest does not list" in refusal(engine)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "lacks tensor model.norm.weight;"),
        (lambda tensors: tensors.update({"extra.weight": WEIGHTS}), "unknown tensor extra.weight;"),
    ],
)
def test_a_manifest_whose_tensors_are_not_the_models(
    engine: Path, change: Callable[[dict[str, str]], object], reason: str
) -> None:
    change_manifest(engine, lambda data: change(data["tensors"]))
    assert reason in refusal(engine)


@pytest.mark.parametrize("lost", [True, False])
def test_a_weight_file_that_is_not_what_the_manifest_says(engine: Path, lost: bool) -> None:
    tensors = load_file(engine / WEIGHTS)
    if lost:
        del tensors["model.norm.weight"]
    else:
        tensors["extra.weight"] = torch.zeros(2)
    save_file(tensors, engine / WEIGHTS)
    size = (engine / WEIGHTS).stat().st_size
    change_manifest(engine, lambda data: data["files"][WEIGHTS].update(size=size))
    manifest = read_manifest(engine)
    wanted = "lacks tensor model.norm.weight" if lost else "has unknown tensor extra.weight"
    with pytest.raises(EngineError, match=wanted):
        TensorReader(engine, manifest)


def test_a_weight_file_that_is_no_safetensors(engine: Path) -> None:
    size = (engine / WEIGHTS).stat().st_size
    manifest = read_manifest(engine)
    (engine / WEIGHTS).write_bytes(b"\xff" * size)
    with pytest.raises(EngineError, match=f"{WEIGHTS} cannot be read"):
        TensorReader(engine, manifest)
