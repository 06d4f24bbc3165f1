"""Quantized engines of mini against transformers, fake-quantized with the same arithmetic.

The golden is the transformers model in fp32 whose quantized linears are replaced: weight-only ones
by dense weights unpacked here, W8A8 ones by a linear that rounds activations and weights as the
format says. A difference is then a bug, not quantization noise.
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

from helpers.exporting import quick_export
from helpers.inputs import GRIDS, hf_inputs, random_pages, random_prompt
from mmr5_kernels.layout import Format
from mmr5_runtime.artifact import TensorReader, read_manifest
from mmr5_runtime.model import Model, embed_prompt, prefill
from mmr5_runtime.rope import mrope_positions
from mmr5_runtime.spec import canonical_name

ENGINES: dict[str, dict[str, Any]] = {
    "bf16": {"quant": "bf16"},
    "int8": {"quant": "int8"},
    "fp8": {"quant": "fp8", "lm_head": "bf16"},
    "int8-weight-only": {"quant": "int8-weight-only"},
    "int4": {"quant": "int4"},
    "int4-asymmetric": {"quant": "int4", "lm_head": "int4", "group_size": 32, "symmetric": False},
    "vision-int8": {"quant": "bf16", "quantize_vision": "int8"},
    "vision-fp8": {"quant": "int4", "quantize_vision": "fp8"},
}
QUANTIZED = [name for name in ENGINES if name != "bf16"]
WEIGHT_ONLY = ("int4", "int4-asymmetric", "int8-weight-only")
MINI = Path(str(resources.files("mmr5_runtime") / "assets" / "mini"))


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("engines")

    @cache
    def make(name: str) -> Path:
        quick_export(MINI, output=root / name, **ENGINES[name])
        return root / name

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


class FakeW8A8Linear(nn.Module):
    """Per-token activations times per-channel weights, both rounded, their codes summed in fp64."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.largest = 127 if weight.dtype == torch.int8 else 448
        self.weight, self.scale, self.bias = weight.double(), scale.float(), bias

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True).float() / self.largest
        codes = (x / torch.where(step == 0, 1, step)).clamp(-self.largest, self.largest)
        whole = self.largest == 127
        codes = codes.round() if whole else codes.to(torch.float8_e4m3fn).float()
        total = (codes.double() @ self.weight.T).float()
        y = total * step * self.scale.flatten()
        return y if self.bias is None else y + self.bias


def _fake(name: str, format: Format, stored: dict[str, Tensor]) -> nn.Module:
    """The golden of one stored linear, in fp32."""
    bias = stored.get(f"{name}.bias")
    bias = None if bias is None else bias.float()
    scale = stored[f"{name}.weight_scale"].float()
    if format.activations:
        return FakeW8A8Linear(stored[f"{name}.weight"], scale, bias)
    packed = stored.get(f"{name}.weight_packed")
    codes = _unpack(packed) if packed is not None else stored[f"{name}.weight"]
    if not format.symmetric:
        zero = stored[f"{name}.weight_zero_point"]
        codes = codes - zero.repeat_interleave(format.group_size or 1, dim=1)
    weight = codes.float() * scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
    linear = nn.Linear(codes.shape[1], codes.shape[0], bias is not None)
    linear.weight.data = weight
    if bias is not None:
        linear.bias.data = bias
    return linear


def _golden(engine: Path) -> Any:
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(MINI, dtype=torch.float32).eval()
    stored = _stored(engine)
    for name, format in read_manifest(engine).formats.items():
        path = name.replace("model.layers", "model.language_model.layers")
        path = path.replace("visual.", "model.visual.")
        parent, _, child = path.rpartition(".")
        hf.get_submodule(parent).register_module(child, _fake(name, format, stored))
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


@torch.no_grad()
def _golden_moved(engine: Path) -> Tensor:
    """Logits [T, V] of the golden when its inputs are a unit or two in the last place off."""
    spec, golden = read_manifest(engine).spec, _golden(engine)
    ids, pages = random_prompt(spec, GRIDS, 3), random_pages(spec, GRIDS, 3)
    generator = torch.Generator().manual_seed(0)
    embeddings = golden.get_input_embeddings().weight
    for tensor in (embeddings.data, *pages):
        tensor.mul_(1 + 2**-22 * torch.randn(tensor.shape, generator=generator))
    logits: Tensor = golden(**hf_inputs(spec, ids, pages, GRIDS)).logits[0]
    return logits


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_weight_only_logits_equal_the_golden(engines: Callable[[str], Path], name: str) -> None:
    expected, found = _both(engines(name))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ["int8", "fp8", "vision-int8", "vision-fp8"])
def test_w8a8_logits_follow_the_golden(engines: Callable[[str], Path], name: str) -> None:
    engine = engines(name)
    expected, found = _both(engine)
    # A last-bit difference in front of a rounding moves an activation by a whole step, and what
    # that changes can grow through the layers. By how much depends on the weights, so the golden
    # itself tells: with its inputs a unit in the last place off, its logits moved by 3e-3, 6e-3,
    # 4e-3 and 9e-3, those of the engine were off by 3, 5, 4 and 15e-3. Each linear on its own is
    # held to its golden below.
    assert _difference(found, expected) <= 3 * _difference(_golden_moved(engine), expected)
    if name == "int8":
        assert (found.argmax(-1) == expected.argmax(-1)).float().mean() >= 0.99


