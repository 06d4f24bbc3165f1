"""Decode steps that wait for each other: who goes when, and what happens to those who fail.

The engine of these tests is a gate: a pass says who is in it and waits to be let through, so every
schedule is the one that the test wrote down. Nothing waits for time to pass.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmr5_runtime import batching
from mmr5_runtime.batching import StepBatcher
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.spec import TextSpec
from mmr5_runtime.turns import Turns
from mmr5_runtime.types import ContextOverflowError, EngineError

SPEC = TextSpec(8, 4, 1, 2, 1, 4, 4, 1e-6, 1e4, (1, 1, 0), 4096, False)
PATIENCE = 30.0  # seconds until a test that hangs fails


class Engine:
    """Logits [B, T, 1] are a function of id and position alone; ``answer`` replaces a pass."""

    device = torch.device("cpu")

    def __init__(self, answer: Callable[[], None] = lambda: None) -> None:
        self.passes: list[list[list[int]]] = []  # ids [B, T] of every pass
        self.inside = threading.Lock()
        self._answer = answer

    def step(self, token_ids: Tensor, positions: Tensor, arenas: Sequence[KVArena]) -> Tensor:
        assert self.inside.acquire(blocking=False), "two passes at once"
        try:
            self.passes.append(token_ids.tolist())
            self._answer()
            for arena, ids in zip(arenas, token_ids, strict=True):
                rows = ids.float().view(1, 1, -1, 1).expand(1, 1, -1, 4)
                arena.load(rows, rows)
        finally:
            self.inside.release()
        return (100 * token_ids + positions).float()[..., None]


def call(work: Callable[[], object]) -> Future[object]:
    """Runs ``work`` in a thread of its own."""
    future: Future[object] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def step(
    batcher: StepBatcher, ids: Sequence[int], arena: KVArena, position: int = 0
) -> list[float]:
    positions = torch.arange(position, position + len(ids))
    logits = batcher.step(torch.tensor([ids]), positions[None], arena)
    found: list[float] = logits[0, :, 0].tolist()
    return found


class Watched(deque[Any]):
    """A queue at whose length a test can wait."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()

    def append(self, item: Any) -> None:
        with self._changed:
            super().append(item)
            self._changed.notify_all()

    def reaches(self, length: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self) == length, PATIENCE)

    def __delitem__(self, cut: Any) -> None:
        for _ in range(len(range(len(self))[cut])):
            self.popleft()

    def __getitem__(self, cut: Any) -> Any:
        return list(self)[cut]


def batch(engine: Engine) -> StepBatcher:
    batcher = StepBatcher(engine, Turns())
    batcher._waiting = Watched()  # type: ignore[assignment]
    return batcher


def waiting(batcher: StepBatcher, count: int) -> None:
    """Returns once ``count`` steps wait."""
    batcher._waiting.reaches(count)  # type: ignore[attr-defined]


# What is run together


def test_a_step_alone_is_run_at_once() -> None:
    engine = Engine()
    batcher, arena = batch(engine), KVArena(SPEC, 16)
    assert step(batcher, [3, 4], arena, 5) == [305.0, 406.0]  # nobody has joined
    with batcher.seat().joined():
        assert step(batcher, [5], arena, 7) == [507.0]
    assert arena.length == 3 and engine.passes == [[[3, 4]], [[5]]]


@settings(max_examples=40, deadline=None)
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


def test_what_a_pass_raises_reaches_everyone_in_it_and_nobody_else() -> None:
    trouble = [RuntimeError("the GPU is gone")]

    def answer() -> None:
        if trouble:
            raise trouble.pop()

    batcher = batch(Engine(answer))
    for _ in range(3):
        batcher.join()
    arenas = [KVArena(SPEC, 8) for _ in range(3)]
    one = call(lambda: step(batcher, [1], arenas[0]))
    waiting(batcher, 1)
    drafting = call(lambda: step(batcher, [1, 2, 3, 4], arenas[1]))
    waiting(batcher, 2)
    with pytest.raises(RuntimeError, match="gone"):
        step(batcher, [3], arenas[2])
    with pytest.raises(RuntimeError, match="gone"):
        one.result(PATIENCE)
    # Steps of one token and of four are two passes.
    assert drafting.result(PATIENCE) == [100.0, 201.0, 302.0, 403.0]
    assert [arena.length for arena in arenas] == [0, 4, 0]
    batcher.leave()
    batcher.leave()
    assert step(batcher, [3], arenas[2]) == [300.0]  # and the next pass is a new one


def test_an_interrupt_is_for_one_thread() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    batcher = batch(Engine(interrupt))
    batcher.join()
    batcher.join()
    other = call(lambda: step(batcher, [1], KVArena(SPEC, 4)))
    waiting(batcher, 1)
    with pytest.raises(KeyboardInterrupt):
        step(batcher, [2], KVArena(SPEC, 4))
    with pytest.raises(EngineError, match="interrupted"):
        other.result(PATIENCE)


@pytest.mark.parametrize("when", ["waiting", "leading"])
def test_one_interrupted_while_it_waits_is_left_out(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine()
    batcher = batch(engine)
    batcher.join()
    batcher.join()

    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if when == "leading":
                super().wait(timeout)
            raise KeyboardInterrupt

    def interrupted(*args: Any) -> batching._Call:
        made = real(*args)
        made.woken = Interrupted()
        return made

    real = batching._Call
    if when == "waiting":
        with monkeypatch.context() as patch:
            patch.setattr(batching, "_Call", interrupted)
            with pytest.raises(KeyboardInterrupt):
                step(batcher, [1], KVArena(SPEC, 4))
        batcher.leave()
        assert step(batcher, [2], KVArena(SPEC, 4)) == [200.0]
        assert engine.passes == [[[2]]]
        return
    other = call(lambda: step(batcher, [1], KVArena(SPEC, 4)))
    waiting(batcher, 1)
    monkeypatch.setattr(batching, "_Call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step(batcher, [2], KVArena(SPEC, 4))  # has to run the pass, and does not come to it
    assert other.result(PATIENCE) == [100.0]
    assert engine.passes == [[[1]]]


# Turns


def test_turns_are_taken_in_the_order_of_asking() -> None:
    turns, order = Turns(), queue.Queue[int]()
    asking = turns._queue = Watched()
    threads = []

    def take(number: int) -> None:
        with turns.take():
            order.put(number)

    with turns.take():
        for number in range(5):
            threads.append(call(lambda n=number: take(n)))  # type: ignore[misc]
            asking.reaches(number + 1)
    for thread in threads:
        thread.result(PATIENCE)
    assert [order.get() for _ in range(5)] == [0, 1, 2, 3, 4]


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 4), wanted=st.lists(st.booleans(), min_size=1, max_size=12))
def test_no_more_hold_than_may(count: int, wanted: list[bool]) -> None:
    """``wanted``: takers of all places, and of one; both end, and all means alone."""
    turns, lock = Turns(count), threading.Lock()
    held: list[int] = []

    def take(places: int) -> None:
        with turns.take(places):
            with lock:
                held.append(places)
                assert sum(held) <= count
            with lock:
                held.remove(places)

    takers = [call(lambda p=count if all_ else 1: take(p)) for all_ in wanted]  # type: ignore[misc]
    for taker in takers:
        taker.result(PATIENCE)
    assert turns._free == count and not turns._queue


def test_an_error_gives_the_turn_back() -> None:
    turns = Turns(2)
    with pytest.raises(ValueError), turns.take(2):
        raise ValueError
    with turns.take(2):
        pass
