"""Prompts read through the real request machinery, one call each, and what reading them left."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from PIL import Image
from torch import Tensor

from helpers.pictures import noise
from mmr5_runtime.backends import BackendName
from mmr5_runtime.cursor import Cursor
from mmr5_runtime.deadline import Deadline
from mmr5_runtime.loading import LoadedEngine, load_engine
from mmr5_runtime.memory import Memory
from mmr5_runtime.options import Layout, RerankOptions
from mmr5_runtime.pages import DEFAULT_MAX_IMAGE_PIXELS, Page
from mmr5_runtime.reading import UseCounts, read_prompt
from mmr5_runtime.request import open_request
from mmr5_runtime.reranker import Reranker
from mmr5_runtime.reuse.config import CacheConfig
from mmr5_runtime.types import RerankResult

QUESTION = "Which page shows the rainfall?"
MAX_PIXELS = 20 * 784  # small pages, so that small cache limits are legal


class AfterChecks(Deadline):
    """A deadline that passes at its n-th question for it, whatever the clock says."""

    def __init__(self, checks: int) -> None:
        super().__init__(None)
        self._left = checks

    def passed(self, steps_needed: int = 0) -> bool:
        self._left -= 1
        return self._left < 0


class Fresh(Protocol):
    """Makes a reranker of a tiny engine with a memory of its own."""

    def __call__(
        self,
        cache: CacheConfig | None = None,
        quant: str = "int4",
        max_pixels: int | None = MAX_PIXELS,
        kv: str = "bf16",
    ) -> Reranker: ...


@dataclass(frozen=True, eq=False)
class Read:
    """What one read left: ``logits`` [V] or None when time was over, and the cursor behind it."""

    logits: Tensor | None
    cursor: Cursor
    counts: UseCounts

    def equals(self, other: Read) -> bool:
        """Whether logits, positions and every bit of keys and values are the same."""
        ours, others = (
            read.cursor.arena.view(0, read.cursor.mark.length) for read in (self, other)
        )
        return (
            self.logits is not None
            and other.logits is not None
            and torch.equal(self.logits, other.logits)
            and self.cursor.mark == other.cursor.mark
            and all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))
        )


def load(
    folder: Path,
    dtype: str = "float32",
    max_pixels: int = MAX_PIXELS,
    device: str = "cpu",
    kv: str = "bf16",
    backend: str = "native",
) -> LoadedEngine:
    """The engine in ``folder``, by default on the CPU; it is known to run on ``backend``."""
    loaded = load_engine(
        folder, device=device, dtype=dtype, min_pixels=None, max_pixels=max_pixels,
        check_hashes=False, kv=kv, backend=backend,
    )  # fmt: skip
    assert loaded.backend == backend
    return loaded


def open_reranker(folder: Path, backend: BackendName, **options: Any) -> Reranker:
    """A reranker on the CPU, which is known to run on ``backend``."""
    reranker = Reranker.load(folder, "cpu", backend=backend, **options)
    assert reranker.info.backend == backend
    return reranker


def skip_unless_native(backend: str, option: str) -> None:
    """Leaves out, visibly, what another engine refuses as an option of the native one."""
    if backend != "native":
        pytest.skip(f"{backend} refuses {option}, which is for the native engine")


def remember(loaded: LoadedEngine, config: CacheConfig | None = None) -> Memory:
    """An empty memory; without ``config`` it keeps everything."""
    return Memory(config or CacheConfig(), loaded, DEFAULT_MAX_IMAGE_PIXELS)


def forgetful(loaded: LoadedEngine) -> Memory:
    """A memory that keeps nothing: what it reads is read cold."""
    return remember(loaded, CacheConfig.off())


def limited(kv_bytes: int, embedding_bytes: int = 1 << 22) -> CacheConfig:
    """Limits in bytes, for engines whose pages are kilobytes."""
    return CacheConfig(kv_gib=kv_bytes / 2**30, embeddings_gib=embedding_bytes / 2**30)


def read(
    loaded: LoadedEngine,
    memory: Memory,
    pages: Sequence[Page],
    query: str = QUESTION,
    layout: Layout = "reference",
    max_new_tokens: int = 8,
    deadline: Deadline | None = None,
) -> Read:
    """Read one prompt over all ``pages`` into a cursor with room for ``max_new_tokens``."""
    options = RerankOptions(layout=layout, max_new_tokens=max_new_tokens)
    request = open_request(loaded, memory, query, pages, options)
    if deadline is not None:
        request = dataclasses.replace(request, deadline=deadline)
    everything = range(len(pages))
    plan = request.plan_prompt(everything)
    prompt = request.prompt(plan, everything)
    cursor = Cursor(loaded.engine, len(plan.token_ids) + max_new_tokens)
    logits = read_prompt(
        prompt, prompt.keys(), cursor, memory.segments, memory.ledger, request.counts,
        request.timings, request.deadline,
    )  # fmt: skip
    return Read(logits, cursor, request.counts)


def png(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def png_pages(count: int, seed: int = 0) -> list[bytes]:
    """Different pages of 2 x 2 to 2 x 5 tokens."""
    return [png(noise(56, 56 + 28 * (i % 4), seed + i)) for i in range(count)]


def same_answer(one: RerankResult, other: RerankResult) -> bool:
    """Whether two requests were answered with the same text, order, status and numbers."""
    return (one.text, one.order, one.status, one.list_logprob) == (
        other.text,
        other.order,
        other.status,
        other.list_logprob,
    )
