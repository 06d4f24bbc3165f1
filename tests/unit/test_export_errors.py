"""Checkpoints and places that cannot be exported: one sentence each, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.exporting import quick_export
from helpers.tiny import make_hf_model, tiny_configs, write_checkpoint
from mmr5_export import export
from mmr5_export.estimate import ResourceError
from mmr5_export.options import OptionError
from mmr5_runtime.types import CheckpointError, ExportError, Mmr5Error

WEIGHTS = "model.safetensors"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    model = make_hf_model(tiny_configs()["int4"], seed=4)
    return write_checkpoint(model, tmp_path / "checkpoint", shards=2)


def edit(path: Path, change: Change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_weights(checkpoint: Path, change: Change) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    change(tensors)
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})


def refusal(
    error: type[Mmr5Error], checkpoint: Path | str, quant: str = "int4", **more: Any
) -> str:
    """The message of a refused export, which must leave no output and no partial folder."""
    folder = Path(checkpoint).parent
    before = set(os.listdir(folder)) if folder.is_dir() else set()
    with pytest.raises(error) as caught:
        quick_export(checkpoint, quant, more.pop("output", folder / "engine"), **more)
    assert type(caught.value) is error
    if folder.is_dir():
        assert set(os.listdir(folder)) == before
    message = str(caught.value)
    assert "\n" not in message and ";" in message  # what is wrong; what to do
    return message


def test_another_architecture(checkpoint: Path) -> None:
    edit(checkpoint / "config.json", lambda config: config.update(model_type="llama"))
    message = refusal(CheckpointError, checkpoint)
    assert "model_type 'llama'" in message and "Qwen2.5-VL" in message


def test_a_checkpoint_that_only_says_it_is_quantized(checkpoint: Path) -> None:
    scheme = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    edit(checkpoint / "config.json", lambda c: c.update(quantization_config=scheme))
    with pytest.raises(CheckpointError, match="holds no quantized linear; remove"):
        export(checkpoint, None, checkpoint.parent / "engine")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "preprocessor_config.json"])
def test_a_missing_file(checkpoint: Path, file: str) -> None:
    (checkpoint / file).unlink()
    assert f"{file} is missing" in refusal(CheckpointError, checkpoint)


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).unlink()
    assert "save the checkpoint as safetensors" in refusal(CheckpointError, checkpoint)


def test_a_config_that_is_no_json(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{")
    assert "is not JSON" in refusal(CheckpointError, checkpoint)
    (checkpoint / "config.json").write_text("[]")
    assert "is not a JSON object" in refusal(CheckpointError, checkpoint)


def test_missing_and_left_over_tensors_are_named(checkpoint: Path) -> None:
    name = "model.language_model.norm.weight"
    edit_weights(checkpoint, lambda tensors: tensors.update({"odd.weight": tensors[name].clone()}))
    assert "odd.weight" in refusal(CheckpointError, checkpoint)
    edit_weights(checkpoint, lambda tensors: (tensors.pop("odd.weight"), tensors.pop(name)))
    assert "lack model.norm.weight" in refusal(CheckpointError, checkpoint)


def test_a_tensor_under_both_names(checkpoint: Path) -> None:
    name = "model.language_model.norm.weight"
    edit_weights(
        checkpoint, lambda tensors: tensors.update({"model.norm.weight": tensors[name].clone()})
    )
    assert "model.norm.weight is stored twice" in refusal(CheckpointError, checkpoint)


def test_a_tensor_of_another_shape(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda t: t.update({"lm_head.weight": torch.zeros(3, 128).bfloat16()}))
    assert "lm_head.weight has shape [3, 128]" in refusal(CheckpointError, checkpoint)


def test_a_tensor_of_integers(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].char()}))
    assert "lm_head.weight is stored as I8" in refusal(CheckpointError, checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.language_model.norm.weight", "model.language_model.layers.1.mlp.up_proj.weight"]
)
def test_values_that_are_not_finite(checkpoint: Path, name: str, value: float) -> None:
    edit_weights(checkpoint, lambda tensors: tensors[name].view(-1)[5:6].fill_(value))
    message = refusal(CheckpointError, checkpoint)
    assert "holds NaN or infinite values" in message and name.split(".", 2)[2] in message


def test_a_truncated_weight_file(checkpoint: Path) -> None:
    path = checkpoint / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated or no safetensors file" in refusal(CheckpointError, checkpoint)


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in refusal(CheckpointError, sharded)


def test_an_index_that_promises_too_much(sharded: Path) -> None:
    file = "model-00001-of-00002.safetensors"
    edit(
        sharded / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"more.weight": file}),
    )
    assert "lacks more.weight" in refusal(CheckpointError, sharded)


def test_an_index_without_a_map(sharded: Path) -> None:
    edit(sharded / "model.safetensors.index.json", lambda index: index.clear())
    assert "has no weight_map" in refusal(CheckpointError, sharded)


def test_int4_needs_columns_that_fill_groups(tmp_path: Path) -> None:
    model = make_hf_model(tiny_configs()["three_heads"])
    checkpoint = write_checkpoint(model, tmp_path / "checkpoint")
    message = refusal(CheckpointError, checkpoint, "int4")
    assert "model.layers.0.self_attn.q_proj has 48 columns" in message and "int8" in message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.update(resample=2), "resample = 2"),
        (lambda c: c.update(do_normalize=False), "do_normalize = False"),
        (lambda c: c.update(rescale_factor=1.0), "rescale_factor = 1.0"),
        (lambda c: c.update(patch_size=16), "patch_size = 16"),
        (lambda c: c.pop("image_mean"), "image_mean = None"),
        (lambda c: c.pop("max_pixels"), "gives no min_pixels and max_pixels"),
    ],
)
def test_an_image_processor_that_works_otherwise(
    checkpoint: Path, change: Change, reason: str
) -> None:
    edit(checkpoint / "preprocessor_config.json", change)
    assert reason in refusal(CheckpointError, checkpoint)


def test_a_tokenizer_of_another_model(checkpoint: Path) -> None:
    edit(checkpoint / "tokenizer.json", lambda t: t.update(added_tokens=[]))
    assert "special token" in refusal(CheckpointError, checkpoint)


def test_a_tokenizer_with_another_image_token(checkpoint: Path) -> None:
    edit(checkpoint / "config.json", lambda config: config.update(image_token_id=7))
    assert "for an image token but config.json has 7" in refusal(CheckpointError, checkpoint)


def test_an_unknown_quantization(checkpoint: Path) -> None:
    assert "there is no recipe 'int3'; choose one of bf16" in refusal(
        OptionError, checkpoint, "int3"
    )


@pytest.mark.parametrize(("low", "high"), [(100, None), (None, 1000), (-1, 5000)])
def test_a_pixel_budget_that_is_none(checkpoint: Path, low: int | None, high: int | None) -> None:
    message = refusal(OptionError, checkpoint, min_pixels=low, max_pixels=high)
    assert "are no pixel budget" in message


def test_an_output_that_exists(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    message = refusal(ExportError, checkpoint, output=tmp_path / "taken")
    assert "exists already" in message and "--force" in message


def test_force_does_not_replace_other_folders(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"1")
    for output in (tmp_path / "photos", tmp_path / "photos" / "one.jpg"):
        message = refusal(ExportError, checkpoint, output=output, force=True)
        assert "is not an engine folder" in message
    assert (tmp_path / "photos" / "one.jpg").read_bytes() == b"1"


def test_a_disk_that_is_too_small(checkpoint: Path) -> None:
    message = refusal(ResourceError, checkpoint, free_bytes=1_500_000)
    assert "has 1.50 MB free; make room" in message


def test_a_memory_that_is_too_small(checkpoint: Path) -> None:
    message = refusal(ResourceError, checkpoint, free_memory=100_000_000)
    assert "stage needs about" in message and "0.10 GB are free" in message


def test_an_output_that_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    message = refusal(ExportError, checkpoint, output=tmp_path / "file" / "engine")
    assert "check the disk and the permissions" in message


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("no/such/folder", "pass an existing folder, mini, or a hub id"),
        ("./nowhere", "pass an existing folder"),
    ],
)
def test_no_checkpoint(model: str, reason: str, tmp_path: Path) -> None:
    assert reason in refusal(ExportError, model, output=tmp_path / "engine")
    assert not any(tmp_path.iterdir())


def test_a_file_instead_of_a_folder(checkpoint: Path) -> None:
    assert "is a file; pass the checkpoint folder" in refusal(ExportError, checkpoint / WEIGHTS)


def test_a_revision_of_a_folder(checkpoint: Path) -> None:
    assert "is no hub id" in refusal(OptionError, checkpoint, revision="main")


@pytest.mark.parametrize("force", [False, True])
def test_an_interrupted_export_leaves_what_was_there(
    checkpoint: Path, tmp_path: Path, force: bool
) -> None:
    if force:
        quick_export(checkpoint, "int8", tmp_path / "engine")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    def interrupt(stage: str, done: int, total: int, note: str = "") -> None:
        if (stage, done) == ("write", total // 2):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        quick_export(checkpoint, "int4", tmp_path / "engine", force=force, progress=interrupt)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
