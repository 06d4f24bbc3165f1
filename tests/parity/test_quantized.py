"""Quantized engines of mini against transformers, fake-quantized with the same arithmetic.

The golden is the transformers model in fp32 whose decoder linears are replaced: int4 by dense
weights unpacked here, int8 by a linear that rounds activations and weights as the format says. A
difference is then a bug, not quantization noise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from helpers.inputs import GRIDS, hf_inputs, random_pages, random_prompt
from mmr5_export import export
from mmr5_runtime.artifact import TensorReader, read_manifest
from mmr5_runtime.model import Model, embed_prompt, prefill
from mmr5_runtime.rope import mrope_positions
from mmr5_runtime.spec import canonical_name

MINI = Path(str(resources.files("mmr5_runtime") / "assets" / "mini"))


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("engines")

    @cache
    def make(quant: str) -> Path:
        export(MINI, quant, root / quant)
        return root / quant

    return make


def _source() -> dict[str, Tensor]:
    tensors = load_file(MINI / "model.safetensors")
    return {canonical_name(name): tensor for name, tensor in tensors.items()}


def _stored(engine: Path) -> dict[str, Tensor]:
    manifest = read_manifest(engine)
    with TensorReader(engine, manifest) as reader:
        return {name: reader.get(name) for name in manifest.tensors}


def _unpack(packed: Tensor) -> Tensor:
    """int32 words of eight offset-binary nibbles, lowest first, to codes in -8..7."""
    nibbles = [(packed >> (4 * place)) & 15 for place in range(8)]
    return torch.stack(nibbles, dim=-1).flatten(1) - 8


class FakeInt8Linear(nn.Module):
    """Per-token activations times per-channel weights, both rounded to int8, summed exactly."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.scale, self.bias = weight.double(), scale.float(), bias

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True).float() / 127
        codes = (x / torch.where(step == 0, 1, step)).round().clamp(-127, 127)
        total = (codes.double() @ self.weight.T).float()
        y = total * step * self.scale.flatten()
        return y if self.bias is None else y + self.bias


def _golden(engine: Path) -> Any:
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(MINI, dtype=torch.float32).eval()
    stored, formats = _stored(engine), read_manifest(engine).formats
    for name, kind in formats.items():
        path = name.replace("model.layers", "model.language_model.layers")
        linear = hf.get_submodule(path)
        scale = stored[f"{name}.weight_scale"].float()
        if kind == "int4":
            codes = _unpack(stored[f"{name}.weight_packed"]).float()
            linear.weight.data = codes * scale.repeat_interleave(128, dim=1)
        else:
            replaced = FakeInt8Linear(stored[f"{name}.weight"], scale, linear.bias)
            hf.get_submodule(path.rpartition(".")[0]).register_module(
                path.rpartition(".")[2], replaced
            )
    return hf


@torch.no_grad()
def _both(engine: Path) -> tuple[Tensor, Tensor]:
    """Logits [T, V] of the golden and of the engine on one prompt of five pages."""
    manifest = read_manifest(engine)
    with TensorReader(engine, manifest) as reader:
        ours = Model.from_tensors(manifest.spec, reader.get, manifest.formats)
    ids, pages = random_prompt(ours.spec, GRIDS, 3), random_pages(ours.spec, GRIDS, 3)
    embeds = embed_prompt(ours, ids, [ours.visual(p, g) for p, g in zip(pages, GRIDS, strict=True)])
    positions, _ = mrope_positions(ids, GRIDS, ours.spec)
    found = prefill(ours, embeds, positions, ours.new_arena(len(ids)), all_logits=True)
    expected = _golden(engine)(**hf_inputs(ours.spec, ids, pages, GRIDS)).logits[0]
    return expected, found


def test_int4_logits_equal_the_golden(engines: Callable[[str], Path]) -> None:
    expected, found = _both(engines("int4"))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_int8_logits_follow_the_golden(engines: Callable[[str], Path]) -> None:
    expected, found = _both(engines("int8"))
    # A last-bit difference in front of a rounding moves an activation by a whole step of 1/127,
    # and what that changes can grow through the layers. Each linear on its own is held to its
    # golden below.
    error = (found - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert error <= 2e-3
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() >= 0.99


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_every_linear_equals_its_golden_on_what_it_gets(
    engines: Callable[[str], Path], quant: str
) -> None:
    engine = engines(quant)
    manifest, stored = read_manifest(engine), _stored(engine)
    with TensorReader(engine, manifest) as reader:
        ours = Model.from_tensors(manifest.spec, reader.get, manifest.formats)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    layers: Any = ours.decoder.layers  # nn.ModuleList does not know what it holds
    for index, layer in enumerate(layers):
        attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
        for names, linear in (
            ([f"{attention}{part}_proj" for part in "qkv"], layer.qkv),
            ([f"{attention}o_proj"], layer.o_proj),
            ([f"{mlp}gate_proj", f"{mlp}up_proj"], layer.mlp.gate_up),
            ([f"{mlp}down_proj"], layer.mlp.down),
        ):
            key = " ".join(names)
            linear.register_forward_hook(
                lambda _, x, y, key=key: seen.update({key: (x[0].clone(), y.clone())})
            )
    ids = random_prompt(ours.spec, (), 3)
    positions, _ = mrope_positions(ids, [], ours.spec)
    prefill(ours, embed_prompt(ours, ids, []), positions, ours.new_arena(len(ids)))

    assert sum(len(key.split()) for key in seen) == len(manifest.formats)
    for key, (x, y) in seen.items():
        golden = torch.cat([_linear(name, quant, stored)(x) for name in key.split()], dim=-1)
        assert (y - golden).abs().max() <= 5e-6 * golden.abs().max(), key


def _linear(name: str, quant: str, stored: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """The golden of one stored linear."""
    scale, bias = stored[f"{name}.weight_scale"].float(), stored.get(f"{name}.bias")
    bias = None if bias is None else bias.float()
    if quant == "int8":
        return FakeInt8Linear(stored[f"{name}.weight"], scale, bias)
    weight = _unpack(stored[f"{name}.weight_packed"]).float() * scale.repeat_interleave(128, 1)
    return lambda x: nn.functional.linear(x, weight, bias)


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_stored_codes_are_the_rounded_weights(engines: Callable[[str], Path], quant: str) -> None:
    source, stored = _source(), _stored(engines(quant))
    for name in read_manifest(engines(quant)).formats:
        weight = source[f"{name}.weight"].float()
        scale = stored[f"{name}.weight_scale"].float()
        if quant == "int4":
            codes, step = _unpack(stored[f"{name}.weight_packed"]), scale.repeat_interleave(128, 1)
            limits = (-8, 7)
        else:
            codes, step, limits = stored[f"{name}.weight"], scale, (-127, 127)
        assert torch.equal(codes.float(), (weight / step).round().clamp(*limits))


@pytest.mark.parametrize(("quant", "least"), [("int8", 35.0), ("int4", 12.0)])
def test_every_layer_reports_its_sqnr(
    engines: Callable[[str], Path], quant: str, least: float
) -> None:
    manifest = read_manifest(engines(quant))
    report = manifest.report["sqnr_db"]
    assert set(report) == set(manifest.formats) and len(report) == 4 * 7
    assert all(value is not None and value > least for value in report.values())


def test_bf16_engine_holds_the_source_bits(engines: Callable[[str], Path]) -> None:
    stored, source = _stored(engines("bf16")), _source()
    assert set(stored) == set(source)
    assert all(torch.equal(stored[name], source[name]) for name in source)
