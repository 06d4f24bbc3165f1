"""Page embeddings in a folder: they outlive the process, and several processes may share it.

One safetensors file per page, ``<key in hexadecimal>.page``, with one tensor ``embeddings`` and the
metadata ``schema``, ``key``, ``engine``, ``grid`` and ``sha256``, the last one over all the others,
dtype, shape and payload. Nothing is served whose hash, key, engine or grid differs, whatever was
done to the file. The folder has no index and there are no locks: a file appears whole, under its
name, or not at all, and one that vanishes while it is read is a miss.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from mmr5_runtime.reuse.identity import digest
from mmr5_runtime.rope import Grid
from mmr5_runtime.types import EngineError

_SCHEMAS = "mmr5 page embeddings "
SCHEMA = f"{_SCHEMAS}1"
_NAME = re.compile(r"[0-9a-f]{64}\.page")
_UNFINISHED = re.compile(r"[0-9a-f]{64}\.page-[0-9]+-[0-9]+")
_ABANDONED_SECONDS = 3600  # no write takes that long
_PROBE_BYTES = 1 << 16
_MAX_HEADER = 1 << 16  # ours has 500 bytes


@dataclass(frozen=True)
class _File:
    path: Path
    size: int
    used: int  # time of modification in ns, set on every use


class PageFolder:
    """The embeddings of one engine in ``folder``, at most ``limit_bytes`` of all engines.

    Thread-safe. ``hits``, ``rejected`` (files that were there and not good), ``write_failures``
    (disk full, folder gone) and ``evictions`` count since the start; none of them fails a request.

    Raises:
        EngineError: ``folder`` cannot be made or written to, or its disk is full.
    """

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int, engine: bytes) -> None:
        self._folder = Path(folder)
        self._limit = limit_bytes
        self._engine = engine
        self._lock = threading.Lock()
        self._ours = set[str]()  # names of files whose header was seen to be ours
        self._writes = 0
        self._last_use = 0
        self.hits = self.rejected = self.write_failures = self.evictions = 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._probe()
            self._sweep()
        except OSError as error:
            raise EngineError(
                f"the cache folder {self._folder} cannot be written to ({error.strerror}); make "
                "room or pass another one as disk."
            ) from error

    def load(self, key: bytes, grid: Grid, tokens: int) -> Tensor | None:
        """The embeddings [tokens, hidden] stored under ``key``, on the CPU, or None.

        A file that is not what its name says, or was altered, is counted and left where it is.
        """
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:  # mostly: no such file
            return None
        embeddings = self._checked(content, key, grid)
        if embeddings is None or len(embeddings) != tokens:
            with self._lock:
                self.rejected += 1
            return None
        with self._lock:
            self.hits += 1
            # Another process may have evicted the file by now, or own a folder we may only read.
            with contextlib.suppress(OSError):
                self._touch(path)
        return embeddings

    def holds(self, key: bytes) -> bool:
        """Whether there is a file for ``key``, whatever it contains."""
        return self._path(key).exists()

    def save(self, key: bytes, embeddings: Tensor, grid: Grid) -> list[bytes]:
        """Store ``embeddings`` [tokens, hidden] under ``key``; returns the keys that had to go.

        A file of that very name is replaced: only a damaged one of ours can be there. What cannot
        be written is counted as a failure.
        """
        content = self._packed(key, embeddings, grid)
        if len(content) > self._limit:
            return []
        path = self._path(key)
        with self._lock:
            try:
                gone = self._make_room(len(content), path)
                self._write(path, content)
            except OSError:
                self.write_failures += 1
                return []
            self._ours.add(path.name)
            self.evictions += len(gone)
            return gone

    def usage(self) -> tuple[int, int]:
        """Number and bytes of the pages in the folder, those of other engines included."""
        with self._lock:
            try:
                files = self._pages()
            except OSError:
                files = []
        return len(files), sum(file.size for file in files)

    def _path(self, key: bytes) -> Path:
        return self._folder / f"{key.hex()}.page"

    def _packed(self, key: bytes, embeddings: Tensor, grid: Grid) -> bytes:
        embeddings = embeddings.detach().cpu().contiguous()
        metadata = self._describe(key, grid)
        return save({"embeddings": embeddings}, metadata | {"sha256": _seal(metadata, embeddings)})

    def _describe(self, key: bytes, grid: Grid) -> dict[str, str]:
        return {
            "schema": SCHEMA,
            "key": key.hex(),
            "engine": self._engine.hex(),
            "grid": "x".join(map(str, grid)),
        }

    def _checked(self, content: bytes, key: bytes, grid: Grid) -> Tensor | None:
        """The tensor of a file's ``content`` if every bit of it is as :meth:`_packed` left it."""
        metadata = _metadata(content)
        if metadata is None:
            return None
        seal = metadata.pop("sha256", None)
        if metadata != self._describe(key, grid):
            return None
        try:
            embeddings = load(content)["embeddings"]
        except Exception:
            # The parser answers damaged headers with several types of its own and others', such as
            # KeyError for a dtype unknown to PyTorch. Whatever it is: the file cannot be used.
            return None
        return embeddings if _seal(metadata, embeddings) == seal else None

    def _write(self, path: Path, content: bytes) -> None:
        self._writes += 1
        partial = path.with_name(f"{path.name}-{os.getpid()}-{self._writes}")
        try:
            # Not forced to the disk: what a power cut leaves of it is rejected by its hash.
            partial.write_bytes(content)
            self._touch(partial)
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise

    def _touch(self, path: Path) -> None:
        # Some file systems store seconds only; in this process, at least, later is larger.
        self._last_use = max(time.time_ns(), self._last_use + 1)
        os.utime(path, ns=(self._last_use, self._last_use))

    def _make_room(self, size: int, path: Path) -> list[bytes]:
        """Delete the pages used longest ago until ``size`` bytes fit in the place of ``path``.

        The folder is listed anew each time, which takes milliseconds for thousands of pages and
        counts what other processes wrote.
        """
        files = [file for file in self._pages() if file.path != path]
        files.sort(key=lambda file: (file.used, file.path.name))
        left = sum(file.size for file in files)
        gone = []
        for file in files:
            if left + size <= self._limit:
                break
            file.path.unlink(missing_ok=True)
            left -= file.size
            gone.append(bytes.fromhex(file.path.stem))
        return gone

    def _pages(self) -> list[_File]:
        """The files in the folder that this package wrote."""
        found = []
        for path, status in self._listed(_NAME):
            if path.name in self._ours or _is_ours(path):
                found.append(_File(path, status.st_size, status.st_mtime_ns))
        self._ours = {file.path.name for file in found}
        return found

    def _listed(self, pattern: re.Pattern[str]) -> Iterator[tuple[Path, os.stat_result]]:
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if pattern.fullmatch(entry.name):
                    with contextlib.suppress(OSError):  # gone since it was listed
                        if entry.is_file(follow_symlinks=False):
                            yield Path(entry.path), entry.stat(follow_symlinks=False)

    def _probe(self) -> None:
        """Write and delete a file: permissions alone do not tell of full or read-only disks."""
        probe = self._folder / f"mmr5-probe-{os.getpid()}-{id(self)}"
        try:
            with probe.open("xb") as file:
                file.write(bytes(_PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Delete what processes that were killed while writing left behind."""
        for path, status in self._listed(_UNFINISHED):
            if time.time() - status.st_mtime > _ABANDONED_SECONDS:
                path.unlink(missing_ok=True)


def _seal(metadata: Mapping[str, str], embeddings: Tensor) -> str:
    """Hexadecimal SHA-256 over the metadata, dtype, shape and every bit of the tensor."""
    described = {"dtype": str(embeddings.dtype), "shape": list(embeddings.shape)}
    sha256 = hashlib.sha256(digest({**metadata, **described}))
    sha256.update(embeddings.flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _metadata(start: bytes) -> dict[str, str] | None:
    """The metadata of a safetensors file, of which ``start`` holds the whole header."""
    size = int.from_bytes(start[:8], "little")
    if size > _MAX_HEADER:
        return None
    try:
        metadata = json.loads(start[8 : 8 + size])["__metadata__"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return metadata if isinstance(metadata, dict) else None


def _is_ours(path: Path) -> bool:
    """Whether this package, in any version of it, wrote the file."""
    try:
        with path.open("rb") as file:
            metadata = _metadata(file.read(8 + _MAX_HEADER))
    except OSError:
        return False
    return metadata is not None and str(metadata.get("schema", "")).startswith(_SCHEMAS)
