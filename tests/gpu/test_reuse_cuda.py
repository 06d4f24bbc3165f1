"""Segments remembered in page-locked memory: warm equals cold on a GPU, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.pictures import noise
from helpers.reading import forgetful, limited, load, read, remember

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("quant", ["bf16", "int8", "int4"])
def test_warm_is_cold(tiny_engine: Callable[[str], Path], quant: str) -> None:
    loaded = load(tiny_engine(quant), "bfloat16", device="cuda")
    pages = [noise(56, 56 + 28 * (i % 4), i) for i in range(8)]
    memory, drawn = remember(loaded), random.Random(quant)
    remembered = 0
    for number in range(20):
        chosen = drawn.sample(pages, drawn.randint(2, 6)) if number % 3 else pages[: 2 + number % 6]
        warm = read(loaded, memory, chosen)
        assert warm.equals(read(loaded, forgetful(loaded), chosen))
        remembered += warm.counts.segments_remembered
    assert remembered > 20


def test_eviction_while_loads_are_in_flight(tiny_engine: Callable[[str], Path]) -> None:
    loaded = load(tiny_engine("int4"), "bfloat16", device="cuda")
    pages = [noise(56, 140, i) for i in range(12)]
    memory = remember(loaded, limited(3 << 17))  # a few segments, rounded up by PyTorch
    cold = [read(loaded, forgetful(loaded), pages[i : i + 3]) for i in range(10)]
    for _ in range(3):
        for i in range(10):
            assert read(loaded, memory, pages[i : i + 3]).equals(cold[i])
    assert memory.segments.stats().evictions
