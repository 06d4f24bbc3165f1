"""Quantized MLPs of the vision tower: padded to a multiple of 16, and the padding is silent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from helpers.exporting import quick_export
from helpers.synthetic7b import config_7b
from helpers.tiny import make_hf_model, read_spec, read_tensors, tiny_configs, write_checkpoint
from mmr5_kernels.layout import FP8, INT8, Format
from mmr5_kernels.reference import dequantize
from mmr5_runtime.artifact import TensorReader, read_manifest
from mmr5_runtime.model import Model
from mmr5_runtime.spec import ModelSpec, pad_vision, stored_shapes, vision_linear_shapes
from mmr5_runtime.types import EngineError

BLOCK = "visual.blocks.1.mlp."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its vision tower has 44 values inside an MLP, which 16 does not divide."""
    model = make_hf_model(tiny_configs()["int4"], seed=3)
    return write_checkpoint(model, tmp_path_factory.mktemp("checkpoint"), dtype=torch.bfloat16)


def test_sizes_of_the_7b() -> None:
    spec = ModelSpec.from_hf_config(config_7b(layers=1, blocks=2))
    assert spec.vision.intermediate_size == 3420 and spec.vision.padded_intermediate == 3424
    formats = dict.fromkeys((f"{BLOCK}{part}_proj" for part in ("gate", "up", "down")), FP8)
    shapes = stored_shapes(spec, formats)
    assert shapes[f"{BLOCK}gate_proj.weight"] == (3424, 1280)
    assert shapes[f"{BLOCK}up_proj.bias"] == (3424,)
    assert shapes[f"{BLOCK}down_proj.weight"] == (1280, 3424)
    assert shapes[f"{BLOCK}down_proj.weight_scale"] == (1280, 1)
    assert shapes["visual.blocks.0.mlp.down_proj.weight"] == (1280, 3420)  # dense, as it was


def test_a_padded_mlp_computes_the_same(checkpoint: Path) -> None:
    spec, tensors = read_spec(checkpoint), read_tensors(checkpoint)
    x = torch.randn(5, spec.vision.hidden_size, generator=torch.Generator().manual_seed(0))

    def mlp(weights: dict[str, Tensor]) -> Tensor:
        gate, up, down = (
            (weights[f"{BLOCK}{p}_proj.weight"].double(), weights[f"{BLOCK}{p}_proj.bias"].double())
            for p in ("gate", "up", "down")
        )
        return linear(silu(linear(x.double(), *gate)) * linear(x.double(), *up), *down)

    padded = {name: pad_vision(name, tensor, spec) for name, tensor in tensors.items()}
    changed = {name for name in tensors if padded[name].shape != tensors[name].shape}
    assert {name for name in changed if name.startswith(BLOCK)} == {
        f"{BLOCK}{name}"
        for name in (
            "gate_proj.weight", "gate_proj.bias", "up_proj.weight", "up_proj.bias",
            "down_proj.weight",
        )
    }  # fmt: skip
    assert all(".mlp." in name and name.startswith("visual.blocks.") for name in changed)
    assert padded[f"{BLOCK}down_proj.weight"].shape[1] == 48
    torch.testing.assert_close(mlp(padded), mlp(tensors), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("vision", "format"), [("int8", INT8), ("fp8", FP8)])
def test_an_engine_holds_the_padded_tower(
    vision: str, format: Format, checkpoint: Path, tmp_path: Path
) -> None:
    manifest = quick_export(checkpoint, "bf16", tmp_path / "engine", quantize_vision=vision)
    assert manifest.formats == dict.fromkeys(vision_linear_shapes(manifest.spec), format)
    source = read_tensors(checkpoint)
    with TensorReader(tmp_path / "engine", read_manifest(tmp_path / "engine")) as reader:
        for name in manifest.formats:
            parts = {
                suffix: reader.get(f"{name}.{suffix}") for suffix in ("weight", "weight_scale")
            }
            found = dequantize(format, parts, torch.float32)
            weight = source[f"{name}.weight"].float()
            rows, columns = weight.shape
            assert not found[rows:].any() and not found[:, columns:].any()
            assert (found[:rows, :columns] - weight).norm() <= 0.04 * weight.norm()
        model = Model.from_tensors(manifest.spec, reader.get, manifest.formats)
    dense = Model.from_tensors(manifest.spec, source.__getitem__)
    pixels = torch.randn(140, manifest.spec.vision.patch_dim)
    with torch.no_grad():
        found, wanted = (m.visual(pixels, (1, 10, 14)) for m in (model, dense))
    # Rounding noise: 8 bits of a token's largest value, or 4 of each value.
    assert (found - wanted).norm() <= (0.03 if vision == "int8" else 0.15) * wanted.norm()
    assert not torch.equal(found, wanted)


def test_an_mlp_that_is_quantized_in_part_is_refused(checkpoint: Path) -> None:
    spec = read_spec(checkpoint)
    formats = dict.fromkeys(vision_linear_shapes(spec), INT8)
    del formats[f"{BLOCK}up_proj"]
    with pytest.raises(EngineError, match=r"blocks\.1\.mlp\.\* are quantized in part"):
        stored_shapes(spec, formats)
