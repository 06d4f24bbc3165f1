"""The parts of an export on their own: image settings, the plan, the writer, the source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.synthetic7b import config_7b
from mmr5_export.plan import Stored, make_plan
from mmr5_export.processor import image_settings, pixel_budget, read_processor
from mmr5_export.recipe import load_recipe
from mmr5_export.source import MINI, locate
from mmr5_export.write import TensorWriter, partial_folder
from mmr5_runtime.artifact import PixelRange
from mmr5_runtime.spec import ModelSpec

SETTINGS: dict[str, Any] = {
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.2, 0.1],
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
}


@pytest.fixture(scope="module")
def spec_7b() -> ModelSpec:
    return ModelSpec.from_hf_config(config_7b(layers=28, blocks=32))


@pytest.mark.parametrize(
    "keys",
    [
        {"min_pixels": 4000, "max_pixels": 9000},
        {"size": {"shortest_edge": 4000, "longest_edge": 9000}},
        {"min_pixels": None, "max_pixels": None}
        | {"size": {"shortest_edge": 4000, "longest_edge": 9000}},
        {"min_pixels": 4000, "max_pixels": 9000, "size": {"shortest_edge": 1, "longest_edge": 2}},
    ],
)
def test_both_spellings_of_the_pixel_budget(keys: dict[str, Any]) -> None:
    assert pixel_budget(keys) == PixelRange(4000, 9000)
    assert pixel_budget(keys, max_pixels=8000) == PixelRange(4000, 8000)


def test_both_files_of_image_settings(tmp_path: Path, spec_7b: ModelSpec) -> None:
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": SETTINGS}))
    assert read_processor(tmp_path) == SETTINGS
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SETTINGS | {"resample": 3}))
    found = read_processor(tmp_path)
    assert found["resample"] == 3
    image = image_settings(found, spec_7b.vision)
    assert image.mean == (0.5, 0.4, 0.3) and image.std == (0.2, 0.2, 0.1)
    assert (image.patch_size, image.merge_size, image.temporal_patch_size) == (14, 2, 2)


# Parameters of the published 7B: 7.6 billion in the language model, 0.7 in the vision tower.
@pytest.mark.parametrize(("quant", "gigabytes"), [("bf16", 16.6), ("int8", 9.5), ("int4", 6.4)])
def test_the_plan_of_the_whole_7b(spec_7b: ModelSpec, quant: str, gigabytes: float) -> None:
    plan = make_plan(spec_7b, load_recipe(quant).formats(spec_7b))
    assert plan.num_bytes == pytest.approx(gigabytes * 1e9, rel=0.01)
    assert len(plan.formats) == (0 if quant == "bf16" else 28 * 7 + 1)
    files: dict[str, int] = {}
    for tensor in plan.stored:
        files[tensor.file] = files.get(tensor.file, 0) + tensor.num_bytes
    assert max(files.values()) <= 2 << 30
    assert list(files) == sorted(files) and next(iter(files)).endswith(
        f"-of-{len(files):05}.safetensors"
    )


def test_the_writer_takes_planned_tensors_in_any_order(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(3, dtype=torch.int8),
        "b": torch.randn(5).to(torch.bfloat16),
        "c": torch.arange(4, dtype=torch.int32).reshape(2, 2),
        "d": torch.tensor([7, 8]),
    }
    plan = [Stored(n, t.dtype, tuple(t.shape), "x.safetensors") for n, t in tensors.items()]
    with TensorWriter(tmp_path, plan) as writer:
        for name in ("c", "a", "d", "b"):
            writer.write(name, tensors[name])
        writer.finish()
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_the_writer_keeps_to_its_plan(tmp_path: Path) -> None:
    plan = [Stored("a", torch.int8, (3,), "x.safetensors")]
    with TensorWriter(tmp_path, plan) as writer:
        with pytest.raises(ValueError, match="planned and never written"):
            writer.finish()
        with pytest.raises(ValueError, match="not in the plan"):
            writer.write("b", torch.zeros(3, dtype=torch.int8))
    for wrong in (torch.zeros(3), torch.zeros(4, dtype=torch.int8)):
        with TensorWriter(tmp_path, plan) as writer, pytest.raises(ValueError, match="not in the"):
            writer.write("a", wrong)


def test_a_failure_at_the_last_moment_brings_the_old_folder_back(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "old").touch()
    with pytest.raises(FileNotFoundError), partial_folder(tmp_path / "engine") as folder:
        folder.rmdir()  # so that it cannot be renamed
    assert [path.name for path in tmp_path.rglob("*")] == ["engine", "old"]


def test_mini_is_a_name_and_not_a_path() -> None:
    location = locate(MINI)
    assert location.name == MINI and (location.folder / "config.json").is_file()
