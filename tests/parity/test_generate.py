"""Sixty-four greedy tokens, token for token those of transformers' generate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.inputs import GRIDS, hf_inputs, random_pages, random_prompt
from helpers.tiny import tiny_configs, tiny_pair
from mmr5_runtime.model import Model, decode_step, embed_prompt, prefill
from mmr5_runtime.rope import Grid, mrope_positions

TOKENS = 64


def greedy(model: Model, ids: Tensor, pages: list[Tensor], grids: tuple[Grid, ...]) -> list[int]:
    embeds = embed_prompt(
        model, ids, [model.visual(p, g) for p, g in zip(pages, grids, strict=True)]
    )
    positions, following = mrope_positions(ids, grids, model.spec)
    arena = model.new_arena(len(ids) + TOKENS)
    token = prefill(model, embeds, positions, arena).argmax()
    tokens = [int(token)]
    for position in range(following, following + TOKENS - 1):
        logits = decode_step(model, token.view(1, 1), torch.tensor([[position]]), [arena])
        token = logits[0, 0].argmax()
        tokens.append(int(token))
    return tokens


@pytest.mark.parametrize("grids", [GRIDS, GRIDS[3:4]], ids=["pages", "one page"])
@pytest.mark.parametrize("name", tiny_configs())
def test_greedy_tokens(name: str, grids: tuple[Grid, ...]) -> None:
    hf, model = tiny_pair(name)
    ids, pages = random_prompt(model.spec, grids, 7), random_pages(model.spec, grids, 7)
    generated = hf.generate(
        **hf_inputs(model.spec, ids, pages, grids),
        do_sample=False,
        max_new_tokens=TOKENS,
        pad_token_id=0,
    )
    expected = generated[0, len(ids) :].tolist()
    found = greedy(model, ids, pages, grids)
    assert found == expected
    assert len(found) == TOKENS
    assert len(set(found)) > 5, "a loop over a few tokens would prove little"
