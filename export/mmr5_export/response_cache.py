"""Answers of the model, kept in a file so that they are generated once.

The file is jsonl and only grows: one line per answer, written whole, while no other process writes,
and forced to the disk. A killed export leaves at most half of a last line, which is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mmr5_export.write import disk_error
from mmr5_runtime.types import ExportError, Status, StopReason

_KEY = "key"
_BLOCK = 1 << 16  # bytes looked through at a time for the end of the last whole line


@dataclass(frozen=True)
class Response:
    """The answer to one sample.

    ``token_ids`` end with the end token where the answer stopped with it (``stop_reason`` "eos").
    ``order`` holds 0-based positions, best first, and ``status`` how it was read from ``text``.
    """

    token_ids: tuple[int, ...]
    text: str
    stop_reason: StopReason
    order: tuple[int, ...]
    status: Status

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Response:
        """Reads back what ``asdict`` gave; ``TypeError`` or ``KeyError`` for anything else."""
        ids, order = (tuple(map(int, data[name])) for name in ("token_ids", "order"))
        return cls(**{**data, "token_ids": ids, "order": order})


class ResponseCache:
    """Responses by key in the file ``path``, which need not exist yet; None keeps nothing.

    Raises :class:`ExportError` when the file cannot be read or is no such cache.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, Response] = {}
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise _unusable(path, error) from error
        *lines, _ = content.split(b"\n")  # behind the last newline: nothing, or half of a line
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                key = row.pop(_KEY)
                self._known[key] = Response.from_json(row)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ExportError(
                    f"line {number} of {path} holds no cached response ({error!r}); delete the "
                    "file, the responses are then generated again."
                ) from error

    def get(self, key: str) -> Response | None:
        """The response stored under ``key``, if there is one."""
        return self._known.get(key)

    def put(self, key: str, response: Response) -> None:
        """Stores ``response``; it is on the disk when this returns.

        Raises :class:`ExportError` when the disk refuses it.
        """
        self._known[key] = response
        if self._path is None:
            return
        line = json.dumps({_KEY: key, **asdict(response)}, separators=(",", ":")) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                _drop_torn_line(file)
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unusable(self._path, error) from error


def _drop_torn_line(file: BinaryIO) -> None:
    """Cuts off half of a last line; who wrote it is dead, for the living hold the lock."""
    size = end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - _BLOCK)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        end = start + newline + 1
        if newline >= 0:
            break
    if end < size:
        file.truncate(end)


def _unusable(path: Path, error: OSError) -> ExportError:
    return disk_error(
        error,
        f"the cache of responses {path} cannot be used ({error}); check the disk and the "
        "permissions, or delete the file.",
    )
