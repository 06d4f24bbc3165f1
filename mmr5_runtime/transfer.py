"""Small numbers between host and device, without waiting for what the device is busy with.

A copy from or to ordinary memory makes the host wait until everything queued before it has run,
which would undo all lookahead. Copies here go through page-locked memory and wait for themselves.
On a CPU both directions are free.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Whole numbers as int64 on ``device``; the copy is queued, nobody waits for it.

    A tensor keeps its shape, and is given back as it is where it lies on ``device`` already.
    """
    there = torch.as_tensor(values, dtype=torch.long)
    if device.type == "cuda" and there.device.type == "cpu":
        # PyTorch keeps page-locked memory from being used again before the copy out of it has run.
        there = there.pin_memory()
    return there.to(device, non_blocking=True)


class Readback:
    """A tensor on its way to the host; made where its copy is to be queued."""

    def __init__(self, values: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))

    def wait(self) -> Tensor:
        """The values on the host, once what was queued before the copy has run, and no later."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values
