"""The pages that every reranker is given, frozen: a first stage's best pages of every question.

A file of candidates is one JSON object::

    kind            "mmdocir-candidates"
    schema          1
    dataset_sha256  of the annotation file the ids are of
    first_stage     name of the retriever
    depth           pages kept per question; fewer only where the document has fewer
    lists           {question id: [0-based pages of its document, best first]}
    sha256          of all the other keys as canonical JSON

Figures of two runs can be compared only on the same lists: published first stages of one name
differ by four points of macro recall. So lists are frozen, and their checksum stands in every
result.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmr5_bench.files import read_json, write_json
from mmr5_bench.mmdocir.annotations import Annotations

KIND = "mmdocir-candidates"
SCHEMA = 1
DEPTH = 20  # kept; the paper reranks 10


@dataclass(frozen=True)
class Candidates:
    """Candidate pages by question id, best first; see the module's text."""

    dataset_sha256: str
    first_stage: str
    depth: int
    lists: Mapping[int, tuple[int, ...]]

    @property
    def sha256(self) -> str:
        """Of the content; how the file is laid out does not matter."""
        text = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def cut(self, question: int, k: int) -> tuple[int, ...]:
        """The first ``k`` pages of the list, or all where the document has fewer.

        ValueError for a ``k`` below 1 or beyond ``depth``, and for a question without a list.
        """
        if not 1 <= k <= self.depth:
            raise ValueError(
                f"--k {k}: these candidates have {self.depth} pages per question; ask for 1 to "
                f"{self.depth}, or freeze more with --depth"
            )
        if question not in self.lists:
            raise ValueError(
                f"the candidates have no list for question {question}; freeze them again"
            )
        return self.lists[question][:k]

    def _content(self) -> dict[str, Any]:
        return {
            "kind": KIND,
            "schema": SCHEMA,
            "dataset_sha256": self.dataset_sha256,
            "first_stage": self.first_stage,
            "depth": self.depth,
            "lists": {str(question): list(self.lists[question]) for question in sorted(self.lists)},
        }

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        write_json({**self._content(), "sha256": self.sha256}, path)


def load_candidates(path: Path, annotations: Annotations) -> Candidates:
    """Reads lists and checks them against ``annotations``.

    ValueError naming the file when it is no candidates file, was changed after it was frozen, is of
    another annotation file, or has a list with a page twice, outside of its document, or missing.
    """
    data = read_json(path, "make it with `mmr5-bench mmdocir freeze`")
    if not isinstance(data, dict) or data.get("kind") != KIND or data.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} is no candidates file of schema {SCHEMA}; make one with `mmr5-bench mmdocir "
            "freeze --scores FILE`"
        )
    candidates = _parsed(data, path)
    if data.get("sha256") != candidates.sha256:
        raise ValueError(
            f"{path} was changed after it was frozen (its checksum is {data.get('sha256')!r} and "
            f"its content has {candidates.sha256!r}); take the original, or freeze it again"
        )
    if candidates.dataset_sha256 != annotations.sha256:
        raise ValueError(
            f"{path} belongs to the annotation file with sha256 {candidates.dataset_sha256[:16]}, "
            f"this one has {annotations.sha256[:16]}; freeze candidates for it"
        )
    _check_lists(candidates, annotations, str(path))
    return candidates


def from_scores(
    path: Path, annotations: Annotations, *, first_stage: str, depth: int = DEPTH
) -> Candidates:
    """The best ``depth`` pages of every question by the scores of a first stage.

    ``path`` has one JSON object per line: ``{"question": id, "scores": [one number per page of the
    question's document]}``. Sorted as the official code does: descending, and the lower page first
    where scores are equal. ``-Infinity`` says that a page was not ranked; such a page never gets
    into a list. ValueError naming file and line for anything amiss, and for questions that no line
    is about.
    """
    if depth < 1:
        raise ValueError(f"--depth {depth} keeps nothing; ask for 1 page or more")
    if not first_stage.strip():
        raise ValueError("the first stage has no name; pass --first-stage NAME")
    lists: dict[int, tuple[int, ...]] = {}
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); name a JSONL file") from error
    for number, line in enumerate(lines[:-1] if lines[-1] == b"" else lines, start=1):
        try:
            question, ranked = _ranked(line, annotations, depth)
            if question in lists:
                raise ValueError(f"question {question} has scores already; keep one of the two")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {number}: {error}") from error
        lists[question] = ranked
    missing = [question.id for question in annotations.questions if question.id not in lists]
    if missing:
        raise ValueError(
            f"{path} has no scores for {len(missing)} of {len(annotations.questions)} questions "
            f"(the first is {missing[0]}); a first stage ranks all of them"
        )
    return Candidates(annotations.sha256, first_stage, depth, lists)


