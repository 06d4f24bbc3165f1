"""Decode steps on the kernels: against plain torch, and against themselves in other company."""

from __future__ import annotations

import gc
import weakref
from functools import cache

import pytest
import torch

from helpers.stepping import ONE_LAYER, SMALL, WIDE_7B, Pair, copy, random_ids, read, step
from mmr5_runtime.capacity import KVFormat
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.model import native_model
from mmr5_runtime.types import ContextOverflowError, RequestError

BOUND = 2e-2  # relative error of logits: sums in another order, each rounded to bf16 along the way


@cache
def pair(quant: str = "int4", kv: KVFormat = "bf16") -> Pair:
    """One layer with linears in plain torch: for what only attention and the books decide."""
    return Pair(ONE_LAYER, quant, kv, linears=False)


def bits(arena: KVArena) -> list[torch.Tensor]:
    return list(arena.view(0, arena.length))


def same(one: KVArena, other: KVArena) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits(one), bits(other), strict=True))


@pytest.mark.parametrize("quant", ["bf16", "int4", "int8"])
def test_logits_are_those_of_plain_torch(quant: str) -> None:
    """Everything on kernels; in int4 rows have the same bits one by one and together, too."""
    both = Pair(ONE_LAYER, quant)
    arena, twin = read(both.plain, 21), read(both.plain, 21)
    single = copy(arena, both.fused)
    ids = random_ids(2, seed=4)[None]
    found, expected = step(both.fused, ids, [arena]), step(both.plain, ids, [twin])
    assert found.dtype == torch.float32 and found.shape == expected.shape == (1, 2, 64)
    assert arena.length == twin.length == 23
    assert (found - expected).norm() / expected.norm() <= BOUND
    if quant != "int4":
        return
    assert torch.equal(step(both.fused, ids[:, :1], [single]), found[:, :1])
    arena.truncate(22)
    assert same(single, arena)


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_keys_and_values_in_the_arena(kv: KVFormat) -> None:
    both = Pair(SMALL, "bf16", kv, linears=False)
    arena, twin = read(both.fused, 21), read(both.plain, 21)
    ids = random_ids(3, seed=4)[None]
    found, expected = step(both.fused, ids, [arena]), step(both.plain, ids, [twin])
    assert (found - expected).norm() / expected.norm() <= 2 * BOUND
    for ours, theirs in zip(bits(arena), bits(twin), strict=True):
        assert torch.equal(ours[:, :, :21], theirs[:, :, :21])


def test_a_row_has_the_same_bits_in_any_company() -> None:
    """One token at a time, two in one pass, two sequences together, after a rejected draft."""
    engine = pair().fused
    lengths = (7, 127)  # the second goes across chunks of keys, and across spans
    arenas = [read(engine, n, seed) for seed, n in enumerate(lengths)]
    ids = random_ids(4, seed=9).view(2, 2)
    single = []
    alone = [copy(arena, engine) for arena in arenas]
    for row, arena in zip(ids, alone, strict=True):
        single.append(torch.cat([step(engine, row[i : i + 1][None], [arena])[0] for i in range(2)]))
    expected = torch.stack(single)
    together = [copy(arena, engine) for arena in arenas]
    assert torch.equal(step(engine, ids, together), expected)
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))
    drafted = copy(arenas[1], engine)
    length = drafted.length
    step(engine, random_ids(5, seed=5)[None], [drafted])
    drafted.truncate(length)
    assert torch.equal(step(engine, ids[1:2], [drafted])[0], expected[1])
    assert same(drafted, alone[1])


def test_an_arena_may_be_filled_to_its_end() -> None:
    engine = pair().fused
    tight, roomy = read(engine, 10, room=3), read(engine, 10, room=30)
    ids = random_ids(3, seed=2)[None]
    # Three tokens are computed as four; the fourth has no place in the tight arena.
    assert torch.equal(step(engine, ids, [tight]), step(engine, ids, [roomy]))
    assert same(tight, roomy) and tight.length == tight.capacity
    with pytest.raises(ContextOverflowError, match="1 more tokens do not fit"):
        step(engine, ids[:, :1], [tight])
    assert tight.length == tight.capacity


def test_logits_stay_when_the_next_step_comes() -> None:
    engine = pair().fused
    arena = read(engine, 9)
    first = step(engine, torch.tensor([[3]]), [arena])
    kept = first.clone()
    second = step(engine, torch.tensor([[4]]), [arena])
    assert torch.equal(first, kept) and not torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


