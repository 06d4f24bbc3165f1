"""Paying once, ahead of the first request, for what the first of everything costs.

A small rerank runs every stage: kernels are compiled (Triton keeps them on disk for the next
process), libraries choose their algorithms, the vocabulary is read. Then the usual decode steps are
recorded as graphs. Nothing of it is kept as an answer or a page.
"""

from __future__ import annotations

from functools import partial

from PIL import Image

from mmr5_runtime.exhaustion import memory_errors, recording_shortage
from mmr5_runtime.loading import LoadedEngine
from mmr5_runtime.memory import Memory
from mmr5_runtime.options import RerankOptions
from mmr5_runtime.pages import DEFAULT_MAX_IMAGE_PIXELS
from mmr5_runtime.request import open_request
from mmr5_runtime.reuse.config import CacheConfig
from mmr5_runtime.serving import serve
from mmr5_runtime.step.buckets import SEQUENCES
from mmr5_runtime.trtllm.model import BundleModel

_PAGE = (448, 616)  # pixels; an engine's own limits may resize it
_TOKENS = 4


def warm_up(loaded: LoadedEngine, concurrency: int = 1) -> int:
    """Runs everything once; decode steps are recorded for up to ``concurrency`` sequences.

    Returns the number of recorded steps, 0 where they run in plain torch. Raises
    :class:`OutOfMemoryError` when there is no memory to record them.
    """
    memory = Memory(CacheConfig.off(), loaded, DEFAULT_MAX_IMAGE_PIXELS)
    pages = [Image.new("RGB", _PAGE, color) for color in ("white", "gray")]
    # TensorRT-LLM has no drafts, and refuses them.
    drafts = (False,) if isinstance(loaded.engine.model, BundleModel) else (False, True)
    for draft in drafts:
        options = RerankOptions(max_new_tokens=_TOKENS, draft=draft)
        for _ in serve(open_request(loaded, memory, "warm-up", pages, options)):
            pass
    device = loaded.engine.device
    with memory_errors(device, partial(recording_shortage, device)):
        return loaded.engine.warm_up([size for size in SEQUENCES if size < 2 * concurrency])
