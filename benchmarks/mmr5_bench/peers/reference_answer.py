"""An answer read as the public MM-R5 script reads it, made a permutation for the metrics.

The script takes the first ``<answer>[...]</answer>`` of one line, cuts it at the commas and keeps
the ids that exist; what is missing follows in input order, and where nothing can be read the input
order is returned. Repeated ids stay repeated there; here the first of them counts. Our runtime
reads more forms than that (white space in the tag, a list that was cut off), so one text may be a
``fallback`` for a peer and not for ours.
"""

from __future__ import annotations

from mmr5_runtime.types import Status

_OPENING, _CLOSING = "<answer>[", "]</answer>"


def read_as_reference(text: str, num_pages: int) -> tuple[tuple[int, ...], Status]:
    """0-based order of all pages, and how it was read.

    ``ok`` for a list that names every page once, ``repaired`` for one that had to be mended,
    ``fallback`` for none and for one that names no page there is: the order is that of the input.
    """
    ids = _listed(text)
    if ids is None:
        return tuple(range(num_pages)), "fallback"
    named = list(dict.fromkeys(number - 1 for number in ids if 1 <= number <= num_pages))
    if not named:
        return tuple(range(num_pages)), "fallback"
    rest = [page for page in range(num_pages) if page not in named]
    whole = len(ids) == num_pages and not rest
    return (*named, *rest), "ok" if whole else "repaired"


def _listed(text: str) -> list[int] | None:
    """The numbers of the list; None where the script reads none."""
    # "." does not match a line end in the script's expression, so the list stands on one line.
    for line in text.split("\n"):
        _, opened, behind = line.partition(_OPENING)
        body, closed, _ = behind.partition(_CLOSING)
        if opened and closed:
            try:
                return [int(piece) for piece in body.split(",") if piece.strip()]
            except ValueError:
                return None
    return None
