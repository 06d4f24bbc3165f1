"""Answers for tests of their cache, in a module that a spawned process can import."""

from __future__ import annotations

from pathlib import Path

from mmr5_export.response_cache import Response, ResponseCache


def response(text: str) -> Response:
    return Response((1, 2), text, "eos", (0,), "ok")


def put_many(path: Path, name: str) -> None:
    """Puts forty long answers under keys that begin with ``name``."""
    cache = ResponseCache(path)
    for number in range(40):
        cache.put(f"{name}-{number}", response(name * 3000))
