"""Decode steps that fail or are interrupted in company: who hears of it, and what stays of it."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest

from helpers.passes import PATIENCE, SPEC, Engine, batch, call, step, waiting
from mmr5_runtime import batching
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.types import EngineError


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


def test_every_thread_gets_an_error_of_its_own() -> None:
    class Peculiar(Exception):
        def __init__(self, first: int, *, second: int) -> None:
            super().__init__("cannot be made again from what it says")

    for error in (EngineError("the GPU is gone"), Peculiar(1, second=2)):

        def answer(error: Exception = error) -> None:
            raise error

        batcher = batch(Engine(answer))
        batcher.join()
        batcher.join()
        other = call(lambda batcher=batcher: step(batcher, [1], KVArena(SPEC, 4)))  # type: ignore[misc]
        waiting(batcher, 1)
        with pytest.raises(type(error)) as caught:
            step(batcher, [2], KVArena(SPEC, 4))
        found = other.exception(PATIENCE)
        assert caught.value is error and found is not error
        assert str(error) in str(found) and found is not None and found.__cause__ is None
        assert isinstance(found, EngineError)
        [note] = found.__notes__
        assert "in answer" in note  # where it was raised, which its own traceback does not say


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_pass_stays(fails: bool) -> None:
    def answer() -> None:
        if fails:
            raise EngineError("the GPU is gone")

    batcher = batch(Engine(answer))
    batcher.join()
    batcher.join()
    made: list[weakref.ref[KVArena]] = []

    def decode(traced: bool) -> EngineError | None:
        arena = KVArena(SPEC, 4)
        made.append(weakref.ref(arena))
        try:
            step(batcher, [1], arena)
        except EngineError as error:
            return error if traced else error.with_traceback(None)
        return None

    def gone(arena: weakref.ref[KVArena]) -> bool:
        for _ in range(1000):  # a thread may still be on its way out
            if arena() is None:
                return True
            threading.Event().wait(0.01)
        return False

    gc.collect()
    gc.disable()
    try:
        other = call(lambda: decode(False))
        waiting(batcher, 1)
        led, followed = decode(True), other.result(PATIENCE)
        assert (led is not None) == (followed is not None) == fails
        # An error holds its own thread's frames, and nothing of the others in the pass.
        assert gone(made[0]) and (made[1]() is not None) == fails
        led = None
        assert gone(made[1])
        assert batching._Call not in map(type, gc.get_objects())
    finally:
        gc.enable()


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
