"""Engines of random weights: every format reranks, at its forced length, in its planned bytes."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from mmr5_bench.random_engine import random_engine, random_reranker, random_transformers
from mmr5_bench.random_weights.shapes import (
    QUANTS,
    SHAPES,
    Quant,
    Shape,
    config_7b,
    first_special_id,
    formats_of,
    spec_of,
    stored_bytes,
)
from mmr5_bench.random_weights.tensors import RandomTensors
from mmr5_bench.random_weights.tokens import padded_tokenizer_json
from mmr5_export.plan import make_plan
from mmr5_kernels.layout import unpack_int4
from mmr5_kernels.reference import dequantize
from mmr5_runtime import RerankResult
from mmr5_runtime.image import DEFAULT_MAX_PIXELS, DEFAULT_MIN_PIXELS
from mmr5_runtime.model import native_model
from mmr5_runtime.prompt import template_sha256
from mmr5_runtime.reuse.config import CacheConfig
from mmr5_runtime.spec import decoder_linear_shapes, stored_tensors

PAGES = [Image.new("RGB", (84, 112), (80 * i, 90, 120)) for i in range(3)]


def rerank(quant: Quant, tokens: int, seed: int = 7) -> RerankResult:
    off = CacheConfig.off()
    with random_reranker("tiny", quant, "cpu", "float32", cache=off, seed=seed) as reranker:
        return reranker.rerank(
            "What is shown?", PAGES, max_new_tokens=tokens, stop="eos", constrain=False
        )


@pytest.mark.parametrize("quant", QUANTS)
def test_every_format_reranks_to_its_forced_length(quant: Quant) -> None:
    for tokens in (1, 5):
        result = rerank(quant, tokens)
        assert result.usage.completion_tokens == tokens
        assert (result.stop_reason, result.status) == ("max_tokens", "fallback")
        assert result.order == (0, 1, 2) and result.usage.image_tokens == 3 * 12


def test_a_long_answer_holds_its_length_and_the_seed_decides_it() -> None:
    first = rerank("int4", 40)
    assert first.usage.completion_tokens == 40
    assert rerank("int4", 40).text == first.text
    assert rerank("int4", 40, seed=8).text != first.text


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quant", QUANTS)
def test_bytes_are_those_that_the_exporter_plans(shape: Shape, quant: Quant) -> None:
    plan = make_plan(spec_of(shape), formats_of(shape, quant))
    assert stored_bytes(shape, quant) == plan.num_bytes


def test_the_7b_shape_is_the_published_one() -> None:
    spec = spec_of("7b")
    assert stored_bytes("7b", "bf16") == 2 * 8_292_166_656  # parameters of Qwen2.5-VL-7B
    assert stored_bytes("7b", "int4") == pytest.approx(6.35e9, rel=1e-3)
    assert (spec.text.num_layers, spec.vision.depth, spec.text.vocab_size) == (28, 32, 152064)
    assert spec.vision.fullatt_block_indexes == (7, 15, 23, 31)
    assert (spec.image_token_id, spec.eos_token_ids) == (151655, (151645, 151643))
    assert config_7b(2, 2)["vision_config"]["fullatt_block_indexes"] == [1]


def test_the_tokenizer_has_the_ids_of_the_checkpoint_and_the_model_has_more() -> None:
    loaded = random_engine("tiny", "bf16", "cpu", "float32")
    tokenizer, spec = loaded.tokenizer, loaded.engine.spec
    assert tokenizer.image_pad_id == spec.image_token_id
    known = tokenizer.tokenizer.get_vocab_size()
    assert first_special_id("tiny") < known < spec.text.vocab_size
    assert tokenizer.decode([first_special_id("tiny") - 1]) == "[unused 1999]"
    # Ids that no text has, and those of special tokens, are nothing and break nothing.
    assert tokenizer.decode([known, spec.text.vocab_size - 1, spec.image_token_id]) == ""
    assert len(loaded.language.vocabulary) == spec.text.vocab_size
    assert loaded.language.vocabulary[known:] == (b"",) * (spec.text.vocab_size - known)
    assert tokenizer.template.sha256 == template_sha256()
    assert loaded.budget.min_pixels == DEFAULT_MIN_PIXELS
    assert loaded.budget.max_pixels == DEFAULT_MAX_PIXELS


def test_words_of_the_prompt_are_single_tokens() -> None:
    loaded = random_engine("tiny", "bf16", "cpu", "float32")
    text = loaded.tokenizer.template.system
    words = loaded.tokenizer.tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert len(loaded.tokenizer.text_ids(text)) == len(words)


@pytest.mark.parametrize("quant", ["int4", "int8", "fp8"])
def test_packed_weights_keep_the_size_of_activations(quant: Quant) -> None:
    spec, formats = spec_of("tiny"), formats_of("tiny", quant)
    tensors = RandomTensors(spec, formats, "cpu")
    for name, (rows, columns) in decoder_linear_shapes(spec).items():
        format = formats[name]
        stored = format.tensors(rows, columns)
        parts = {suffix: tensors.get(f"{name}.{suffix}") for suffix in stored}
        for suffix, (shape, dtype) in stored.items():
            assert (tuple(parts[suffix].shape), parts[suffix].dtype) == (shape, dtype)
        weight = dequantize(format, parts, torch.float32)
        assert float(weight.std()) == pytest.approx(columns**-0.5, rel=0.05)
        assert abs(float(weight.mean())) < 0.02 * columns**-0.5


def test_int4_codes_are_symmetric() -> None:
    tensors = RandomTensors(spec_of("tiny"), formats_of("tiny", "int4"), "cpu")
    codes = unpack_int4(tensors.get("model.layers.0.mlp.down_proj.weight_packed"))
    assert codes.unique().tolist() == list(range(-7, 8))


@pytest.mark.parametrize("quant", ["bf16", "int4"])
def test_end_tokens_never_win(quant: Quant) -> None:
    loaded = random_engine("tiny", quant, "cpu", "float32")
    decoder, spec = native_model(loaded.engine.model).decoder, loaded.engine.spec
    with torch.no_grad():
        logits = decoder.logits(torch.randn(4, spec.text.hidden_size))
    assert torch.isfinite(logits).all() and 0.5 < float(logits.std()) < 2
    assert not logits[:, list(spec.eos_token_ids)].any()


def test_weights_are_drawn_as_they_are_asked_for() -> None:
    spec, formats = spec_of("tiny"), formats_of("tiny", "int8")
    a, b, c = (RandomTensors(spec, formats, "cpu", seed) for seed in (1, 1, 2))
    name = "model.layers.0.mlp.up_proj.weight"
    drawn = a.get(name)
    assert torch.equal(drawn, b.get(name)) and not torch.equal(drawn, c.get(name))
    with pytest.raises(KeyError):
        a.get("model.layers.9.mlp.up_proj.weight")
    assert set(stored_tensors(spec, formats)) >= {name}


def test_transformers_gets_the_same_shape_and_goes_on_to_any_length() -> None:
    model = random_transformers("tiny", "cpu", torch.float32)
    spec = spec_of("tiny")
    # The embedding and the head of ours are stored apart as well: nothing is tied.
    assert sum(math.prod(p.shape) for p in model.parameters()) * 2 == stored_bytes("tiny", "bf16")
    ids = torch.randint(0, 500, (1, 20), generator=torch.Generator().manual_seed(0))
    written = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False
    )
    assert written.shape == (1, 60)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.isfinite(logits).all() and logits.shape[-1] == spec.text.vocab_size
    assert not model.training and model.config.image_token_id == spec.image_token_id


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="shape '3b' is unknown; pass one of 7b, tiny"):
        random_engine("3b", "int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quant 'int3' is unknown"):
        random_engine("tiny", "int3", "cpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="do not fit below id 300; train fewer"):
        padded_tokenizer_json(300)
