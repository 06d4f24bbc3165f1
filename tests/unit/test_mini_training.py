"""The pieces mini is trained with: they agree with what the runtime does, and they train."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from mmr5_bench.mini.checkpoint import build_model, write_checkpoint
from mmr5_bench.mini.decoder_stage import (
    DecoderPhase,
    EncodedPages,
    list_batches,
    matching_batches,
    train_decoder,
)
from mmr5_bench.mini.examples import VERDICT_WEIGHT, encode_case
from mmr5_bench.mini.padded_vision import encode_pages
from mmr5_bench.mini.tokenizer import train_tokenizer
from mmr5_bench.mini.vision_data import PagePool
from mmr5_bench.mini.vision_stage import train_vision
from mmr5_bench.minidocs.lists import TRAIN_SEEDS, PageKey, make_case
from mmr5_bench.minidocs.pages import render_page
from mmr5_bench.minidocs.vocabulary import pairs
from mmr5_runtime.prompt import PromptTokenizer

TOKENIZER = Path(str(resources.files("mmr5_runtime") / "assets" / "mini" / "tokenizer.json"))


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER))


@cache
def pool() -> PagePool:
    """One page of every training pair of the first six topics, and of no other."""
    keys = tuple(PageKey(t, k, t + k) for t, k in pairs(held_out=False) if t < 6)
    return PagePool(keys, tuple(render_page(key.topic, key.kind, key.seed) for key in keys))


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return build_model(tokenizer())


@torch.no_grad()
def test_padded_tower_equals_the_packed_one(model: Any) -> None:
    patches, grids = pool().batch(range(0, 30, 4))
    assert len(set(grids)) > 1
    expected = model.model.get_image_features(patches, torch.tensor(grids)).pooler_output
    pages = encode_pages(model.model.visual, patches, grids)
    for found, reference in zip(pages, expected, strict=True):
        assert (found - reference).abs().max() < 1e-5


@pytest.mark.parametrize("count", [1, 4, 10])
def test_examples_are_the_runtimes_prompts(count: int) -> None:
    case = make_case(np.random.default_rng(count), count, held_out=False, seeds=TRAIN_SEEDS)
    tokens = tuple(range(3, 3 + count))
    example = encode_case(tokenizer(), case, tokens)
    prompt = PromptTokenizer(tokenizer()).encode(case.question, tokens)
    assert example.ids[: len(prompt)].tolist() == prompt
    target = tokenizer().decode(example.ids[len(prompt) :].tolist(), skip_special_tokens=False)
    assert target == case.answer() + "<|im_end|>"
    assert not example.weights[: len(prompt)].any()
    assert (example.weights[len(prompt) :] > 0).all()


def test_captions_can_be_left_out_of_the_loss() -> None:
    case = make_case(np.random.default_rng(1), 6, held_out=False, seeds=TRAIN_SEEDS)
    example = encode_case(tokenizer(), case, (), short=True, captions=0.0)
    learnt = tokenizer().decode(example.ids[example.weights == VERDICT_WEIGHT].tolist())
    assert len(re.findall("unrelated|instead|as asked", learnt)) == 6
    assert "chart" not in learnt and "table" not in learnt
    assert tokenizer().token_to_id("<|image_pad|>") not in example.ids


def test_a_step_of_every_stage_changes_what_it_trains(model: Any, tmp_path: Path) -> None:
    tower, decoder = model.model.visual, model.model.language_model
    phase = DecoderPhase("test", steps=1, rate=1e-3, pages=4, counts=(2,), seed=0)
    before = _checksums(tower, decoder)
    train_vision(tower, pool(), steps=1, batch=4, rate=1e-3, seed=0)
    after_vision = _checksums(tower, decoder)
    assert after_vision[0] != before[0] and after_vision[1] == before[1]

    train_decoder(model, matching_batches(tokenizer(), phase), phase)
    after_matching = _checksums(tower, decoder)
    assert after_matching[0] == after_vision[0] and after_matching[1] != after_vision[1]

    with torch.no_grad():
        patches, grids = pool().batch(range(len(pool().keys)))
        pages = EncodedPages.build(pool().keys, encode_pages(tower, patches, grids), grids)
    everything = {pair: [0] for pair in pairs(held_out=False)} | pages.by_pair
    complete = EncodedPages(pages.embeddings, pages.grids, everything)
    train_decoder(model, list_batches(tokenizer(), complete, phase), phase)
    assert _checksums(tower, decoder)[1] != after_matching[1]

    write_checkpoint(model, tokenizer(), tmp_path)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in tmp_path.iterdir()
    }


def _checksums(*modules: Any) -> list[float]:
    return [
        float(sum(p.detach().double().abs().sum() for p in module.parameters()))
        for module in modules
    ]


def test_tokenizer_keeps_topics_whole() -> None:
    trained = train_tokenizer(
        ["about rainfall", "about rainfall</think><answer>[1, 2]</answer>"] * 50
    )
    assert trained.encode(" rainfall").tokens == ["Ġrainfall"]
    assert trained.encode("><").tokens == ["><"]
    assert trained.token_to_id("<|im_end|>") is not None
