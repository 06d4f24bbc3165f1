"""Decode steps that wait for each other: who goes when, and with whom.

Every schedule is the one that the test wrote down; what goes wrong is in ``test_batching_errors``.
"""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.passes import PATIENCE, SPEC, Engine, batch, call, step, waiting
from mmr5_runtime import batching
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.types import ContextOverflowError

# What is run together


def test_a_step_alone_is_run_at_once() -> None:
    engine = Engine()
    batcher, arena = batch(engine), KVArena(SPEC, 16)
    assert step(batcher, [3, 4], arena, 5) == [305.0, 406.0]  # nobody has joined
    with batcher.seat().joined():
        assert step(batcher, [5], arena, 7) == [507.0]
    assert arena.length == 3 and engine.passes == [[[3, 4]], [[5]]]


@settings(max_examples=40)
@given(
    lengths=st.lists(
        st.lists(st.sampled_from([1, 1, 1, 4, 8]), max_size=5), min_size=1, max_size=10
    )
)
def test_every_decoder_gets_its_own_rows(lengths: list[list[int]]) -> None:
    """Any number of threads with any steps: all of them end, with what they would get alone."""
    engine = Engine()
    batcher = batch(engine)
    everyone = threading.Barrier(len(lengths))

    def decode(number: int, steps: list[int]) -> None:
        arena, position = KVArena(SPEC, 64), 0
        seat = batcher.seat()
        with seat.joined():
            everyone.wait(PATIENCE)
            for tokens in steps:
                ids = [number * 10 + index for index in range(tokens)]
                places = torch.arange(position, position + tokens)
                logits = seat.step(torch.tensor([ids]), places[None], [arena])
                expected = [100 * token + position + i for i, token in enumerate(ids)]
                assert logits.shape == (1, tokens, 1)
                assert logits[0, :, 0].tolist() == expected
                position += tokens
        assert arena.length == position

    done = [call(lambda n=n, s=s: decode(n, s)) for n, s in enumerate(lengths)]  # type: ignore[misc]
    for future in done:
        future.result(PATIENCE)
    assert batcher.steps == sum(map(len, lengths))
    assert all(len(ids) <= 8 and len(set(map(len, ids))) == 1 for ids in engine.passes)
    if len(lengths) <= 8 and all(set(steps) <= {1} for steps in lengths):
        # All join before the first step, so nobody is ever left behind.
        assert len(engine.passes) == max(map(len, lengths))


def test_ten_decoders_share_passes_of_eight() -> None:
    engine = Engine()
    batcher = batch(engine)
    arenas = [KVArena(SPEC, 16) for _ in range(10)]
    for _ in range(10):
        batcher.join()
    calls = []
    for number in range(7):
        calls.append(call(lambda n=number: step(batcher, [n], arenas[n])))  # type: ignore[misc]
        waiting(batcher, number + 1)
    assert engine.passes == []
    step(batcher, [7], arenas[7])
    assert [future.result(PATIENCE) for future in calls] == [[100.0 * n] for n in range(7)]
    assert engine.passes == [[[n] for n in range(8)]]
    calls = [call(lambda n=n: step(batcher, [n], arenas[n])) for n in (8, 9)]  # type: ignore[misc]
    waiting(batcher, 2)
    for _ in range(8):
        batcher.leave()  # the last one lets them go
    assert {tuple(future.result(PATIENCE)) for future in calls} == {(800.0,), (900.0,)}  # type: ignore[arg-type]
    assert batcher.passes == 2 and batcher.steps == 10


# Who does not come


def test_one_that_leaves_lets_the_others_go() -> None:
    engine = Engine()
    batcher = batch(engine)
    staying, leaving = batcher.seat(), batcher.seat()
    with staying.joined():
        with leaving.joined():
            arena = KVArena(SPEC, 4)
            other = call(lambda: step(batcher, [1], arena))
            waiting(batcher, 1)
            assert engine.passes == []
        assert other.result(PATIENCE) == [100.0]


def test_one_that_fails_lets_the_others_go() -> None:
    batcher = batch(Engine())
    failing, joined = batcher.seat(), threading.Event()
    batcher.join()

    def fail() -> None:
        with failing.joined():
            joined.set()
            waiting(batcher, 1)
            raise ValueError("a page is broken")

    other = call(fail)
    assert joined.wait(PATIENCE)
    assert step(batcher, [2], KVArena(SPEC, 4)) == [200.0]
    with pytest.raises(ValueError, match="page"):
        other.result(PATIENCE)


def test_a_stream_whose_reader_is_slow_is_not_waited_for() -> None:
    engine = Engine()
    batcher = batch(engine)
    stream, other = batcher.seat(), batcher.seat()
    with stream.joined(), other.joined():
        with stream.back():  # its first event is there, and then the reader takes his time
            pass
        assert step(batcher, [1], KVArena(SPEC, 4)) == [100.0]
        with stream.back():
            alone = call(lambda: step(batcher, [2], KVArena(SPEC, 4)))
            waiting(batcher, 1)
            assert step(batcher, [3], KVArena(SPEC, 4)) == [300.0]
            assert alone.result(PATIENCE) == [200.0]
    assert [len(ids) for ids in engine.passes] == [1, 2]
    assert batcher._joined == 0


def test_a_full_arena_is_its_owners_trouble() -> None:
    batcher = batch(Engine())
    batcher.join()
    batcher.join()
    other = call(lambda: step(batcher, [1], KVArena(SPEC, 4)))
    waiting(batcher, 1)
    with pytest.raises(ContextOverflowError):
        step(batcher, [1, 2, 3, 4, 5], KVArena(SPEC, 4))
    batcher.leave()
    assert other.result(PATIENCE) == [100.0]


def test_a_seat_knows_whether_it_had_company() -> None:
    batcher = batch(Engine())
    one, two = batcher.seat(), batcher.seat()

    def take(seat: batching.Seat, ids: list[int]) -> None:
        places = torch.arange(len(ids))[None]
        seat.step(torch.tensor([ids]), places, [KVArena(SPEC, 4)])

    with one.joined():
        take(one, [1])
        with two.joined():
            other = call(lambda: take(two, [1, 2]))
            waiting(batcher, 1)
            take(one, [3])
            other.result(PATIENCE)
            assert not one.shared and not two.shared  # of as many tokens, or not together
            other = call(lambda: take(two, [1]))
            waiting(batcher, 1)
            take(one, [3])
            other.result(PATIENCE)
            assert one.shared and two.shared
