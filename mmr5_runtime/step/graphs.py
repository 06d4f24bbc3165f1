"""A step recorded once per bucket, and done again over the same inputs.

What a recording holds are addresses: of the weights, of the input buffer and of its own
intermediate results. It is therefore good for one bucket only, and for any arenas and lengths.

All CUDA graphs of an engine share one pool of memory, which is right because they run one after
the other on one stream; what a graph hands out is a tensor in that pool, overwritten when the same
graph runs again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from mmr5_runtime.step.buckets import Bucket
from mmr5_runtime.types import EngineError

Run = Callable[[], Tensor]


class Recorder(Protocol):
    """Turns a function over fixed inputs into one that does the same again, perhaps faster."""

    def record(self, run: Run) -> Run: ...


class EagerRecorder:
    """Calls the function itself again: where graphs are off, and where there is no GPU."""

    def record(self, run: Run) -> Run:
        return run


class GraphRecorder:
    """CUDA graphs: the launches of one run, replayed without the host deciding any of them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # One for all recordings: libraries keep a workspace for every stream they ever saw.
        self._side = torch.cuda.Stream(device)

    def record(self, run: Run) -> Run:
        """Runs once, so that kernels are compiled and libraries set up, then records a second run.

        The first run has its effects (it appends to the arenas of the table, if there are any); the
        recording has none until it is replayed. Other threads may use the GPU meanwhile.
        """
        current = torch.cuda.current_stream(self._device)
        side = self._side
        side.wait_stream(current)
        with torch.cuda.stream(side):
            run()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=side, capture_error_mode="thread_local"
        ):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class Recordings:
    """Recordings by bucket, made when first asked for.

    ``make(bucket)`` gives the function to record. One thread at a time.
    """

    def __init__(self, recorder: Recorder, make: Callable[[Bucket], Run]) -> None:
        self._recorder, self._make = recorder, make
        self._recorded: dict[Bucket, Recording] = {}

    def __len__(self) -> int:
        return len(self._recorded)

    def get(self, bucket: Bucket) -> Recording:
        """The recording for ``bucket``; nothing is kept of one that failed."""
        if bucket not in self._recorded:
            run = self._recorder.record(self._make(bucket))
            self._recorded[bucket] = Recording(bucket, run)
        return self._recorded[bucket]


class Recording:
    """One recorded step, which refuses to be replayed for sizes that it was not recorded for."""

    def __init__(self, bucket: Bucket, run: Run) -> None:
        self.bucket, self._run = bucket, run

    def replay(self, bucket: Bucket) -> Tensor:
        """Logits of all rows of the bucket, in memory that the next replay overwrites."""
        if bucket != self.bucket:
            raise EngineError(
                f"this decode step was captured for {self.bucket}, not for {bucket}; "
                "record one for the sizes that are asked for."
            )
        return self._run()