def _linears(model: Model) -> dict[tuple[str, ...], Any]:
    """Every linear of our model, by the names of those that run as one."""
    found: dict[tuple[str, ...], Any] = {("lm_head",): model.decoder.lm_head}
    layers: Any = model.decoder.layers  # nn.ModuleList does not know what it holds
    for index, layer in enumerate(layers):
        attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
        found[tuple(f"{attention}{part}_proj" for part in "qkv")] = layer.qkv
        found[f"{attention}o_proj",] = layer.o_proj
        found[f"{mlp}gate_proj", f"{mlp}up_proj"] = layer.mlp.gate_up
        found[f"{mlp}down_proj",] = layer.mlp.down
    blocks: Any = model.visual.blocks
    for index, block in enumerate(blocks):
        name = f"visual.blocks.{index}."
        found[f"{name}attn.qkv",], found[f"{name}attn.proj",] = block.qkv, block.proj
        found[f"{name}mlp.gate_proj", f"{name}mlp.up_proj"] = block.mlp.gate_up
        found[f"{name}mlp.down_proj",] = block.mlp.down
    found["visual.merger.mlp.0",] = model.visual.merger_in
    found["visual.merger.mlp.2",] = model.visual.merger_out
    return found


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_linear_equals_its_golden_on_what_it_gets(
    engines: Callable[[str], Path], name: str
) -> None:
    engine = engines(name)
    manifest, stored = read_manifest(engine), _stored(engine)
    with TensorReader(engine, manifest) as reader:
        ours = Model.from_tensors(manifest.spec, reader.get, manifest.formats)
    seen: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
    for names, linear in _linears(ours).items():
        linear.register_forward_hook(
            lambda _, x, y, names=names: seen.update({names: (x[0].clone(), y.clone())})
        )
    ids, pages = random_prompt(ours.spec, GRIDS, 3), random_pages(ours.spec, GRIDS, 3)
    embeds = [ours.visual(p, g) for p, g in zip(pages, GRIDS, strict=True)]
    positions, _ = mrope_positions(ids, GRIDS, ours.spec)
    prefill(ours, embed_prompt(ours, ids, embeds), positions, ours.new_arena(len(ids)))

    checked = {names: hook for names, hook in seen.items() if names[0] in manifest.formats}
    assert sum(len(names) for names in checked) == len(manifest.formats)
    for names, (x, y) in checked.items():
        fakes = [_fake(part, manifest.formats[part], stored) for part in names]
        golden = torch.cat([fake(x) for fake in fakes], dim=-1)
        assert (y - golden).abs().max() <= 5e-6 * golden.abs().max(), names


@pytest.mark.parametrize("name", QUANTIZED)
def test_stored_codes_are_the_rounded_weights(engines: Callable[[str], Path], name: str) -> None:
    source, stored = _source(), _stored(engines(name))
    source["lm_head.weight"] = source["model.embed_tokens.weight"]
    for linear, format in read_manifest(engines(name)).formats.items():
        weight = source[f"{linear}.weight"].float()
        scale = stored[f"{linear}.weight_scale"].float()
        steps = weight / scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
        if format.weights == "fp8":
            expected = steps.clamp(-448, 448).to(torch.float8_e4m3fn).float()
            assert torch.equal(stored[f"{linear}.weight"].float(), expected)
            continue
        zero = stored.get(f"{linear}.weight_zero_point", torch.zeros_like(scale))
        zero = zero.float().repeat_interleave(weight.shape[1] // scale.shape[1], 1)
        if format.weights == "int4":
            codes, limits = _unpack(stored[f"{linear}.weight_packed"]), (-8, 7)
        else:
            codes, limits = stored[f"{linear}.weight"], (-127, 127)
        assert torch.equal(codes.float(), (steps.round() + zero).clamp(*limits))


# By what the linears of an engine lose least; 6 dB per bit, fp8 has the 4 bits of its significand.
LEAST_DB = {"w4a16-g128": 12.0, "w4a16-g32-asym": 17.0, "w8a8-fp8": 29.0}


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_layer_reports_its_sqnr(engines: Callable[[str], Path], name: str) -> None:
    manifest = read_manifest(engines(name))
    report = manifest.report["sqnr_db"]
    assert report.keys() == manifest.formats.keys()
    for linear, value in report.items():
        format = manifest.formats[linear]
        assert value is not None and value > LEAST_DB.get(format.name, 35.0), (linear, value)


def test_bf16_engine_holds_the_source_bits(engines: Callable[[str], Path]) -> None:
    stored, source = _stored(engines("bf16")), _source()
    assert set(stored) == set(source)
    assert all(torch.equal(stored[name], source[name]) for name in source)
