"""The pages of one request: sizes and keys at once, embeddings when a prompt has to be read.

For a GPU the pages that will be asked for next are decoded and cut in threads meanwhile, and cross
to it as bytes. The stages ``image_decode`` and ``preprocess`` are what the request waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from PIL import Image
from torch import Tensor

from mmr5_runtime.image import BytePage, PixelBudget, preprocess, preprocess_bytes
from mmr5_runtime.loading import LoadedEngine
from mmr5_runtime.memory import Memory
from mmr5_runtime.pages import naming
from mmr5_runtime.planning import PlannedPage
from mmr5_runtime.prefetch import Prefetch, Preparation, pages_ahead
from mmr5_runtime.reading import PromptPage, UseCounts
from mmr5_runtime.reuse.encoder_cache import page_key
from mmr5_runtime.reuse.page_source import PageSource
from mmr5_runtime.timing import Timings


class PagePreparations:
    """Makes the preparation of every page of a request; holds no bank and no embeddings.

    Threads and a :class:`Prefetch` keep it, and the bank keeps those: were it the bank itself, all
    pages of a request would stay until the collector of cycles comes by.
    """

    def __init__(
        self, loaded: LoadedEngine, sources: Sequence[PageSource], budget: PixelBudget
    ) -> None:
        self._settings, self._device = loaded.image_settings, loaded.engine.device
        self._sources, self._budget = sources, budget

    def __call__(self, index: int) -> Preparation[Tensor | BytePage]:
        """The one of candidate ``index``, not started."""
        source = self._sources[index]
        return Preparation(source.image, partial(self._cut, index), source.decoded)

    def _cut(self, index: int, image: Image.Image) -> Tensor | BytePage:
        """A decoded page as its device wants it."""
        with naming(self._sources[index].page, index):
            if self._device.type == "cpu":
                return preprocess(image, self._budget, **self._settings).pixel_values
            return preprocess_bytes(image, self._budget, **self._settings)


class PageBank:
    """Gives out every page's embeddings, each encoded at most once in the life of the request.

    Embeddings stay here, in main memory, until the request ends, so that a plan with many prompts
    encodes no page twice, however small the cache is. To be closed when the request ends: threads
    may be preparing pages.
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
        self._sources = sources
        self._counts, self._timings = counts, timings
        self.planned = planned
        self._held: dict[bytes, Tensor] = {}
        self._device = loaded.engine.device
        self._prefetch = Prefetch(
            PagePreparations(loaded, sources, budget), pages_ahead(self._device)
        )
        self.keys = [
            page_key(source.pixels, page.sizes, loaded.image_settings, loaded.identity)
            for source, page in zip(sources, planned, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._sources)

    def page(self, index: int) -> PromptPage:
        """Candidate ``index`` (0-based) as a prompt needs it; the ones behind it come next."""
        return self._page(range(index, len(self)), 0)

    def pages(self, indices: Sequence[int]) -> tuple[PromptPage, ...]:
        """Candidates in the order of one prompt, which reads each of them once it reads the first.

        Where threads prepare pages, asking for the embeddings of one sets them to those behind it.
        """
        return tuple(self._page(indices, place) for place in range(len(indices)))

    def _page(self, indices: Sequence[int], place: int) -> PromptPage:
        index = indices[place]
        return PromptPage(
            key=self.keys[index],
            pixels=self._sources[index].pixels,
            grid=self.planned[index].grid,
            embeddings=partial(self.embeddings, index, then=self._behind(indices, place)),
        )

    def _behind(self, indices: Sequence[int], place: int) -> Sequence[int]:
        """As many of ``indices`` behind ``place`` as can be prepared at once."""
        return indices[place + 1 : place + 1 + self._prefetch.ahead]

    def embeddings(self, index: int, then: Sequence[int] = ()) -> Tensor:
        """[tokens, hidden] in the compute dtype, on the model's device.

        ``then``: candidates whose embeddings will be asked for next.
        """
        self._expect([index, *then])
        key = self.keys[index]
        if (held := self._held.get(key)) is not None:
            return held.to(self._device)
        found = self._find(index)
        self._held[key] = found.cpu()
        return found

    def encode(self, index: int) -> None:
        """Put candidate ``index`` into the cache, and hold it no longer than that.

        The candidates behind it are taken to be next.
        """
        self._expect([index, *self._behind(range(index, len(self)), 0)])
        self._find(index)

    def close(self) -> None:
        """Stop preparing pages and let go of all; nothing is left running afterwards."""
        self._prefetch.close()
        self._held.clear()

    def _expect(self, indices: Sequence[int]) -> None:
        """Have the pages among ``indices`` prepared that nothing remembers, each once."""
        if not self._prefetch.ahead:
            return
        missing = {self.keys[index]: index for index in reversed(indices)}
        known = {key for key in missing if key in self._held or self._memory.encoder.holds(key)}
        wanted = {index for key, index in missing.items() if key not in known}
        self._prefetch.expect([index for index in indices if index in wanted])

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
        source, key, grid = self._sources[index], self.keys[index], self.planned[index].grid
        preparation = self._prefetch.take(index)
        self._counts.pages_decoded += not preparation.was_decoded
        with self._timings.span("image_decode", wait=False):
            preparation.decoded()
        with self._timings.span("preprocess", wait=False):
            patches = preparation.patches()
        with self._timings.span("vision"):
            if isinstance(patches, BytePage):
                patches = patches.pixel_values(self._device)
            embeddings = self._loaded.engine.encode_page(patches, grid)
        # Only now: the ledger takes what missed as computed from here on.
        self._counts.page_misses[self._memory.ledger.encoder_miss(key, source.pixels)] += 1
        self._memory.encoder.put(key, embeddings, grid)
        self._counts.pages_encoded += 1
        return embeddings
