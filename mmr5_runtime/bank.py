"""The pages of one request: sizes and keys at once, embeddings when a prompt has to be read."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmr5_runtime.image import PixelBudget, preprocess
from mmr5_runtime.loading import LoadedEngine
from mmr5_runtime.memory import Memory
from mmr5_runtime.pages import naming
from mmr5_runtime.planning import PlannedPage
from mmr5_runtime.reading import PromptPage, UseCounts
from mmr5_runtime.reuse.encoder_cache import page_key
from mmr5_runtime.reuse.page_source import PageSource
from mmr5_runtime.timing import Timings


class PageBank:
    """Gives out every page's embeddings, each encoded at most once in the life of the request.

    Embeddings stay here, in main memory, until the request ends, so that a plan with many prompts
    encodes no page twice, however small the cache is.
    """

    def __init__(
        self,
        loaded: LoadedEngine,
        memory: Memory,
        sources: Sequence[PageSource],
        planned: Sequence[PlannedPage],
        budget: PixelBudget,
        counts: UseCounts,
        timings: Timings,
    ) -> None:
        self._loaded, self._memory = loaded, memory
        self._sources, self._budget = sources, budget
        self._counts, self._timings = counts, timings
        self.planned = planned
        self._held: dict[bytes, Tensor] = {}
        self.keys = [
            page_key(source.pixels, page.sizes, loaded.image_settings, loaded.identity)
            for source, page in zip(sources, planned, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._sources)

    def page(self, index: int) -> PromptPage:
        """Candidate ``index`` (0-based) as a prompt needs it."""
        return PromptPage(
            key=self.keys[index],
            pixels=self._sources[index].pixels,
            grid=self.planned[index].grid,
            embeddings=lambda: self.embeddings(index),
        )

    def embeddings(self, index: int) -> Tensor:
        """[tokens, hidden] in the compute dtype, on the model's device."""
        key = self.keys[index]
        if (held := self._held.get(key)) is not None:
            return held.to(self._loaded.engine.device)
        found = self._find(index)
        self._held[key] = found.cpu()
        return found

    def encode(self, index: int) -> None:
        """Put candidate ``index`` into the cache, and hold it no longer than that."""
        self._find(index)

    def _find(self, index: int) -> Tensor:
        key, planned = self.keys[index], self.planned[index]
        found = self._memory.encoder.get(key, planned.grid, planned.tokens)
        if found is not None:
            self._counts.pages_remembered += 1
        else:
            found = self._encode(index)
        self._sources[index].let_go()
        return found

    def _encode(self, index: int) -> Tensor:
        source, key = self._sources[index], self.keys[index]
        self._counts.pages_decoded += not source.decoded
        with self._timings.span("image_decode"):
            image = source.image()
        with self._timings.span("preprocess"), naming(source.page, index):
            patched = preprocess(image, self._budget, **self._loaded.image_settings)
        with self._timings.span("vision"):
            embeddings = self._loaded.engine.encode_page(patched.pixel_values, patched.grid)
        # Only now: the ledger takes what missed as computed from here on.
        self._counts.page_misses[self._memory.ledger.encoder_miss(key, source.pixels)] += 1
        self._memory.encoder.put(key, embeddings, patched.grid)
        self._counts.pages_encoded += 1
        return embeddings
