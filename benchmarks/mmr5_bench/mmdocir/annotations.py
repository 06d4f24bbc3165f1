"""MMDocIR's annotation file: documents, the rows their pages have, questions and gold pages.

``MMDocIR_annotations.jsonl`` has one document per line. What is used of it: ``doc_name``,
``domain``, ``page_indices`` (first and last row in the pages table, both included) and of every
question ``Q`` and ``page_id`` (0-based pages of the document). The rest may be there or not, in
either spelling (the README of the data writes ``layout_indinces``).

The format and every rule are those of the official code, github.com/MMDocRAG/MMDocIR.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOMAINS: tuple[str, ...] = (
    "Research report / Introduction",
    "Administration/Industry file",
    "Tutorial/Workshop",
    "Academic paper",
    "Brochure",
    "Financial report",
    "Guidebook",
    "Government",
    "Laws",
    "News",
)
"""The domains in the order of the official tables; the macro average is over all ten."""

FILE_NAME = "MMDocIR_annotations.jsonl"
PUBLISHED_SHA256 = "1224825c45573815"  # how the hash of the published file begins
DOWNLOAD = (
    "download MMDocIR_pages.parquet from the hub data set MMDocIR/MMDocIR_Evaluation_Dataset and "
    "dataset/MMDocIR_annotations.jsonl from github.com/MMDocRAG/MMDocIR into one folder (the data "
    "is CC BY-NC 4.0, for research only, and does not come with this package)"
)


@dataclass(frozen=True)
class Question:
    """One question about one document.

    ``id`` counts questions in the order of the file, ``document`` documents likewise. ``gold`` has
    0-based pages of the document as the file lists them: a repeated one stays repeated, and counts
    twice in the denominator of recall.
    """

    id: int
    document: int
    text: str
    gold: tuple[int, ...]


@dataclass(frozen=True)
class AnnotatedDocument:
    """A document and the rows ``first`` to ``last``, both included, that its pages have."""

    name: str
    domain: str
    first: int
    last: int

    @property
    def num_pages(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True)
class Annotations:
    """The whole file; ``questions[i].id == i``."""

    sha256: str
    documents: tuple[AnnotatedDocument, ...]
    questions: tuple[Question, ...]

    @property
    def published(self) -> bool:
        """Whether this is the file that every published figure is about."""
        return self.sha256.startswith(PUBLISHED_SHA256)

    @property
    def num_rows(self) -> int:
        """Rows that the pages table must have at the least."""
        return 1 + max(document.last for document in self.documents)

    def document(self, question: Question) -> AnnotatedDocument:
        return self.documents[question.document]


def find_annotations(folder: Path) -> Path:
    """The annotation file in ``folder``; ValueError saying what to download and where from."""
    if not folder.is_dir():
        raise ValueError(f"there is no data folder {folder}; {DOWNLOAD}")
    path = folder / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {FILE_NAME}; {DOWNLOAD}")
    return path


def read_annotations(path: Path) -> Annotations:
    """Reads and checks the file; ValueError naming file and line for anything amiss.

    A question without gold pages is kept: the official recall of it is 0. Two documents that share
    a row are refused, because that is what a last row that is not included looks like.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {DOWNLOAD}") from error
    documents: list[AnnotatedDocument] = []
    questions: list[Question] = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1] if lines[-1] == b"" else lines, start=1):
        try:
            document, asked = _document(line)
        except ValueError as error:
            raise ValueError(
                f"{path} line {number}: {error}; download the file again, it has one document of "
                "MMDocIR per line"
            ) from error
        questions += [
            Question(len(questions) + index, len(documents), text, gold)
            for index, (text, gold) in enumerate(asked)
        ]
        documents.append(document)
    if not questions:
        raise ValueError(f"{path} has no questions; {DOWNLOAD}")
    _check_rows(path, documents)
    return Annotations(hashlib.sha256(data).hexdigest(), tuple(documents), tuple(questions))


def _document(line: bytes) -> tuple[AnnotatedDocument, list[tuple[str, tuple[int, ...]]]]:
    try:
        data = json.loads(line)
    except ValueError as error:  # also bytes that are no UTF-8
        raise ValueError(f"it is no JSON ({error})") from error
    except RecursionError:
        raise ValueError("it is no JSON that can be read: nested too deeply") from None
    if not isinstance(data, dict):
        raise ValueError(f"it holds {_shown(data)} and no object")
    name, domain = _text(data, "doc_name"), _text(data, "domain")
    if domain not in DOMAINS:
        raise ValueError(f"domain {domain!r} is none of the ten ({', '.join(DOMAINS)})")
    rows = _pages(data, "page_indices")
    if len(rows) != 2 or not 0 <= rows[0] <= rows[1]:
        raise ValueError(f"page_indices {_shown(rows)} is no first and last row, both included")
    document = AnnotatedDocument(name, domain, rows[0], rows[1])
    asked = _field(data, "questions")
    if not isinstance(asked, list):
        raise ValueError(f"questions is {_shown(asked)} and no list")
    return document, [_question(one, index, document) for index, one in enumerate(asked, start=1)]


def _question(data: Any, index: int, document: AnnotatedDocument) -> tuple[str, tuple[int, ...]]:
    try:
        if not isinstance(data, dict):
            raise ValueError(f"it is {_shown(data)} and no object")
        text, gold = _text(data, "Q"), _pages(data, "page_id")
        for page in gold:
            if not 0 <= page < document.num_pages:
                raise ValueError(
                    f"page_id {page} is outside of 0 to {document.num_pages - 1}, the pages of "
                    f"{document.name}"
                )
    except ValueError as error:
        raise ValueError(f"question {index}: {error}") from error
    return text, gold


def _field(data: Mapping[str, Any], key: str) -> Any:
    if key not in data:
        raise ValueError(f"it lacks {key!r}")
    return data[key]


def _text(data: Mapping[str, Any], key: str) -> str:
    value = _field(data, key)
    if not isinstance(value, str):
        raise ValueError(f"{key} is {_shown(value)} and no text")
    return value


def _pages(data: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = _field(data, key)
    if not isinstance(value, list) or not all(type(page) is int for page in value):
        raise ValueError(f"{key} is {_shown(value)} and no list of whole numbers")
    return tuple(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _check_rows(path: Path, documents: list[AnnotatedDocument]) -> None:
    by_row = sorted(enumerate(documents, start=1), key=lambda item: (item[1].first, item[1].last))
    for (line, document), (other_line, other) in zip(by_row, by_row[1:], strict=False):
        if other.first <= document.last:
            raise ValueError(
                f"{path}: lines {line} and {other_line} share row {other.first}, but page_indices "
                "includes its last row; subtract 1 from the ends, or download the file again"
            )
