"""Spans that add up, from any thread, and those that wait for a device."""

from __future__ import annotations

import threading

import pytest
import torch

from mmr5_runtime.timing import Timings
from mmr5_runtime.transfer import Readback, upload

CPU = torch.device("cpu")


def test_spans_of_one_stage_add_up_in_the_order_of_their_first_end() -> None:
    timings = Timings(CPU)
    with timings.span("prefill"), timings.span("vision"):
        pass
    with pytest.raises(ValueError), timings.span("prefill"):
        raise ValueError
    total = timings.total()
    assert list(total) == ["vision", "prefill", "total"]
    assert total["total"] >= total["prefill"] >= 0.0


def test_only_spans_that_say_so_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []
    timings = Timings(CPU)
    monkeypatch.setattr(timings, "_wait", lambda: waits.append("wait"))
    with timings.span("decode", wait=False):
        pass
    assert not waits
    with timings.span("prefill"):
        assert not waits
    assert waits == ["wait"]


def test_no_span_of_a_thread_is_lost() -> None:
    timings = Timings(CPU)

    def work() -> None:
        for number in range(300):
            with timings.span(f"stage {number % 3}", wait=False):
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(timings.total()) == 4


def test_the_first_token_counts() -> None:
    timings = Timings(CPU)
    assert timings.first_token_ms is None
    timings.mark_token()
    first = timings.first_token_ms
    timings.mark_token()
    assert first is not None and timings.first_token_ms == first


def test_transfers_on_a_cpu_are_free() -> None:
    values = torch.tensor([1, 2])
    assert Readback(values).wait() is values
    sent = upload([3, 4], CPU)
    assert sent.dtype == torch.int64 and sent.tolist() == [3, 4]
    assert upload(values[None], CPU).tolist() == [[1, 2]]
