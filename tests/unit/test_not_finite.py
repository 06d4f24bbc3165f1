"""The part of the model that is named when logits turn out to hold NaN."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from helpers.inputs import random_pages, random_prompt
from helpers.tiny import make_hf_model, tiny_configs
from mmr5_runtime.engine import Engine
from mmr5_runtime.finite import first_not_finite
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.model import Model, embed_prompt, prefill
from mmr5_runtime.rope import mrope_positions
from mmr5_runtime.spec import ModelSpec, canonical_name

GRIDS = ((1, 4, 4), (1, 2, 6))
SPEC = ModelSpec.from_hf_config(json.loads(tiny_configs()["int4"].to_json_string(use_diff=False)))


def poisoned(name: str) -> Model:
    """A tiny model with one weight of ``name`` replaced by NaN."""
    hf = make_hf_model(tiny_configs()["int4"], seed=1)
    tensors = {canonical_name(key): tensor for key, tensor in hf.state_dict().items()}

    def get(asked: str) -> Tensor:
        tensor: Tensor = tensors[asked].clone()
        if asked == name:
            tensor.flatten()[5] = float("nan")
        return tensor

    return Model.from_tensors(SPEC, get)


def read(model: Model) -> tuple[Tensor, int, int, KVArena]:
    """Logits of a prompt, its last token and position, and the arena that ends with it."""
    ids = random_prompt(model.spec, GRIDS)
    pages = [
        model.visual(page, grid)
        for page, grid in zip(random_pages(SPEC, GRIDS), GRIDS, strict=True)
    ]
    positions, _ = mrope_positions(ids, GRIDS, model.spec)
    arena = model.new_arena(len(ids))
    logits = prefill(model, embed_prompt(model, ids, pages), positions, arena)
    return logits, int(ids[-1]), int(positions[0, -1]), arena


@pytest.mark.parametrize(
    ("weight", "place"),
    [
        ("model.layers.1.mlp.down_proj.weight", "layer 1, down_proj"),
        ("model.layers.2.mlp.up_proj.weight", "layer 2, gate_up_proj"),
        ("model.layers.0.self_attn.k_proj.weight", "layer 0, qkv_proj"),
        ("model.layers.1.self_attn.o_proj.weight", "layer 1, o_proj"),
        ("model.layers.2.input_layernorm.weight", "layer 2, input norm"),
        ("model.layers.0.post_attention_layernorm.weight", "layer 0, post-attention norm"),
        ("model.norm.weight", "the final norm"),
        ("lm_head.weight", "lm_head"),
        (
            "visual.merger.mlp.2.weight",
            "layer 0, attention over the keys and values of the tokens before, from the page "
            "embeddings",
        ),
    ],
)
@torch.no_grad()
def test_the_first_part_that_is_not_finite_is_named(weight: str, place: str) -> None:
    model = poisoned(weight)
    logits, token, position, arena = read(model)
    assert not logits.isfinite().all()
    length = arena.length
    error = Engine(model, torch.device("cpu")).not_finite(token, position, arena)
    assert f"the logits are not finite, first in {place}; the weights are damaged" in str(error)
    assert arena.length == length


@torch.no_grad()
def test_nothing_is_named_where_everything_is_finite() -> None:
    model = poisoned("none")
    logits, token, position, arena = read(model)
    assert logits.isfinite().all()
    assert first_not_finite(model, token, position, arena) is None
    error = Engine(model, torch.device("cpu")).not_finite(token, position, arena)
    assert "but not when that token was run again" in str(error)
