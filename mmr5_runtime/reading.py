"""Reading a prompt into a cursor, segment by segment, as much of it as possible from memory.

A prompt is a chain: head, pages, tail. Each segment's key is the hash of all before it and itself,
so the longest remembered prefix of the chain is what need not be read. The rest is read segment by
segment and remembered, and so is a prompt of which nothing is known: the calls that read page i are
the same ones (same shapes, same kernels) whether page i - 1 was read just now or last week. That,
and not any property of the kernels, is why warm logits equal cold logits bit for bit. The tail is
always read, so that there are always logits.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter

from torch import Tensor

from mmr5_runtime.cursor import Cursor
from mmr5_runtime.deadline import Deadline
from mmr5_runtime.prompt import Segments
from mmr5_runtime.reuse.chain import page_key, root_key, text_key
from mmr5_runtime.reuse.ledger import MissLedger, PromptKeys
from mmr5_runtime.reuse.segments import SegmentStore
from mmr5_runtime.rope import Grid
from mmr5_runtime.timing import Timings
from mmr5_runtime.types import CacheUse, MissReason


@dataclass
class UseCounts:
    """What a request used so far; :meth:`total` is what its result says."""

    pages_encoded: int = 0
    pages_remembered: int = 0
    pages_decoded: int = 0
    segments_read: int = 0
    segments_remembered: int = 0
    page_prefills: int = 0
    page_prefills_remembered: int = 0
    tokens_read: int = 0
    tokens_remembered: int = 0
    tokens_relocated: int = 0
    replayed_tokens: int = 0
    misses: Counter[MissReason] = field(default_factory=Counter)
    page_misses: Counter[MissReason] = field(default_factory=Counter)

    def total(self) -> CacheUse:
        return CacheUse(
            pages_encoded=self.pages_encoded,
            pages_remembered=self.pages_remembered,
            pages_decoded=self.pages_decoded,
            segments_read=self.segments_read,
            segments_remembered=self.segments_remembered,
            tokens_read=self.tokens_read,
            tokens_remembered=self.tokens_remembered,
            tokens_relocated=self.tokens_relocated,
            replayed_tokens=self.replayed_tokens,
            misses=dict(self.misses),
            page_misses=dict(self.page_misses),
        )


@dataclass(frozen=True)
class PromptPage:
    """A page as a prompt needs it.

    ``key`` names its embeddings, ``pixels`` its pixels (32 bytes each); ``embeddings()`` gives
    [tokens, hidden] on the model's device, encoding the page if nothing remembers it.
    """

    key: bytes
    pixels: bytes
    grid: Grid
    embeddings: Callable[[], Tensor]


@dataclass(frozen=True)
class Prompt:
    """Segments of token ids with the pages they show, and what names them.

    ``engine`` is the engine's identity, ``profile`` the hash of the prompt's wording.
    """

    segments: Segments
    pages: tuple[PromptPage, ...]
    query: str
    engine: bytes
    profile: str

    def keys(self) -> PromptKeys:
        """Keys of head and pages, each behind its predecessor."""
        root = root_key(self.engine, self.profile)
        head = text_key(root, "head", self.segments.head)
        chain = [head]
        for ids, page in zip(self.segments.pages, self.pages, strict=True):
            chain.append(page_key(chain[-1], ids, page.key, page.grid))
        return PromptKeys(
            root=root,
            question=hashlib.sha256(self.query.encode()).digest(),
            head=head,
            segments=tuple(chain[1:]),
            pages=tuple(page.key for page in self.pages),
            pixels=tuple(page.pixels for page in self.pages),
        )

    def key(self, keys: PromptKeys) -> bytes:
        """Names the prompt as a whole, tail included."""
        return text_key((keys.head, *keys.segments)[-1], "tail", self.segments.tail)


def read_prompt(
    prompt: Prompt,
    keys: PromptKeys,
    cursor: Cursor,
    store: SegmentStore,
    ledger: MissLedger,
    counts: UseCounts,
    timings: Timings,
    deadline: Deadline,
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Tensor | None:
    """Read ``prompt`` into an empty cursor; fp32 logits [V] of its last token.

    None when the deadline passed between two segments; what was read by then is remembered. Every
    segment waits for its ``turn()``, so that others can use the model in between; time may pass
    meanwhile, and so it is asked for both before and after the wait.
    """
    chain = (keys.head, *keys.segments)
    nodes = store.prefix(chain)
    counts.misses.update(ledger.segment_misses(keys, len(nodes)))
    segments: list[tuple[Sequence[int], PromptPage | None]] = [
        (prompt.segments.head, None),
        *zip(prompt.segments.pages, prompt.pages, strict=True),
    ]
    known = len(nodes)
    try:
        with timings.span("kv_load"):
            for node, (ids, page) in zip(nodes, segments, strict=False):
                cursor.load(node.k, node.v, ids, _grids(page))
                counts.tokens_remembered += len(ids)
        counts.segments_remembered += len(nodes)
        counts.page_prefills += len(prompt.pages)
        counts.page_prefills_remembered += max(0, len(nodes) - 1)
        for index in range(len(nodes), len(segments)):
            if deadline.passed():
                return None
            ids, page = segments[index]
            with turn():
                if deadline.passed():
                    return None
                embeddings = [] if page is None else [page.embeddings()]
                start, length = perf_counter(), cursor.arena.length
                with timings.span("prefill"):
                    cursor.read(ids, embeddings, _grids(page))
                cost_ms = 1e3 * (perf_counter() - start)
                known += 1
                with timings.span("kv_save"):
                    k, v = cursor.arena.view(length, cursor.arena.length)
                    store.insert(chain[index], chain[index - 1] if index else None, k, v, cost_ms)
            counts.segments_read += 1
            counts.tokens_read += len(ids)
    finally:
        # However it ended: a segment that was not read must not be called evicted next time.
        ledger.remember(keys, known)
    if deadline.passed():
        return None
    with turn():
        if deadline.passed():
            return None
        with timings.span("prefill"):
            logits = cursor.logits(cursor.read(prompt.segments.tail))
    counts.tokens_read += len(prompt.segments.tail)
    return logits


def _grids(page: PromptPage | None) -> list[Grid]:
    return [] if page is None else [page.grid]
