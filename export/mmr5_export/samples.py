"""Calibration data: questions with page lists, read from jsonl, checked and drawn from.

One line is one JSON object::

    {"query": "Which table shows rainfall?", "pages": ["a.png", "b.webp"],
     "relevant": [0], "response": "<think>...</think><answer>[1, 2]</answer>"}

``pages`` are image files in first-stage order, relative to the file. ``relevant`` (0-based
positions that answer the question) and ``response`` (what to calibrate on instead of the model's
own answer) may be left out. Other keys are refused: a misspelt ``relevant`` would be lost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from mmr5_runtime.artifact import file_sha256
from mmr5_runtime.prompt import check_query
from mmr5_runtime.types import ExportError, RequestError

SAMPLES_FILE, META_FILE = "samples.jsonl", "meta.json"
REQUIRED, OPTIONAL = ("query", "pages"), ("relevant", "response")
MIN_PAGES = 2  # a list of one has nothing to rank
_NAMED = 3  # missing files that a message names


class DataError(ExportError):
    """Calibration data that cannot be used: incomplete, damaged or too little."""


@dataclass(frozen=True)
class Sample:
    """One listwise question; ``name`` says where it comes from (file and line).

    ``relevant`` holds 0-based positions in ``pages``; ``response`` is text to use instead of the
    model's own answer. Both are None where the data does not have them. ``own`` says that the
    response is known to be what the model at hand answers.
    """

    name: str
    query: str
    pages: tuple[Path, ...]
    relevant: tuple[int, ...] | None = None
    response: str | None = None
    own: bool = False


@contextmanager
def of_sample(sample: Sample) -> Iterator[None]:
    """Turns a RequestError raised inside into a DataError that names ``sample``."""
    try:
        yield
    except RequestError as error:
        raise DataError(f"{sample.name}: {str(error).rstrip('.')}.") from error


def shipped_set() -> Path:
    """The folder of MiniDocs lists that ``mini`` is calibrated on unless other data is given.

    Raises :class:`ExportError` when this installation lacks it.
    """
    folder = Path(str(resources.files("mmr5_runtime") / "assets" / "calibration"))
    if not folder.is_dir():
        raise ExportError(
            "this installation holds no calibration set; install mmr5-runtime again or pass "
            "--calib-data."
        )
    return folder


def read_samples(source: Path, weights_sha256: str | None = None) -> list[Sample]:
    """Every sample of a jsonl file, or of the one in a folder (``samples.jsonl`` if several).

    Where a folder has a ``meta.json``, responses are ``own`` when it names ``weights_sha256``
    (see :func:`mmr5_export.generator.weights_sha256`) and are left out when it names others;
    without that file, or with None, they are kept as they are. Page files must exist but are not
    opened.

    Raises :class:`DataError` naming file, line and remedy.
    """
    file = _samples_file(source)
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # JSON may hold U+2028
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error}); save it as UTF-8.") from error
    except OSError as error:
        raise DataError(
            f"{file} cannot be read ({error}); check the path and its permissions."
        ) from error
    samples = [
        _parse(line, f"{file.name} line {number}", file.parent)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not samples:
        raise DataError(f'{file} is empty; write one {{"query": ..., "pages": [...]}} per line.')
    _require_files(file, samples)
    meta = file.with_name(META_FILE)
    if weights_sha256 is None or not meta.is_file() or all(s.response is None for s in samples):
        return samples
    if _written_by(meta) != weights_sha256:
        return [replace(sample, response=None) for sample in samples]
    return [replace(sample, own=sample.response is not None) for sample in samples]


def _samples_file(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.is_dir():
        raise DataError(
            f"there is no calibration data at {source}; pass a jsonl file or a folder that holds "
            f"{SAMPLES_FILE}."
        )
    if (source / SAMPLES_FILE).is_file():
        return source / SAMPLES_FILE
    found = sorted(path.name for path in source.glob("*.jsonl"))
    if len(found) != 1:
        several = f"several jsonl files ({', '.join(found[:_NAMED])})" if found else "no jsonl file"
        raise DataError(f"{source} holds {several}; name one {SAMPLES_FILE} or pass its path.")
    return source / found[0]


def _parse(line: str, name: str, folder: Path) -> Sample:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{name} is not JSON ({error}); write one object per line.") from error
    if not isinstance(row, dict):
        raise DataError(f"{name} is not a JSON object; write one object per line.")
    missing = [key for key in REQUIRED if key not in row]
    unknown = [key for key in row if key not in REQUIRED + OPTIONAL]
    if missing or unknown:
        wrong = [f"lacks {', '.join(missing)}"] if missing else []
        wrong += [f"has the unknown column {', '.join(unknown)}"] if unknown else []
        raise DataError(
            f"{name} {' and '.join(wrong)}; the columns are {', '.join(REQUIRED)} and optionally "
            f"{', '.join(OPTIONAL)}."
        )
    try:
        check_query(row["query"])
    except RequestError as error:
        raise DataError(f"{name}: {str(error).rstrip('.')}.") from error
    pages = _pages(row["pages"], name)
    return Sample(
        name,
        row["query"],
        tuple(folder / page for page in pages),
        _relevant(row.get("relevant"), len(pages), name),
        _response(row.get("response"), name),
    )


def _pages(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(page, str) and page for page in value):
        raise DataError(f"{name} has pages that are no list of file names; write them as one.")
    if len(value) < MIN_PAGES:
        raise DataError(
            f"{name} lists {len(value)} page{'' if len(value) == 1 else 's'} but a ranking needs "
            f"{MIN_PAGES} or more; add candidates or remove the line."
        )
    return value


def _relevant(value: Any, num_pages: int, name: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    whole = isinstance(value, list) and all(type(index) is int for index in value)
    if not whole or len(set(value)) < len(value) or not set(value) <= set(range(num_pages)):
        raise DataError(
            f"{name} has relevant = {json.dumps(value)}; give different 0-based positions in its "
            f"list of {num_pages} pages, or leave the column out."
        )
    return tuple(value)


def _response(value: Any, name: str) -> str | None:
    if value is not None and not (isinstance(value, str) and value.strip()):
        raise DataError(
            f"{name} has a response that is blank or no text; leave the column out and the model "
            "answers itself."
        )
    return value


def _require_files(file: Path, samples: Sequence[Sample]) -> None:
    exists = lru_cache(maxsize=None)(Path.is_file)
    missing = [(s.name, page) for s in samples for page in s.pages if not exists(page)]
    if missing:
        first = ", ".join(f"{page} ({name})" for name, page in missing[:_NAMED])
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise DataError(
            f"{file} names pages that are not there: {first}{more}; give paths relative to the "
            "folder of that file."
        )


def _written_by(meta: Path) -> object:
    try:
        return json.loads(meta.read_text(encoding="utf-8"))["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{meta} does not say which weights wrote the responses ({error!r}); remove it, or "
            "add weights_sha256."
        ) from error


def choose(
    samples: Sequence[Sample], calibration: int, held_out: int, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Draws ``calibration`` and ``held_out`` samples, disjoint in content, by a seeded shuffle.

    Of samples with the same question and the same pages, in whatever order, one is drawn at most:
    what is measured on held-out samples must not have been calibrated on. The held-out ones come
    first in the shuffle: more calibration samples then leave them, and with them every number
    measured on them, the same. They lose a response that is not the model's own: what stands in
    the data may be better or worse than the model, and it is the model an engine is held against.

    Raises :class:`DataError` when there are fewer different samples than that or a page cannot be
    read, ``ValueError`` for negative counts.
    """
    if calibration < 0 or held_out < 0:
        raise ValueError(f"{calibration} and {held_out} samples cannot be drawn; ask for 0 or more")
    # Sorting by hashes: no library's shuffle promises the same order in its next version.
    order = sorted(
        range(len(samples)), key=lambda i: hashlib.sha256(f"{seed} {i}".encode()).digest()
    )
    wanted, page_hash = calibration + held_out, lru_cache(maxsize=None)(page_sha256)
    drawn: dict[tuple[str, ...], Sample] = {}
    for index in order:
        if len(drawn) == wanted:
            break
        sample = samples[index]
        content = (sample.query, *sorted(page_hash(page) for page in sample.pages))
        drawn.setdefault(content, sample)
    if len(drawn) < wanted:
        repeated = len(samples) - len(drawn)
        rest = f" that differ ({repeated} more repeat a question and its pages)" if repeated else ""
        raise DataError(
            f"the calibration data has {len(drawn)} samples{rest} but {calibration} to calibrate "
            f"on and {held_out} held out were asked for; add data, or lower --calib-samples or "
            "--held-out."
        )
    chosen = list(drawn.values())
    kept_apart = [s if s.own else replace(s, response=None) for s in chosen[:held_out]]
    return chosen[held_out:], kept_apart


def page_sha256(page: Path) -> str:
    """Hexadecimal sha256 of a page file; raises :class:`DataError` when it cannot be read."""
    try:
        return file_sha256(page)
    except OSError as error:
        raise DataError(
            f"the page {page} cannot be read ({error}); check that the file is still there."
        ) from error


def samples_sha256(samples: Sequence[Sample], responses: Sequence[Sequence[int]]) -> str:
    """Hexadecimal sha256 over what calibration sees of ``samples``, in order.

    That is query, bytes of every page file and token ids of the response; where files lie and what
    they are called does not count. ``responses`` has one list of token ids per sample.
    """
    page_hash, digest = lru_cache(maxsize=None)(page_sha256), hashlib.sha256()
    for sample, response in zip(samples, responses, strict=True):
        content = [sample.query, [page_hash(page) for page in sample.pages], list(response)]
        digest.update(json.dumps(content).encode() + b"\n")
    return digest.hexdigest()
