"""The true vocabulary of Qwen's byte-level BPE: its merge ranks and the merging by rank.

The ranks ship inside the ``dashscope`` package as ``resources/qwen.tiktoken``. The file is read
where the package lies; the package itself, a client of a web service, is never imported.
"""

from __future__ import annotations

import base64
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Regex, pre_tokenizers

from helpers.bpe import QWEN_SPLIT


@cache
def ranks() -> dict[bytes, int]:
    """The token id of every byte string of the vocabulary, special tokens aside: 151,643 of them.

    Ids are ranks: of two neighbours that could merge, the pair of the lower id merges first.
    """
    package = find_spec("dashscope")
    assert package is not None and package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0])
    lines = (folder / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    pairs = (line.split() for line in lines if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


@cache
def vocabulary() -> tuple[bytes, ...]:
    """The bytes of each id, special tokens (ids from 151,643 on) aside."""
    return tuple(ranks())


def bpe(text: str) -> list[int]:
    """Token ids of ``text``, which must hold no special token."""
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
    words = [word for word, _ in split.pre_tokenize_str(text)]
    return [token for word in words for token in _merge(word.encode("utf-8"))]


@cache
def _merge(word: bytes) -> tuple[int, ...]:
    parts = [bytes([byte]) for byte in word]
    while True:
        merged = [ranks().get(left + right) for left, right in zip(parts, parts[1:], strict=False)]
        found = [rank for rank in merged if rank is not None]
        if not found:
            return tuple(ranks()[part] for part in parts)
        at = merged.index(min(found))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
