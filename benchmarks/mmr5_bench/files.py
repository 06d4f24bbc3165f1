"""Result files: written whole or not at all, and journals that a killed run leaves readable."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def write_text(text: str, path: Path) -> None:
    """Writes beside ``path`` and moves it there; a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(document: Mapping[str, Any], path: Path) -> None:
    """The same of one JSON document; ValueError for NaN, which JSON has not."""
    write_text(json.dumps(document, separators=(",", ":"), allow_nan=False) + "\n", path)


def read_json(path: Path, remedy: str) -> Any:
    """One JSON document; ValueError naming the file and ``remedy`` when there is none."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); {remedy}") from error


def append_lines(path: Path, documents: Iterable[Mapping[str, Any]]) -> None:
    """Adds one line of JSON each in a single write, so that processes may share a journal.

    It begins with a line break: what a kill left of the line before ends there. OSError when the
    disk takes only a part of it.
    """
    lines = (json.dumps(document, separators=(",", ":"), allow_nan=False) for document in documents)
    data = "".join(f"\n{line}\n" for line in lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        written = os.write(descriptor, data)
    finally:
        os.close(descriptor)
    if written != len(data):
        raise OSError(f"{path} took {written} of {len(data)} bytes; make room and go on")


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and content of every whole line of a journal; nothing when there is no file yet.

    Empty lines, those that a kill cut off, and what is no object are passed over.
    """
    # Not splitlines, which would break at characters that JSON allows inside of strings.
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(data, dict):
            yield number, data
