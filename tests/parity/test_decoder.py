"""Prefill and decode step against transformers and against themselves in other pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration

from helpers.inputs import GRIDS, hf_inputs, random_pages, random_prompt
from helpers.tiny import (
    Layout,
    load_model,
    make_hf_model,
    tiny_configs,
    tiny_pair,
    write_checkpoint,
)
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.model import Model, decode_step, embed_prompt, prefill
from mmr5_runtime.rope import Grid, mrope_positions
from mmr5_runtime.types import ContextOverflowError, RequestError

TOLERANCE = 1e-4


def prepared(
    model: Model, grids: tuple[Grid, ...] = GRIDS, seed: int = 0
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, int]:
    """Token ids, pages, embeddings [T, hidden], positions [3, T] and the next position."""
    ids = random_prompt(model.spec, grids, seed)
    pages = random_pages(model.spec, grids, seed)
    embeds = embed_prompt(
        model, ids, [model.visual(p, g) for p, g in zip(pages, grids, strict=True)]
    )
    return ids, pages, embeds, *mrope_positions(ids, grids, model.spec)


@torch.no_grad()
def hf_logits(
    hf: object, model: Model, ids: Tensor, pages: list[Tensor], grids: tuple[Grid, ...]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """transformers' logits [T, V] and its keys and values, one pair [K, T, D] per layer."""
    assert callable(hf)
    inputs, cache = hf_inputs(model.spec, ids, pages, grids), DynamicCache()
    logits = hf(**inputs, past_key_values=cache, use_cache=True).logits[0]
    return logits.float(), [(layer.keys[0], layer.values[0]) for layer in cache.layers]


@pytest.mark.parametrize("grids", [GRIDS, GRIDS[2:3], ()], ids=["pages", "one page", "no page"])
@pytest.mark.parametrize("name", tiny_configs())
def test_logits_keys_and_values(name: str, grids: tuple[Grid, ...]) -> None:
    hf, model = tiny_pair(name)
    ids, pages, embeds, positions, _ = prepared(model, grids)
    expected, cache = hf_logits(hf, model, ids, pages, grids)
    arena = model.new_arena(len(ids))
    found = prefill(model, embeds, positions, arena, all_logits=True)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= TOLERANCE
    assert arena.length == len(ids)
    for layer, (keys, values) in enumerate(cache):
        assert (arena.k[layer] - keys).abs().max() <= TOLERANCE
        assert (arena.v[layer] - values).abs().max() <= TOLERANCE


@pytest.mark.parametrize("cuts", [(1,), (7, 8), (30, 31, 90), tuple(range(1, 60))])
@pytest.mark.parametrize("name", ["three_heads", "tied", "small_patches"])
def test_prefill_in_segments_equals_one_shot(name: str, cuts: tuple[int, ...]) -> None:
    _, model = tiny_pair(name)
    _, _, embeds, positions, _ = prepared(model)
    whole, pieces = model.new_arena(200), model.new_arena(200)
    expected = prefill(model, embeds, positions, whole, all_logits=True)
    parts = zip(embeds.tensor_split(cuts), positions.tensor_split(cuts, dim=1), strict=True)
    found = torch.cat([prefill(model, e, p, pieces, all_logits=True) for e, p in parts])
    assert (found - expected).abs().max() <= 1e-5
    assert pieces.length == whole.length
    assert (pieces.k - whole.k).abs().max() <= 1e-5
    assert (pieces.v - whole.v).abs().max() <= 1e-5


def test_last_logits_are_the_last_of_all() -> None:
    _, model = tiny_pair("tied")
    _, _, embeds, positions, _ = prepared(model)
    every = prefill(model, embeds, positions, model.new_arena(200), all_logits=True)
    last = prefill(model, embeds, positions, model.new_arena(200))
    torch.testing.assert_close(last, every[-1], atol=1e-5, rtol=0)


def prompts(model: Model, count: int) -> list[tuple[KVArena, int, Tensor, list[Tensor]]]:
    """Sequences of different lengths, prefilled: arena, next position, token ids, pages."""
    result = []
    for index in range(count):
        grids = GRIDS[index % len(GRIDS) :][:2]
        ids, pages, embeds, positions, following = prepared(model, grids, seed=index)
        arena = model.new_arena(200)
        prefill(model, embeds, positions, arena)
        result.append((arena, following, ids, pages))
    return result


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 8), (3, 1), (3, 5), (8, 1), (8, 8)])
@pytest.mark.parametrize("name", ["three_heads", "tied"])
def test_decode_step(name: str, batch: int, tokens: int) -> None:
    """B sequences at once: against transformers over prompt + tokens, and against one at a time."""
    hf, model = tiny_pair(name)
    sequences = prompts(model, batch)
    arenas = [arena for arena, *_ in sequences]
    lengths = [arena.length for arena in arenas]
    new = torch.randint(0, 256, (batch, tokens), generator=torch.Generator().manual_seed(batch))
    positions = torch.tensor([following for _, following, *_ in sequences])[:, None]
    positions = positions + torch.arange(tokens)
    found = decode_step(model, new, positions, arenas)
    assert found.shape == (batch, tokens, model.spec.text.vocab_size)
    assert found.dtype == torch.float32

    for index, (arena, _, ids, pages) in enumerate(sequences):
        grids = GRIDS[index % len(GRIDS) :][:2]
        longer = torch.cat((ids, new[index]))
        expected, cache = hf_logits(hf, model, longer, pages, grids)
        assert arena.length == lengths[index] + tokens == len(longer)
        assert (found[index] - expected[-tokens:]).abs().max() <= TOLERANCE
        for layer, (keys, _) in enumerate(cache):
            assert (arena.k[layer, :, : arena.length] - keys).abs().max() <= TOLERANCE
        arena.truncate(lengths[index])
        row = slice(index, index + 1)
        alone = decode_step(model, new[row], positions[row], [arena])
        assert (alone[0] - found[index]).abs().max() <= 1e-5


