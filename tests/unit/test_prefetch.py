"""Pages prepared ahead: bounded, each by one thread, errors where they are asked for."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmr5_runtime.prefetch import MOST_AHEAD, Prefetch, Preparation, pages_ahead

PIXEL = Image.new("RGB", (1, 1))


class Pages:
    """Preparations that count how often each page was begun, and fail for some pages."""

    def __init__(self, bad: Sequence[int] = (), gate: threading.Event | None = None) -> None:
        self.begun = Counter[int]()
        self.threads: set[str] = set()
        self._bad, self._gate = bad, gate
        self._lock = threading.Lock()

    def prepare(self, index: int) -> Preparation[int]:
        def decode() -> Image.Image:
            with self._lock:
                self.begun[index] += 1
                self.threads.add(threading.current_thread().name)
            if self._gate is not None:
                assert self._gate.wait(10)
            if index in self._bad:
                raise ValueError(f"page {index} is bad")
            return PIXEL

        return Preparation(decode, lambda image: 10 * index, was_decoded=False)


def taken(prefetch: Prefetch[int], index: int) -> int:
    preparation = prefetch.take(index)
    preparation.decoded()
    return preparation.patches()


def test_a_cpu_prepares_nothing_ahead() -> None:
    assert pages_ahead(torch.device("cpu")) == 0
    assert 1 <= pages_ahead(torch.device("cuda")) <= MOST_AHEAD
    pages = Pages()
    prefetch = Prefetch(pages.prepare, ahead=0)
    prefetch.expect(range(5))
    assert not pages.begun
    assert [taken(prefetch, index) for index in range(5)] == [0, 10, 20, 30, 40]
    assert pages.threads == {threading.current_thread().name}
    prefetch.close()


def test_no_more_than_the_bound_is_begun() -> None:
    gate = threading.Event()
    pages = Pages(gate=gate)
    prefetch = Prefetch(pages.prepare, ahead=3)
    prefetch.expect(range(9))
    first = prefetch.take(0)  # it may be waited for; three others may be on their way
    gate.set()
    first.decoded()
    prefetch.expect(range(1, 9))
    for index in range(1, 9):
        assert taken(prefetch, index) == 10 * index
        assert len(pages.begun) <= min(9, index + 1 + 3)
    assert set(pages.begun.values()) == {1}
    prefetch.close()


@settings(max_examples=60)
@given(
    ahead=st.integers(0, 4),
    announced=st.lists(st.lists(st.integers(0, 7), unique=True), max_size=4),
    order=st.permutations(range(8)),
    bad=st.sets(st.integers(0, 7), max_size=2),
)
def test_any_order_gives_every_page_once(
    ahead: int, announced: list[list[int]], order: list[int], bad: set[int]
) -> None:
    pages = Pages(bad=tuple(bad))
    prefetch = Prefetch(pages.prepare, ahead)
    rest = list(order)
    for place, index in enumerate(order):
        if place < len(announced):
            prefetch.expect([page for page in announced[place] if page in rest])
        rest.remove(index)
        preparation = prefetch.take(index)
        if index in bad:
            with pytest.raises(ValueError, match=f"page {index} is bad"):
                preparation.decoded()
            with pytest.raises(ValueError, match=f"page {index} is bad"):
                preparation.patches()
        else:
            preparation.decoded()
            assert preparation.patches() == 10 * index
    prefetch.close()
    assert pages.begun == Counter(range(8))


def test_an_error_waits_until_its_page_is_asked_for() -> None:
    prefetch = Prefetch(Pages(bad=(1,)).prepare, ahead=4)
    prefetch.expect(range(4))
    assert taken(prefetch, 0) == 0
    with pytest.raises(ValueError, match="page 1 is bad"):
        taken(prefetch, 1)
    assert taken(prefetch, 2) == 20
    prefetch.close()


def test_closing_leaves_nothing_running() -> None:
    gate = threading.Event()
    pages = Pages(gate=gate)
    prefetch = Prefetch(pages.prepare, ahead=2)
    prefetch.expect(range(6))
    threading.Timer(0.05, gate.set).start()
    prefetch.close()
    assert set(pages.begun) <= {0, 1}
    assert not [t for t in threading.enumerate() if t.name.startswith("mmr5-page")]
    assert taken(prefetch, 5) == 50  # still there, without threads
    prefetch.close()