def order_of_scores(scores: Sequence[float]) -> list[int]:
    """Pages by descending score; of equal scores the lower page first."""
    return sorted(range(len(scores)), key=scores.__getitem__, reverse=True)  # stays stable


def _ranked(line: bytes, annotations: Annotations, depth: int) -> tuple[int, tuple[int, ...]]:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise ValueError(f"it is no JSON ({error})") from error
    if not isinstance(data, dict) or not {"question", "scores"} <= set(data):
        raise ValueError('it is no {"question": id, "scores": [...]}')
    question, scores = data["question"], data["scores"]
    if type(question) is not int or not 0 <= question < len(annotations.questions):
        raise ValueError(
            f"question {question!r} is none of 0 to {len(annotations.questions) - 1}, which count "
            "the questions in the order of the annotation file"
        )
    pages = annotations.document(annotations.questions[question]).num_pages
    if not isinstance(scores, list) or len(scores) != pages:
        count = len(scores) if isinstance(scores, list) else "no"
        raise ValueError(
            f"question {question} has {count} scores, but its document has {pages} pages; rank "
            "every page of the question's own document, the last one too"
        )
    values = [_score(score, page, question) for page, score in enumerate(scores)]
    ranked = [page for page in order_of_scores(values) if values[page] != -math.inf]
    if len(ranked) < min(depth, pages):
        raise ValueError(
            f"question {question} ranks {len(ranked)} of its {pages} pages, fewer than --depth "
            f"{depth}; lower it, or rank more"
        )
    return question, tuple(ranked[:depth])


def _score(value: Any, page: int, question: int) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        score = float(value) if number else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        score = math.inf
    if math.isnan(score) or score == math.inf:
        shown = repr(value)[:40]
        raise ValueError(
            f"question {question} has the score {shown} for page {page}; scores are finite numbers"
        )
    return score


def _parsed(data: Mapping[str, Any], path: Path) -> Candidates:
    texts = [data.get("dataset_sha256"), data.get("first_stage")]
    depth, lists = data.get("depth"), data.get("lists")
    if not all(isinstance(text, str) for text in texts) or type(depth) is not int or depth < 1:
        raise ValueError(f"{path} lacks dataset_sha256, first_stage or depth; freeze it again")
    whole = isinstance(lists, dict) and all(
        key.isascii()
        and key.isdigit()
        and isinstance(pages, list)
        and all(type(page) is int for page in pages)
        for key, pages in lists.items()
    )
    if not whole:
        raise ValueError(f"{path}: lists is no object of page lists by question; freeze it again")
    assert isinstance(lists, dict)
    by_question = {int(key): tuple(pages) for key, pages in lists.items()}
    return Candidates(str(texts[0]), str(texts[1]), depth, by_question)


def _check_lists(candidates: Candidates, annotations: Annotations, where: str) -> None:
    for question in annotations.questions:
        pages = candidates.lists.get(question.id)
        document = annotations.document(question)
        wanted = min(candidates.depth, document.num_pages)
        if pages is None or len(pages) != wanted:
            count = "no list" if pages is None else f"{len(pages)} pages"
            raise ValueError(
                f"{where}: question {question.id} has {count} and should have {wanted}; freeze "
                "the candidates again"
            )
        if len(set(pages)) != len(pages):
            raise ValueError(f"{where}: question {question.id} has a page twice; freeze it again")
        if not all(0 <= page < document.num_pages for page in pages):
            raise ValueError(
                f"{where}: question {question.id} has a page outside of 0 to "
                f"{document.num_pages - 1}; pages count from 0 inside the document"
            )
    if stray := set(candidates.lists) - set(range(len(annotations.questions))):
        raise ValueError(
            f"{where} has a list for question {min(stray)}, which there is none of; freeze it again"
        )
