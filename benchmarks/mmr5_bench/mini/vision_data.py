"""Rendered training pages as one pool, and batches of patches drawn from it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmr5_bench.minidocs.lists import TRAIN_SEEDS, PageKey
from mmr5_bench.minidocs.pages import render_page
from mmr5_bench.minidocs.vocabulary import pairs
from mmr5_runtime.image import PixelBudget, preprocess
from mmr5_runtime.rope import Grid


@dataclass(frozen=True)
class PagePool:
    """Rendered pages and what they show."""

    keys: tuple[PageKey, ...]
    images: tuple[Image.Image, ...]

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, list[Grid]]:
        """Patches [P, 1176] float32 of several pages, one after the other, and their grids."""
        pages = [preprocess(self.images[index], PixelBudget()) for index in indices]
        return torch.cat([page.pixel_values for page in pages]), [page.grid for page in pages]


def build_pool(per_pair: int, seed: int, *, variety: float = 1.0, workers: int = 2) -> PagePool:
    """Render ``per_pair`` training pages of every training pair."""
    rng = np.random.default_rng(seed)
    keys = tuple(
        PageKey(topic, kind, int(rng.integers(TRAIN_SEEDS.start, TRAIN_SEEDS.stop)))
        for topic, kind in pairs(held_out=False)
        for _ in range(per_pair)
    )
    # Not forked: a fork of a process whose torch threads are running can wait for them forever.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
        render = partial(_render, variety=variety)
        return PagePool(keys, tuple(executor.map(render, keys, chunksize=64)))


def _render(key: PageKey, variety: float) -> Image.Image:
    return render_page(key.topic, key.kind, key.seed, variety=variety)
