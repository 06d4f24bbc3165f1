"""The public MM-R5 script's reading of an answer, and the list that is to be read, restated.

Both work on the whole text and share no code with what they are compared with.
"""

from __future__ import annotations

import re


def reference_order(text: str, num_pages: int) -> list[int] | None:
    """The reference parser restated without a regular expression; None where it reads nothing.

    It takes the shortest stretch of one line from the leftmost `<answer>[` that is followed by
    `]</answer>` on its line. Repeated ids stay repeated.
    """
    stretch = _reference_stretch(text)
    if stretch is None:
        return None
    try:
        numbers = [int(piece) for piece in text[slice(*stretch)].split(",") if piece.strip()]
    except ValueError:
        return None
    kept = [number - 1 for number in numbers if 0 < number <= num_pages]
    return kept + [page for page in range(num_pages) if page not in kept]


def _reference_stretch(text: str) -> tuple[int, int] | None:
    """Where the list that the reference reads begins and ends."""
    opening, closing = "<answer>[", "]</answer>"
    passed = 0
    for line in text.split("\n"):
        start = line.find(opening)
        if start >= 0:
            stop = line.find(closing, start + len(opening))
            if stop >= 0:
                return passed + start + len(opening), passed + stop
        passed += len(line) + 1
    return None


def skips_a_list(text: str) -> bool:
    """Whether the reference passes over the first list behind the reasoning for a later one."""
    stretch = _reference_stretch(text)
    reasoning, tag, answer = text.partition("</think>")
    if stretch is None or not tag or "<answer>[" in reasoning:
        return False
    first = re.search(r"<answer>[ \t\n\r\f\v]*\[", answer)
    return first is not None and len(reasoning) + len(tag) + first.end() != stretch[0]


def listed_ids(text: str, num_pages: int) -> list[int]:
    """Distinct ids of the complete pieces of the first list behind the reasoning."""
    reasoning, tag, answer = text.partition("</think>")
    opening = re.search(r"<answer>[ \t\n\r\f\v]*\[", answer)
    if not tag or "<answer>[" in reasoning or opening is None:
        return []
    listing = answer[opening.end() :]
    ends = [end for end in (listing.find("]"), listing.find("</answer>")) if end >= 0]
    pieces = listing[: min(ends)].split(",") if ends else listing.split(",")[:-1]
    named: list[int] = []
    for piece in pieces:
        try:
            named.append(int(piece))
        except ValueError:
            found = re.findall(r"\d+\.\d+|\d+", piece)
            named += [int(number) for number in found if "." not in number and len(number) < 10]
    return list(dict.fromkeys(number for number in named if 1 <= number <= num_pages))
