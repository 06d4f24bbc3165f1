"""The Linear of every format: against the kernels' specification, fused and alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.stored import FORMATS, format_name, random_parts
from helpers.tiny import tiny_pair
from mmr5_kernels import reference
from mmr5_kernels.layout import INT8, INT8_WEIGHT_ONLY, Format
from mmr5_runtime.linear import Linear, concat_rows
from mmr5_runtime.model import Model
from mmr5_runtime.spec import (
    ModelSpec,
    decoder_linear_shapes,
    linear_shapes,
    stored_tensors,
)
from mmr5_runtime.types import CheckpointError, EngineError

KINDS = (None, *FORMATS)
K = 256


def stored(
    format: Format | None, n: int, k: int = K, bias: bool = True, seed: int = 0
) -> dict[str, Tensor]:
    """Random tensors of one linear as an engine folder keeps them, without ``weight_shape``."""
    tensors = random_parts(format, n, k, seed)
    tensors.pop("weight_shape", None)
    if bias:
        generator = torch.Generator().manual_seed(seed)
        tensors["bias"] = (0.1 * torch.randn(n, generator=generator)).bfloat16()
    return tensors


def specified(format: Format | None, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """What the product must be, by the reference of the kernels."""
    bias = tensors["bias"].to(x.dtype) if "bias" in tensors else None
    if format is None:
        return torch.nn.functional.linear(x, tensors["weight"].to(x.dtype), bias)
    product = {"int8": reference.linear_int8, "fp8": reference.linear_fp8}.get(
        format.activations or "", reference.linear_weight_only
    )
    return product(x, format, tensors, bias)


@pytest.mark.parametrize("rows", [1, 8, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("format", KINDS, ids=format_name)
def test_equals_the_specification(format: Format | None, dtype: torch.dtype, rows: int) -> None:
    tensors = stored(format, 48)
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)).to(dtype)
    found = Linear.from_tensors(tensors, format, dtype)(x)
    assert found.dtype == dtype and found.shape == (rows, 48)
    noise_db = reference.sqnr_db(specified(format, tensors, x), found)
    # fp32 differs by the order of sums only; in bf16 the packing kernels round elsewhere (4e-3).
    assert noise_db >= (100 if dtype == torch.float32 else 45)


@pytest.mark.parametrize("format", KINDS, ids=format_name)
def test_any_leading_shape(format: Format | None) -> None:
    tensors = stored(format, 16, bias=False)
    layer = Linear.from_tensors(tensors, format, torch.float32)
    x = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(x), layer(x.flatten(0, 1)).unflatten(0, (2, 3)))
    assert layer(x[0, 0]).shape == (16,)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("format", KINDS, ids=format_name)
def test_fused_linears_give_their_outputs_side_by_side(format: Format | None, bias: bool) -> None:
    parts = [stored(format, n, bias=bias, seed=n) for n in (48, 16, 32)]
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(2))
    fused = Linear.from_tensors(concat_rows(parts), format, torch.float32)
    alone = [Linear.from_tensors(part, format, torch.float32)(x) for part in parts]
    torch.testing.assert_close(fused(x), torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)


def test_memory_is_shared_only_where_it_says_so() -> None:
    weight = torch.randn(4, K)
    given = Linear.from_tensors({"weight": weight}, None, torch.float32)
    joined = Linear.from_tensors(concat_rows([{"weight": weight}]), None, torch.float32)
    x = torch.ones(1, K)
    before = joined(x)
    weight.zero_()
    assert not given(x).any()
    assert torch.equal(joined(x), before)


def quantized_tensors(spec: ModelSpec, formats: dict[str, Format]) -> dict[str, Tensor]:
    """Random tensors of a whole model whose linears are stored as ``formats`` says."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator)
        for name, (shape, _) in stored_tensors(spec, formats).items()
    }
    for seed, (name, (n, k)) in enumerate(linear_shapes(spec, formats).items()):
        if name in formats:
            parts = random_parts(formats[name], n, k, seed)
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in parts.items()}
    return tensors


def formats_in(module: torch.nn.Module) -> list[Format | None]:
    return [m.prepared.format for m in module.modules() if isinstance(m, Linear)]


@pytest.mark.parametrize("format", FORMATS, ids=format_name)
def test_a_model_loads_every_decoder_linear_quantized(format: Format) -> None:
    spec = tiny_pair("int4")[1].spec
    formats = dict.fromkeys(decoder_linear_shapes(spec), format)
    model = Model.from_tensors(spec, quantized_tensors(spec, formats).__getitem__, formats)
    found = formats_in(model.decoder)
    assert found.count(format) == 4 * spec.text.num_layers and found.count(None) == 1
    assert set(formats_in(model.visual)) == {None}


@pytest.mark.parametrize("name", ["int4", "tied"])
def test_a_head_with_a_format_is_used_tied_or_not(name: str) -> None:
    spec = tiny_pair(name)[1].spec
    formats = {"lm_head": INT8_WEIGHT_ONLY}
    tensors = quantized_tensors(spec, formats)
    model = Model.from_tensors(spec, tensors.__getitem__, formats)
    x = torch.randn(3, spec.text.hidden_size, generator=torch.Generator().manual_seed(0))
    head = {part: tensors[f"lm_head.{part}"] for part in ("weight", "weight_scale")}
    wanted = reference.linear_weight_only(model.decoder.norm(x), INT8_WEIGHT_ONLY, head)
    torch.testing.assert_close(model.decoder.logits(x), wanted)
    assert torch.equal(model.decoder.embed_tokens, tensors["model.embed_tokens.weight"])


def broken(name: str, tensor: Tensor | None) -> Model:
    """Loads a dense model after replacing (or removing) one tensor."""
    spec = tiny_pair("int4")[1].spec
    tensors = quantized_tensors(spec, {}) | ({} if tensor is None else {name: tensor})
    if tensor is None:
        del tensors[name]
    return Model.from_tensors(spec, tensors.__getitem__)


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (None, f"lack {DOWN}"),
        (torch.zeros(128, 255), rf"{DOWN} has shape \[128, 255\] but the config says \[128, 256\]"),
        (torch.zeros(128, 256, dtype=torch.int8), f"{DOWN} is stored as torch.int8"),
    ],
    ids=["missing", "shape", "dtype"],
)
def test_a_tensor_that_does_not_fit_is_named(tensor: Tensor | None, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        broken(DOWN, tensor)


def test_quantized_codes_of_another_dtype_are_named() -> None:
    spec = tiny_pair("int4")[1].spec
    name = "model.layers.0.mlp.down_proj"
    tensors = quantized_tensors(spec, {name: INT8})
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].float()
    with pytest.raises(CheckpointError, match=f"{name}.weight is stored as torch.float32"):
        Model.from_tensors(spec, tensors.__getitem__, {name: INT8})


def test_linears_that_run_as_one_need_one_format() -> None:
    spec = tiny_pair("int4")[1].spec
    formats = {"model.layers.0.self_attn.q_proj": INT8}
    with pytest.raises(EngineError, match="stored differently"):
        Model.from_tensors(spec, quantized_tensors(spec, formats).__getitem__, formats)


def test_a_dtype_that_no_kernel_computes_names_the_linear() -> None:
    spec = tiny_pair("int4")[1].spec
    with pytest.raises(EngineError, match="visual.patch_embed.proj cannot be run: no kernel"):
        Model.from_tensors(spec, quantized_tensors(spec, {}).__getitem__, {}, torch.float64)
