"""The lists that contenders are asked: mini's own, or pages of a true size with a forced length.

``mini`` has held-out MiniDocs lists, which mini answers in its own words. The others have pages of
random pixels with as many visual tokens as pages of a benchmark have. Random weights write a forced
number of tokens about them, a checkpoint its own answer, cut at that number. List ``index`` depends
on nothing but the workload and its number, so any part of a run can be made again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import numpy as np
from PIL import Image

from mmr5_bench.minidocs.lists import HELD_OUT_SEEDS, make_case
from mmr5_bench.minidocs.pages import render_page
from mmr5_bench.minidocs.vocabulary import KINDS
from mmr5_bench.peers.base import ListWork
from mmr5_bench.peers.names import CELLS, MINI, WorkloadName
from mmr5_bench.peers.prompts import PromptReader, encode_png
from mmr5_runtime.image import planned_tokens

MINI_TOKENS = 512  # three times the longest answer of mini to ten pages
_CELL = 28
_GRAIN = 7  # pixels of a side that have one colour, so that files are as small as scans
_TIMED, _WARMUP = 0, 1  # streams of lists that share none


@dataclass(frozen=True)
class Workload:
    """Lists of ``pages`` pages; ``generated`` tokens at most, with ``forced`` exactly as many.

    ``generated`` None is for mini's lists, whose answers end by themselves. Raises ValueError for a
    size that is none, for an unknown name, for a length on mini's lists or none elsewhere, and for
    a pixel budget under which pages would not have the tokens that the workload is named for.
    """

    name: WorkloadName
    pages: int
    generated: int | None
    reader: PromptReader
    seed: int = 0
    forced: bool = False

    def __post_init__(self) -> None:
        if self.name not in get_args(WorkloadName):
            known = ", ".join(get_args(WorkloadName))
            raise ValueError(f"workload {self.name!r} is unknown; pass one of {known}")
        if self.pages < 2:
            raise ValueError(f"{self.pages} pages have one order; ask for 2 or more")
        if (self.generated is None) != (self.name == MINI):
            raise ValueError(
                f"--generated is for every workload but {MINI}, whose answers end by themselves"
            )
        if self.generated is not None and self.generated < 1:
            raise ValueError(f"--generated {self.generated} writes nothing; pass 1 or more")
        self._check_tokens()

    @property
    def label(self) -> str:
        """How it is told from others in names of entries."""
        length = "own" if self.generated is None else self.generated
        return f"workload={self.name},pages={self.pages},generated={length}"

    @property
    def page_tokens(self) -> int | None:
        """Visual tokens of every page; None for mini's lists, where they differ."""
        return None if self.name == MINI else math.prod(CELLS[self.name])

    def _check_tokens(self) -> None:
        if self.page_tokens is None:
            return
        columns, rows = CELLS[self.name]
        found = planned_tokens(columns * _CELL, rows * _CELL, self.reader.budget)
        if found != self.page_tokens:
            raise ValueError(
                f"a page of workload {self.name} has {self.page_tokens} visual tokens, but {found} "
                f"under max_pixels={self.reader.budget.max_pixels}; choose another workload"
            )

    def list(self, index: int) -> ListWork:
        """The timed list ``index``."""
        return self._make(index, _TIMED)

    def warmup(self, index: int) -> ListWork:
        """A list that no timed one equals."""
        return self._make(index, _WARMUP)

    def _make(self, index: int, stream: int) -> ListWork:
        rng = np.random.default_rng([self.seed, self.pages, index, stream])
        return self._minidocs(rng) if self.generated is None else self._drawn(rng, index)

    def _minidocs(self, rng: np.random.Generator) -> ListWork:
        case = make_case(rng, self.pages, held_out=True, seeds=HELD_OUT_SEEDS)
        drawn = [render_page(page.topic, page.kind, page.seed) for page in case.pages]
        return self.reader.work(
            case.question,
            [encode_png(page) for page in drawn],
            MINI_TOKENS,
            gold=case.gold,
            domain="topic" if case.kind is None else KINDS[case.kind],
        )

    def _drawn(self, rng: np.random.Generator, index: int) -> ListWork:
        columns, rows = CELLS[self.name]
        size = (columns * _CELL, rows * _CELL)
        shape = (size[1] // _GRAIN, size[0] // _GRAIN, 3)
        pages = []
        for _ in range(self.pages):
            grains = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
            pages.append(encode_png(grains.resize(size, Image.Resampling.NEAREST)))
        question = f"Which page shows the figure {index:04}?"
        return self.reader.work(question, pages, self.generated or 0, forced=self.forced)
