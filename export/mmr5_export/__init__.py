"""Turns a Qwen2.5-VL checkpoint into an engine folder, one tensor at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmr5_export.pipeline import export

__all__ = ["export"]


def __getattr__(name: str) -> object:
    # On first use only: `mmr5-export --help` then need not wait for torch.
    if name != "export":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mmr5_export.pipeline import export

    return export
