"""Rotations for the graphs: torch's values, a row's own in any company, and no thread but ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmr5_runtime.onnx.model import rotations

CONTEXT = 128_000  # of the 7B; its fastest frequency turns by one radian a position
COUNT = """
import os, torch
from mmr5_runtime.onnx.model import rotations
torch.set_num_threads(2)
threads = lambda: len(os.listdir("/proc/self/task"))
angles = torch.rand(8, 16)  # a decode step of mini
counts = [threads()]
rotations(angles)
counts.append(threads())
angles.cos()
print(*counts, threads())
"""


@given(
    rows=st.integers(1, 40),
    half=st.integers(1, 64),
    start=st.integers(0, CONTEXT - 40),
)
def test_a_row_is_the_same_alone_and_close_to_the_truth(rows: int, half: int, start: int) -> None:
    frequencies = 1e6 ** (-torch.arange(half) / half)
    angles = torch.arange(start, start + rows)[:, None].float() * frequencies
    cos, sin = rotations(angles)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos, angles.double().cos().float(), rtol=0, atol=2e-7)
    torch.testing.assert_close(sin, angles.double().sin().float(), rtol=0, atol=2e-7)
    for row in range(rows):
        one_cos, one_sin = rotations(angles[row : row + 1])
        assert torch.equal(one_cos[0], cos[row]) and torch.equal(one_sin[0], sin[row])


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_no_other_thread_is_woken() -> None:
    """The threads of torch's pool spin on for milliseconds once they have had something to do."""
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    before, after, with_torch = map(int, done.stdout.split())
    assert after == before
    assert with_torch == before + 1  # what would be seen
