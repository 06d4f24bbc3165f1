"""What is recorded for which sizes, how often, and that a recording serves no others."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from mmr5_runtime.step.buckets import Bucket
from mmr5_runtime.step.graphs import EagerRecorder, GraphRecorder, Recording, Recordings, Run
from mmr5_runtime.types import EngineError

SMALL, LARGE = Bucket(1, 1, 128), Bucket(8, 8, 4096)


class CountingRecorder:
    """Stands for CUDA graphs: what is recorded ran once, a replay does the same over the inputs."""

    def __init__(self) -> None:
        self.recorded: list[Run] = []
        self.fail = False

    def record(self, run: Run) -> Run:
        if self.fail:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        run()
        self.recorded.append(run)
        return run


def make(calls: list[Bucket], inputs: Tensor) -> Callable[[Bucket], Run]:
    def made(bucket: Bucket) -> Run:
        def run() -> Tensor:
            calls.append(bucket)
            return inputs * bucket.tokens

        return run

    return made


def test_one_recording_per_bucket_which_reads_its_inputs_anew() -> None:
    recorder, inputs = CountingRecorder(), torch.ones(1)
    calls: list[Bucket] = []
    recordings = Recordings(recorder, make(calls, inputs))
    assert recordings.get(LARGE).replay(LARGE) == 8
    inputs.fill_(3)
    assert recordings.get(LARGE).replay(LARGE) == 24
    assert len(recorder.recorded) == 1 and len(recordings) == 1
    assert recordings.get(SMALL).replay(SMALL) == 3
    assert len(recordings) == 2
    assert calls == [LARGE, LARGE, LARGE, SMALL, SMALL]


def test_a_recording_serves_no_other_sizes() -> None:
    recording = Recording(SMALL, lambda: torch.zeros(1))
    with pytest.raises(EngineError, match="captured for 1 tokens of 1 sequences of at most 128"):
        recording.replay(LARGE)


def test_nothing_is_kept_of_a_recording_that_failed() -> None:
    recorder = CountingRecorder()
    recorder.fail = True
    recordings = Recordings(recorder, make([], torch.ones(1)))
    with pytest.raises(RuntimeError, match="capturing"):
        recordings.get(SMALL)
    assert len(recordings) == 0
    recorder.fail = False
    assert recordings.get(SMALL).replay(SMALL) == 1


def test_without_graphs_the_step_itself_runs_again() -> None:
    calls: list[Bucket] = []
    recordings = Recordings(EagerRecorder(), make(calls, torch.ones(1)))
    recordings.get(SMALL).replay(SMALL)
    recordings.get(SMALL).replay(SMALL)
    assert calls == [SMALL, SMALL]


def test_all_graphs_are_recorded_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries keep a workspace for each stream that they see, for good."""
    streams: list[object] = []

    def stream(device: torch.device) -> MagicMock:
        streams.append(device)
        return MagicMock()

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    for name in ("graph_pool_handle", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    recorder, calls = GraphRecorder(torch.device("cuda", 0)), list[int]()

    def run() -> Tensor:
        calls.append(1)
        return torch.zeros(1)

    for _ in range(3):
        recorder.record(run)
    assert len(streams) == 1 and len(calls) == 6
