"""A prompt whose pages were read elsewhere: the approximate way through ``reuse.relocate``.

The head is read as in any prompt; nothing that is relocated is ever put among the exact segments.
"""

from __future__ import annotations

from torch import Tensor

from mmr5_runtime.cursor import Cursor
from mmr5_runtime.model import native_model
from mmr5_runtime.reading import Prompt
from mmr5_runtime.request import Request
from mmr5_runtime.reuse.chain import page_key, root_key, text_key
from mmr5_runtime.reuse.relocate import (
    CONTENT_FREE_QUESTION,
    PageSegment,
    Recompute,
    capture_pages,
    read_relocated,
)
from mmr5_runtime.reuse.relocate_store import RelocatablePage


def read_relocated_prompt(
    request: Request, prompt: Prompt, cursor: Cursor, recompute: Recompute
) -> Tensor | None:
    """Read ``prompt`` with relocated pages; logits [V], or None when time was over."""
    captured = _captured(request, prompt)
    segments = []
    for ids, page in zip(prompt.segments.pages, prompt.pages, strict=True):
        if captured is None or request.deadline.passed():
            return None
        segments.append(PageSegment(ids, page.embeddings(), page.grid))
    assert captured is not None
    question = request.loaded.language.encode(request.query)
    with request.timings.span("prefill"):
        cursor.read(prompt.segments.head)
        done = read_relocated(
            native_model(request.loaded.engine.model),
            cursor.arena,
            cursor.position,
            segments,
            captured,
            prompt.segments.tail,
            question,
            recompute,
        )
    cursor.follow(done.position, prompt.segments.tail[-1])
    counts = request.counts
    counts.page_prefills += len(prompt.pages)
    counts.tokens_read += len(prompt.segments.head) + done.computed
    counts.tokens_relocated += done.relocated
    return done.logits


def _captured(request: Request, prompt: Prompt) -> list[RelocatablePage] | None:
    """Every page as it looks behind the content-free question, from memory or captured now.

    None when time was over before the last one.
    """
    store, model = request.memory.relocatable, native_model(request.loaded.engine.model)
    free = [
        request.tokenizer.segments(CONTENT_FREE_QUESTION, [_image_tokens(request, ids)])
        for ids in prompt.segments.pages
    ]
    parent = text_key(root_key(prompt.engine, prompt.profile), "relocated", free[0].head)
    keys = [
        page_key(parent, part.pages[0], page.key, page.grid)
        for part, page in zip(free, prompt.pages, strict=True)
    ]
    found = [store.get(key) for key in keys]
    missing = [index for index, page in enumerate(found) if page is None]
    wanted = []
    for index in missing:
        if request.deadline.passed():
            return None
        ids, page = free[index].pages[0], prompt.pages[index]
        wanted.append(PageSegment(ids, page.embeddings(), page.grid))
        request.counts.tokens_read += len(ids)
    if missing:
        request.counts.tokens_read += len(free[0].head)
    taken = capture_pages(model, free[0].head, wanted)
    for index in missing:
        if request.deadline.passed():
            return None
        with request.timings.span("capture"):
            fresh = next(taken)
        store.put(keys[index], fresh)
        # On a GPU from main memory again, where it has room.
        found[index] = fresh if fresh.k.device.type == "cpu" else store.get(keys[index]) or fresh
    return [page for page in found if page is not None]


def _image_tokens(request: Request, token_ids: tuple[int, ...]) -> int:
    return token_ids.count(request.tokenizer.image_pad_id)
