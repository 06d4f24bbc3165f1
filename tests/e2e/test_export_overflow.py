"""Weights that are finite but blow up inside the decoder: one sentence, whatever the method."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.exporting import write_samples
from mmr5_export import export
from mmr5_export.options import ExportOptions
from mmr5_runtime.types import CheckpointError

METHODS = [
    ("int4", "gptq"), ("int4", "awq"), ("int8", "smoothquant+gptq"), ("int8-weight-only", "awq"),
]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_samples(tmp_path / "data", 4, responses=True)


def enlarged(checkpoint: Path, folder: Path, ends: str, factor: float) -> Path:
    """A copy in fp32 whose tensors with this ending are ``factor`` times as large."""
    shutil.copytree(checkpoint, folder)
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    for name in wide:
        if name.endswith(ends):
            wide[name] = wide[name] * factor
            assert torch.isfinite(wide[name]).all()
    save_file(wide, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refused(checkpoint: Path, data: Path, quant: str, **options: Any) -> str:
    output = checkpoint.parent / "engine"
    before = set(os.listdir(output.parent))
    given = {"calib_data": data, "calib_samples": 4, "verify": False, "device": "cpu"}
    with pytest.raises(CheckpointError) as caught:
        export(checkpoint, quant, output, ExportOptions(**{**given, **options}))
    left = set(os.listdir(output.parent)) - before
    assert left <= {"engine.partial-work"}
    return str(caught.value)


@pytest.mark.parametrize(("quant", "method"), METHODS)
def test_inputs_of_layer_1_that_overflow_when_squared(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, quant: str, method: str
) -> None:
    checkpoint = enlarged(
        tiny_checkpoint, tmp_path / "checkpoint", "layers.1.mlp.up_proj.weight", 1e25
    )
    message = refused(checkpoint, data, quant, method=method)
    assert "the inputs of model.layers.1.mlp.down_proj are not finite" in message
    assert "; calibrate with --dtype float32 or other samples" in message


def test_a_sensitivity_that_cannot_be_computed(
    tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    checkpoint = enlarged(tiny_checkpoint, tmp_path / "checkpoint", "embed_tokens.weight", 1e25)
    message = refused(checkpoint, data, "int4-mixed")
    assert "what comes out of model.layers.0 with qkv as w4a16-g128 is not finite" in message


def test_rounding_with_statistics_is_checked_too(
    tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    """A recipe that rounds one linear and calibrates another: the first reports an error too."""
    checkpoint = enlarged(
        tiny_checkpoint, tmp_path / "checkpoint", "layers.0.mlp.up_proj.weight", 1e25
    )
    recipe = tmp_path / "rounded.toml"
    recipe.write_text(
        '[quant]\nname = "rounded"\nformat = "int4"\nmethod = "rtn"\n'
        '[[layers]]\nmatch = "model.layers.2.mlp.down_proj"\nformat = "int4"\nmethod = "gptq"\n'
    )
    assert "inputs of model.layers.0.mlp.down_proj" in refused(checkpoint, data, str(recipe))
