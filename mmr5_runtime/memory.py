"""Everything that outlives a request: one object per loaded engine, bounded in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from mmr5_runtime.capacity import kv_bytes_per_token
from mmr5_runtime.drafting import SuffixIndex
from mmr5_runtime.loading import LoadedEngine
from mmr5_runtime.prefetch import pages_ahead
from mmr5_runtime.reuse.config import CacheConfig, check_limits
from mmr5_runtime.reuse.encoder_cache import EncoderCache, EncoderCacheStats
from mmr5_runtime.reuse.ledger import MissLedger, MissTotals
from mmr5_runtime.reuse.page_source import PageReader
from mmr5_runtime.reuse.relocate_store import RelocatableStats, RelocatableStore
from mmr5_runtime.reuse.segments import SegmentStore, SegmentStoreStats


@dataclass(frozen=True)
class CacheStats:
    """State and counters of every cache, and why there were misses, since the engine was loaded."""

    encoder: EncoderCacheStats
    segments: SegmentStoreStats
    relocatable: RelocatableStats
    misses: MissTotals


class Memory:
    """Page embeddings, segment KV, relocatable pages, answers to draft from.

    Public as ``Reranker.cache``: :meth:`stats` and :meth:`clear`. Every part is thread-safe.
    """

    def __init__(self, config: CacheConfig, loaded: LoadedEngine, max_image_pixels: int) -> None:
        """Raises RequestError when a limit cannot hold one page, EngineError for the disk tier."""
        device, spec = loaded.engine.device, loaded.engine.spec
        tokens = loaded.budget.max_pixels // spec.vision.factor**2
        model, text = loaded.engine.model, spec.text
        itemsize = model.dtype.itemsize
        per_token = kv_bytes_per_token(text, model.dtype, model.kv)
        check_limits(
            config,
            device,
            embedding_bytes_per_page=tokens * text.hidden_size * itemsize,
            kv_bytes_per_page=tokens * per_token,
        )
        # One page more than are prepared ahead: the one that is asked for.
        self.reader = PageReader(max_image_pixels, threads=1 + pages_ahead(device))
        self.encoder = EncoderCache(config, device, loaded.identity)
        self.segments = SegmentStore(config.kv_bytes, device)
        self.relocatable = RelocatableStore(config.kv_bytes, device)
        self.ledger = MissLedger()
        self.history = SuffixIndex()

    def stats(self) -> CacheStats:
        return CacheStats(
            encoder=self.encoder.stats(),
            segments=self.segments.stats(),
            relocatable=self.relocatable.stats(),
            misses=self.ledger.totals(),
        )

    def clear(self) -> None:
        """Forget everything that was computed; counters and files of the disk tier stay."""
        self.reader.forget()
        self.encoder.clear()
        self.segments.clear()
        self.relocatable.clear()
        self.ledger.forget()
        self.history = SuffixIndex()