def test_rewinding_and_repeating_gives_the_same_bits() -> None:
    _, model = tiny_pair("small_patches")
    [(arena, following, *_)] = prompts(model, 1)
    step = (torch.tensor([[5, 6]]), torch.tensor([[following, following + 1]]))
    length = arena.length
    first = decode_step(model, *step, [arena])
    arena.truncate(length)
    decode_step(model, step[0] + 1, step[1], [arena])
    arena.truncate(length)
    assert torch.equal(decode_step(model, *step, [arena]), first)


@pytest.mark.parametrize(
    ("ids", "positions", "arenas"),
    [
        ((0, 1), (0, 1), 0),
        ((9, 1), (9, 1), 9),
        ((1, 0), (1, 0), 1),
        ((1, 9), (1, 9), 1),
        ((1,), (1,), 1),
        ((2, 1), (2, 1), 1),
        ((1, 2), (1, 1), 1),
    ],
)
def test_decode_sizes_out_of_range(
    ids: tuple[int, ...], positions: tuple[int, ...], arenas: int
) -> None:
    _, model = tiny_pair("tied")
    held = [model.new_arena(20) for _ in range(arenas)]
    zeros = torch.zeros(ids, dtype=torch.int64), torch.zeros(positions, dtype=torch.int64)
    with pytest.raises(RequestError):
        decode_step(model, *zeros, held)
    assert all(arena.length == 0 for arena in held)


def test_two_sequences_cannot_share_an_arena() -> None:
    _, model = tiny_pair("tied")
    arena = model.new_arena(20)
    zeros = torch.zeros((2, 1), dtype=torch.int64)
    with pytest.raises(RequestError, match="different arena"):
        decode_step(model, zeros, zeros, [arena, arena])


def test_a_full_arena_stops_the_call_before_anything_is_written() -> None:
    _, model = tiny_pair("tied")
    _, _, embeds, positions, _ = prepared(model)
    with pytest.raises(ContextOverflowError, match="context of 100"):
        prefill(model, embeds, positions, model.new_arena(100))
    roomy, full = model.new_arena(10), model.new_arena(1)
    with pytest.raises(ContextOverflowError):
        decode_step(model, torch.ones(2, 2).long(), torch.zeros(2, 2).long(), [roomy, full])
    assert (roomy.length, full.length) == (0, 0)
    assert not roomy.k.any()


def test_prompt_and_pages_must_fit_together() -> None:
    _, model = tiny_pair("tied")
    ids, _, embeds, positions, _ = prepared(model)
    with pytest.raises(RequestError, match="0 pages gave 0 embeddings"):
        embed_prompt(model, ids, [])
    with pytest.raises(RequestError, match="outside the vocabulary of 544"):
        embed_prompt(model, torch.tensor([544]), [])
    with pytest.raises(RequestError, match="cannot be prefilled"):
        prefill(model, embeds, positions[:, 1:], model.new_arena(200))
    with pytest.raises(RequestError, match="cannot be prefilled"):
        prefill(model, embeds[:0], positions[:, :0], model.new_arena(200))


@pytest.mark.parametrize("layout", ["new", "old"])
@pytest.mark.parametrize(("name", "shards"), [("three_heads", 1), ("tied", 3)])
def test_every_checkpoint_layout_loads(
    name: str, layout: Layout, shards: int, tmp_path: Path
) -> None:
    """Ours from the folder equals ours from memory, and transformers reads the same folder."""
    hf, model = tiny_pair(name)
    folder = write_checkpoint(hf, tmp_path / "checkpoint", layout, shards)
    ids, pages, embeds, positions, _ = prepared(model)
    expected = prefill(model, embeds, positions, model.new_arena(200))
    loaded = load_model(folder)
    again = prepared(loaded)
    assert torch.equal(again[2], embeds)
    assert torch.equal(prefill(loaded, again[2], positions, loaded.new_arena(200)), expected)

    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    logits, _ = hf_logits(theirs.eval(), model, ids, pages, GRIDS)
    assert (logits[-1] - expected).abs().max() <= TOLERANCE


def test_what_transformers_saves_itself_loads(tmp_path: Path) -> None:
    hf, model = tiny_pair("tied")
    hf.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load_model(tmp_path)
    assert torch.equal(prepared(loaded)[2], prepared(model)[2])


def test_bf16_is_as_close_to_fp32_as_transformers_bf16(tmp_path: Path) -> None:
    folder = write_checkpoint(
        make_hf_model(tiny_configs()["int4"], 5), tmp_path, dtype=torch.bfloat16
    )
    exact, model = load_model(folder), load_model(folder, torch.bfloat16)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    ids, pages, embeds, positions, _ = prepared(exact)
    expected = prefill(exact, embeds, positions, exact.new_arena(200), all_logits=True)
    _, _, half, _, _ = prepared(model)
    arena = model.new_arena(200)
    found = prefill(model, half, positions, arena, all_logits=True)
    assert half.dtype == arena.k.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    reference, _ = hf_logits(theirs.eval(), model, ids, pages, GRIDS)
    # Same weights and cast points: the error against fp32 is that of bf16 itself, not of a bug.
    ours_error, their_error = ((x - expected).square().mean().sqrt() for x in (found, reference))
    assert ours_error <= 1.2 * their_error
