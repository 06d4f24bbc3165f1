"""Rendered training pages as one pool of patches, and batches drawn from it."""

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

from mmr5_bench.mini.config import PIXEL_MEAN, PIXEL_STD
from mmr5_bench.minidocs.lists import TRAIN_SEEDS, PageKey
from mmr5_bench.minidocs.pages import render_page
from mmr5_bench.minidocs.vocabulary import pairs

CELL = 28
MEAN = torch.tensor(PIXEL_MEAN) * 255.0
STD = torch.tensor(PIXEL_STD) * 255.0


@dataclass(frozen=True)
class PagePool:
    """Pages kept as uint8 [height, width, 3] with sides rounded to multiples of 28."""

    keys: tuple[PageKey, ...]
    pixels: tuple[Tensor, ...]

    def grid(self, index: int) -> tuple[int, int, int]:
        """Patches (time, rows, columns) of one page."""
        height, width, _ = self.pixels[index].shape
        return 1, height // 14, width // 14

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Patches [P, 1176] float32 of several pages in merge-block order, and grids [N, 3]."""
        patches = [patchify(self.pixels[i]) for i in indices]
        return torch.cat(patches), torch.tensor([self.grid(i) for i in indices])


def patchify(pixels: Tensor) -> Tensor:
    """uint8 [H, W, 3] -> float32 [P, 3*2*14*14], the layout of Qwen2.5-VL's image processor."""
    height, width, _ = pixels.shape
    values = ((pixels.float() - MEAN) / STD).permute(2, 0, 1)
    rows, columns = height // CELL, width // CELL
    values = values.reshape(3, rows, 2, 14, columns, 2, 14).permute(1, 4, 2, 5, 0, 3, 6)
    values = values.reshape(rows * columns * 4, 3, 1, 14 * 14).expand(-1, -1, 2, -1)
    return values.reshape(rows * columns * 4, -1)


def resized(image: Image.Image) -> Tensor:
    """The page with both sides rounded to multiples of 28, as smart resize does at this size."""
    width, height = (max(CELL, round(side / CELL) * CELL) for side in image.size)
    return torch.from_numpy(np.asarray(image.resize((width, height))).copy())


def _render(key: PageKey, variety: float) -> Tensor:
    return resized(render_page(key.topic, key.kind, key.seed, variety=variety))


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
        return PagePool(
            keys, tuple(executor.map(partial(_render, variety=variety), keys, chunksize=64))
        )
