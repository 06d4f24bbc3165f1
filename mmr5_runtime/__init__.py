"""Listwise reranking of document pages with MM-R5 (Qwen2.5-VL).

Public names are resolved on first use: importing the package costs no torch import, touches no
device, and lets the exporter use the artefact format without loading the model code.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmr5_runtime.consistency import ConsistencyReport
    from mmr5_runtime.document import Document
    from mmr5_runtime.image import PixelBudget
    from mmr5_runtime.memory import CacheStats
    from mmr5_runtime.options import RerankOptions
    from mmr5_runtime.pages import Page
    from mmr5_runtime.reranker import Reranker
    from mmr5_runtime.reuse.config import CacheConfig
    from mmr5_runtime.types import (
        CacheUse,
        CheckpointError,
        ContextOverflowError,
        EngineError,
        ExportError,
        Mmr5Error,
        OutOfMemoryError,
        PageError,
        PlanUse,
        ReasoningDelta,
        RequestError,
        RerankResult,
        Stability,
        StreamEvent,
        Usage,
        WindowResult,
    )

__version__ = "0.1.0"

__all__ = [
    "CacheConfig",
    "CacheStats",
    "CacheUse",
    "CheckpointError",
    "ConsistencyReport",
    "ContextOverflowError",
    "Document",
    "EngineError",
    "ExportError",
    "Mmr5Error",
    "OutOfMemoryError",
    "Page",
    "PageError",
    "PixelBudget",
    "PlanUse",
    "ReasoningDelta",
    "RequestError",
    "RerankOptions",
    "RerankResult",
    "Reranker",
    "Stability",
    "StreamEvent",
    "Usage",
    "WindowResult",
    "__version__",
]

# Where the names that do not live in `types` come from.
_HOME = {
    "CacheConfig": "reuse.config",
    "CacheStats": "memory",
    "ConsistencyReport": "consistency",
    "Document": "document",
    "Page": "pages",
    "PixelBudget": "image",
    "RerankOptions": "options",
    "Reranker": "reranker",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'types')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
