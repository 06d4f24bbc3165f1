"""A counted lock that serves in the order of asking."""

from __future__ import annotations

import queue
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.passes import PATIENCE, Watched, call
from mmr5_runtime.turns import Turns


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


@settings(max_examples=30)
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


def test_an_interrupt_loses_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it comes between asking for a place and having it."""
    turns = Turns(2)
    for name in ("wait_for", "notify_all"):

        def interrupt(*_: object) -> None:
            patch.undo()
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(turns._changed, name, interrupt)
            with pytest.raises(KeyboardInterrupt), turns.take():
                raise AssertionError("nobody has a place")
        assert turns._free == 2 and not turns._queue
