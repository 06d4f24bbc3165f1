"""Held-out MiniDocs lists as a service receives them: a question, and pages as PNG files."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

from mmr5_bench.minidocs.lists import PageKey, RerankCase, held_out_cases
from mmr5_bench.minidocs.pages import render_page
from mmr5_bench.minidocs.vocabulary import KINDS


@dataclass(frozen=True)
class DrawnList:
    """One list. ``other`` is a question that another list asks, ``gold`` has 0-based pages.

    ``pixels`` are hashes of what the pages show: another version of Pillow may compress the same
    pixels into other bytes. ``domain`` is the kind of page that was asked for, or ``any``.
    """

    question: str
    other: str
    pages: tuple[bytes, ...]
    pixels: tuple[str, ...]
    gold: tuple[int, ...]
    domain: str


def draw_lists(count: int, num_pages: int, seed: int) -> tuple[DrawnList, ...]:
    """The first ``count`` held-out lists of ``seed``; a larger ``count`` begins with the same."""
    cases = held_out_cases(count + 1, num_pages, seed)  # the last only lends its question
    return tuple(_draw(case, cases[number + 1 :] + cases) for number, case in enumerate(cases[:-1]))


def _draw(case: RerankCase, following: Sequence[RerankCase]) -> DrawnList:
    drawn = [_page(page) for page in case.pages]
    others = (one.question for one in following if one.question != case.question)
    return DrawnList(
        question=case.question,
        other=next(others, f"Not: {case.question}"),
        pages=tuple(file for file, _ in drawn),
        pixels=tuple(digest for _, digest in drawn),
        gold=case.gold,
        domain="any" if case.kind is None else KINDS[case.kind],
    )


def _page(page: PageKey) -> tuple[bytes, str]:
    image = render_page(page.topic, page.kind, page.seed)
    file = io.BytesIO()
    image.save(file, "PNG")
    shown = f"{image.mode} {image.size}".encode() + image.tobytes()
    return file.getvalue(), hashlib.sha256(shown).hexdigest()[:16]