def test_one_recording_serves_every_arena_and_length_of_its_span() -> None:
    engine = Pair(ONE_LAYER, "bf16", linears=False).fused
    stepper = engine._stepper
    assert stepper is not None
    arena = read(engine, 5)
    for token in range(3):
        step(engine, torch.tensor([[token]]), [arena])
    step(engine, torch.tensor([[1]]), [read(engine, 100)])
    assert len(stepper.recordings) == 1
    step(engine, torch.tensor([[1, 2]]), [arena])  # more tokens
    step(engine, torch.tensor([[1]]), [read(engine, 130)])  # a longer sequence
    assert len(stepper.recordings) == 3


@pytest.mark.parametrize("quant", ["bf16", "int4"])
def test_weights_go_with_the_engine(quant: str) -> None:
    """Not with the next collection of cycles: they are most of the memory."""
    engine = Pair(ONE_LAYER, quant, linears=False).fused
    step(engine, torch.tensor([[1]]), [read(engine, 5)])  # something is recorded
    tensors = [native_model(engine.model).decoder.embed_tokens]
    for module in native_model(engine.model).decoder.modules():
        prepared = getattr(module, "prepared", None)
        if prepared is not None:
            tensors += [part for parts in prepared.operands.values() for part in parts.values()]
    weights = [weakref.ref(tensor) for tensor in tensors]
    assert len(weights) > 5
    del tensors, module, prepared
    gc.disable()
    try:
        del engine
        assert all(weight() is None for weight in weights)
    finally:
        gc.enable()


def test_which_steps_do_not_depend_on_company() -> None:
    """Those whose linears all have a decode kernel: formats that have none run in torch."""
    assert Pair(ONE_LAYER, "int4").fused.independent_rows
    mixed = Pair(ONE_LAYER, "int4-fp16")
    assert mixed.fused.compute.fused_steps
    assert not mixed.fused.independent_rows and not mixed.plain.independent_rows


def test_warming_up_changes_nothing_and_is_not_done_again() -> None:
    engine = Pair(ONE_LAYER, "int4", linears=False).fused
    assert engine.warm_up(longest=1) == 3  # 1, 4 and 8 tokens
    arena = read(engine, 5)
    found = step(engine, torch.tensor([[1, 2]]), [arena])
    assert engine._stepper is not None and len(engine._stepper.recordings) == 3
    assert torch.equal(found, step(pair().fused, torch.tensor([[1, 2]]), [read(pair().fused, 5)]))
    assert pair().plain.warm_up() == 0


def test_what_a_step_refuses() -> None:
    engine = pair().fused
    arena = read(engine, 5)
    place = torch.tensor([[5]])
    with pytest.raises(RequestError, match="given token id 64, but this model has 0 to 63"):
        engine.step(torch.tensor([[64]]), place, [arena])
    with pytest.raises(RequestError, match="given position 1024, but this model has 0 to 1023"):
        engine.step(torch.tensor([[1]]), place + 1019, [arena])
    with pytest.raises(RequestError, match="a different arena per sequence"):
        engine.step(torch.tensor([[1], [2]]), torch.tensor([[5], [5]]), [arena, arena])
    with pytest.raises(RequestError, match="takes 1 to 8 tokens of 1 to 8 sequences"):
        engine.step(torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 9), [arena])
    assert arena.length == 5


def test_a_format_without_a_decode_kernel_runs_all_the_same() -> None:
    """fp16 scales come from foreign checkpoints; their linears run as in a prompt."""
    both = pair("int4-fp16")
    ids = random_ids(2, seed=1)[None]
    found = step(both.fused, ids, [read(both.fused, 12)])
    expected = step(both.plain, ids, [read(both.plain, 12)])
    assert (found - expected).norm() / expected.norm() <= 1e-2


@pytest.mark.slow
def test_heads_and_widths_of_the_7b() -> None:
    """Two layers of the true sizes, their linears in plain torch: else it takes many minutes."""
    both = Pair(WIDE_7B, "int4", linears=False)
    arena = read(both.plain, 150)
    twin = copy(arena, both.plain)
    ids = random_ids(2, seed=0)[None]  # of no near-ties
    found, expected = step(both.fused, ids, [arena]), step(both.plain, ids, [twin])
    assert (found - expected).norm() / expected.norm() <= BOUND
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
