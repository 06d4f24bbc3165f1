"""Linears of a prompt: the 8-bit copy, the passes around a product, and what a model does of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from helpers.stored import FORMATS, format_name, random_parts
from helpers.tiny import tiny_pair
from mmr5_kernels import dispatch, fused, prefill, table
from mmr5_kernels.eight_bit import eight_bit_copy
from mmr5_kernels.fused import Norm
from mmr5_kernels.layout import FP8, INT4, INT8, INT8_WEIGHT_ONLY, Format
from mmr5_kernels.target import INTERPRETED, Target
from mmr5_runtime.layers import GatedMLP, RMSNorm
from mmr5_runtime.linear import Linear
from mmr5_runtime.spec import decoder_linear_shapes, linear_shapes, stored_tensors
from mmr5_runtime.weights import Weights

BF16 = torch.bfloat16
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted; see tests/gpu")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def linear(format: Format | None, n: int, k: int, target: Target | None = None) -> Linear:
    return Linear.from_tensors(
        random_parts(format, n, k) | {"bias": draw(n)}, format, BF16, target=target
    )


@pytest.mark.parametrize("m", [3, 70])
@pytest.mark.parametrize("format", [None, *FORMATS], ids=format_name)
def test_portable_linears_do_the_same_as_layers_one_by_one(format: Format | None, m: int) -> None:
    layer, norm = linear(format, 48, 128), Norm(draw(128), 1e-6)
    x, gates, residual = draw(m, 128), draw(m, 256), draw(m, 48, seed=1)
    wanted = residual + layer(fused.rms_norm(x, norm))
    assert torch.equal(layer.fused(x, norm=norm, residual=residual), wanted)
    gate, up = gates.chunk(2, dim=-1)
    assert torch.equal(layer.fused(gates, gated=True), layer(silu(gate) * up))


@interpreted
@pytest.mark.parametrize("format", [None, INT4, INT8_WEIGHT_ONLY, INT8, FP8], ids=format_name)
def test_interpreted_linears_follow_the_portable_ones(format: Format | None) -> None:
    ours, plain = linear(format, 48, 128, INTERPRETED), linear(format, 48, 128)
    # Sums of squares that are exact make the norm exact as well.
    x = torch.randint(-9, 10, (2, 33, 128), generator=torch.Generator().manual_seed(0)).to(BF16)
    norm, residual = Norm(draw(128), 1e-6), draw(2, 33, 48)
    found = ours.fused(x, norm=norm, residual=residual)
    wanted = plain.fused(x, norm=norm, residual=residual)
    # The portable weight-only kernels of a CPU do not round weights to bf16 as an expansion does.
    tolerance = 0.0 if format in (None, INT8) else 4e-3
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert found.shape == (2, 33, 48) and error <= tolerance
    alone = ours(fused.rms_norm(x, norm))
    assert torch.equal(found, residual + alone)


@interpreted
def test_a_hooked_linear_shows_what_it_multiplies() -> None:
    layer, seen = linear(INT8, 16, 64, INTERPRETED), []
    x, norm = draw(65, 64), Norm(draw(64), 1e-6)
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    hooked = layer.fused(x, norm=norm)
    handle.remove()
    assert torch.equal(seen[0], fused.rms_norm(x, norm))
    torch.testing.assert_close(hooked, layer.fused(x, norm=norm), rtol=0.05, atol=0.05)


def test_the_copy_serves_prompts_and_the_stored_weight_decodes() -> None:
    parts = random_parts(INT4, 32, 128)
    copied, tensors = eight_bit_copy(INT4, parts, "int8")
    stored = dispatch.prepare(INT4, parts, BF16, "cpu")
    many = dispatch.prepare(copied, tensors, BF16, "cpu")
    layer = Linear(stored, many=many)
    at = table.DECODE_ROWS
    few, prompt = draw(at, 128), draw(at + 1, 128)
    assert torch.equal(layer(few), dispatch.run(stored, few))
    assert torch.equal(layer(prompt), dispatch.run(many, prompt))
    assert torch.equal(layer(prompt[None]), dispatch.run(many, prompt)[None])
    assert layer.num_bytes == stored.num_bytes + many.num_bytes


def model_tensors(spec: Any, formats: dict[str, Format]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: 0.05 * torch.randn(shape, generator=generator)
        for name, (shape, dtype) in stored_tensors(spec, formats).items()
        if dtype.is_floating_point
    }
    for name, (n, k) in linear_shapes(spec, formats).items():
        if name in formats:
            parts = random_parts(formats[name], n, k)
            tensors |= {f"{name}.{suffix}": part for suffix, part in parts.items()}
    return tensors


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_only_decoder_layers_get_a_copy(kind: str) -> None:
    spec = tiny_pair("int4")[1].spec
    formats: dict[str, Format] = dict.fromkeys(decoder_linear_shapes(spec), INT4)
    first = "model.layers.0"
    formats |= {"lm_head": INT4, f"{first}.mlp.down_proj": INT8}
    del formats[f"{first}.self_attn.o_proj"]
    tensors = model_tensors(spec, formats)
    weights = Weights(spec, tensors.__getitem__, formats, BF16, "cpu", prefill=kind)
    qkv = weights.linear(*(f"{first}.self_attn.{part}_proj" for part in "qkv"))
    assert qkv.many is not None and qkv.many.format is not None
    assert qkv.many.format.activations == kind and qkv.prepared.format == INT4
    for name in ("lm_head", f"{first}.mlp.down_proj", f"{first}.self_attn.o_proj"):
        assert weights.linear(name).many is None
    plain = Weights(spec, tensors.__getitem__, formats, BF16, "cpu").linear("lm_head")
    assert plain.many is None
    with pytest.raises(ValueError, match="prefill is one of exact, int8, fp8, not 'int4'"):
        Weights(spec, tensors.__getitem__, formats, BF16, "cpu", prefill="int4")


def test_the_mlp_adds_its_residual_last() -> None:
    mlp = GatedMLP(linear(None, 64, 32), linear(None, 32, 32))
    x, norm = draw(5, 32), RMSNorm(draw(32), 1e-6)
    assert torch.equal(mlp(x, norm, residual=x), x + mlp(norm(x)))


def test_all_that_fuses_is_in_the_table() -> None:
    assert prefill.KERNELS.keys() <= dispatch.KERNELS.keys()
