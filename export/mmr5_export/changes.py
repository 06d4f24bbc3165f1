"""What changed between two JSON values, for people."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

_ABSENT = object()
_SHOWN = 60  # characters of a value


def changes(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Where two JSON values differ, "options.seed was 0 and is now 4" per place.

    Of a list only the first place is named. ``name`` is what to call the values themselves.
    """
    if before == now:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            path = f"{name}.{key}" if name else key
            yield from changes(before.get(key, _ABSENT), now.get(key, _ABSENT), path)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        places = (
            changes(one, other, f"{name}[{index}]")
            for index, (one, other) in enumerate(zip(before, now, strict=True))
        )
        yield from islice((change for place in places for change in place), 1)
    elif isinstance(before, list) and isinstance(now, list):
        yield f"{name} had {len(before)} entries and now has {len(now)}"
    else:
        was, is_now = _excerpts(before, now)
        yield f"{name} was {was} and is now {is_now}"


def _excerpts(before: Any, now: Any) -> list[str]:
    """Two values as text, cut to where they differ."""
    texts = ["not given" if v is _ABSENT else json.dumps(v) for v in (before, now)]
    same = len(os.path.commonprefix(texts))
    start = max(0, same - _SHOWN // 2) if max(map(len, texts)) > _SHOWN else 0
    cut = [text[start : start + _SHOWN] for text in texts]
    return [
        f"{'...' if start else ''}{part}{'...' if start + _SHOWN < len(text) else ''}"
        for part, text in zip(cut, texts, strict=True)
    ]
