"""Engine folders: writing and strictly reading their manifest, and streaming their tensors.

A folder holds ``mmr5_engine.json``, safetensors files, the checkpoint's tokenizer and config files,
and what was added for other backends, some of it in folders below. Everything is checked before the
first weight is loaded: the manifest's schema, that every file is there with its size, and that the
stored tensors are exactly those of the architecture.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmr5_runtime import __version__
from mmr5_runtime.manifest import (
    SCHEMA_VERSION,
    Backend,
    FileEntry,
    ImageSettings,
    Manifest,
    PixelRange,
    Quant,
    Source,
    TemplateRef,
)
from mmr5_runtime.spec import stored_shapes
from mmr5_runtime.types import EngineError

__all__ = [
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "Backend",
    "FileEntry",
    "ImageSettings",
    "Manifest",
    "PixelRange",
    "Quant",
    "Source",
    "TemplateRef",
    "TensorReader",
    "file_sha256",
    "is_partial",
    "partial_name",
    "read_manifest",
    "tool_versions",
    "verify_hashes",
    "work_name",
    "write_manifest",
]

MANIFEST_NAME = "mmr5_engine.json"
_PARTIAL = ".partial-"
_CHUNK = 1 << 20


def partial_name(name: str, owner: int | str) -> str:
    """Name of the folder beside ``name`` in which ``owner`` works until it is complete."""
    return f"{name}{_PARTIAL}{owner}"


def work_name(name: str) -> str:
    """Name of the folder beside ``name`` from which an export that was cut off can go on."""
    return f"{name}{_PARTIAL}work"


def is_partial(path: Path) -> bool:
    """Whether ``path`` is where an export was working, and not an engine folder."""
    return _PARTIAL in path.name


def tool_versions() -> dict[str, str]:
    """Versions of what an engine is made with, for the manifest."""
    tools = {name: version(name) for name in ("torch", "safetensors")}
    return {"mmr5-runtime": __version__, "python": platform.python_version(), **tools}


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest; strict JSON with a stable order, so equal engines have equal files."""
    text = json.dumps(manifest.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path | str) -> Manifest:
    """Reads the manifest and checks the folder against it, without loading weights.

    Raises :class:`EngineError` when the folder or its manifest is missing, an export into it never
    finished, the schema is older, newer or unknown, a file is missing or has another size, or the
    tensors listed are not those of the architecture.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    remedy = "export one with mmr5-export"
    if not folder.is_dir():
        raise EngineError(f"there is no engine folder {folder}; {remedy}.")
    if is_partial(folder.absolute()):
        raise EngineError(f"{folder} was left by an export that never finished; {remedy}.")
    if not path.is_file():
        raise EngineError(f"{folder} is not an engine folder (no {MANIFEST_NAME}); {remedy}.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise EngineError(f"{path} is not readable JSON ({error}); export it again.") from error
    manifest = Manifest.from_json(data, str(path))
    _check_files(folder, manifest)
    expected = stored_shapes(manifest.spec, manifest.formats)
    _compare(str(path), expected, manifest.tensors)
    return manifest


def verify_hashes(folder: Path | str, manifest: Manifest) -> None:
    """Compares every file with its sha256; raises :class:`EngineError` naming the first altered."""
    for name, entry in manifest.files.items():
        if file_sha256(Path(folder) / name) != entry.sha256:
            raise EngineError(
                f"{Path(folder) / name} was altered since the export (its sha256 differs); export "
                "or copy the engine again."
            )


def _check_files(folder: Path, manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise EngineError(f"{path} is missing; copy the whole engine folder or export again.")
        if (size := path.stat().st_size) != entry.size:
            raise EngineError(
                f"{path} has {size:,} bytes instead of {entry.size:,}; it was cut off or changed, "
                "copy or export the engine again."
            )
    if stray := set(manifest.tensors.values()) - set(manifest.files):
        raise EngineError(
            f"{folder} keeps tensors in {sorted(stray)[0]}, which its manifest does not list; "
            "export the engine again."
        )


def _compare(where: str, expected: Iterable[str], found: Iterable[str]) -> None:
    expected, found = set(expected), set(found)
    for verb, names in (("lacks", expected - found), ("has unknown", found - expected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise EngineError(
                f"{where} {verb} tensor {min(names)}{more}; copy or export the engine again."
            )


class TensorReader:
    """Streams an engine's tensors, memory-mapped, one at a time.

    A file is mapped anew for every tensor: pages that were read leave the process together with
    the tensor, so that loading an engine never maps more than what is in use.
    """

    def __init__(self, folder: Path | str, manifest: Manifest) -> None:
        """Checks that every file holds the tensors the manifest places in it, and no others."""
        self._folder, self._files = Path(folder), dict(manifest.tensors)
        for file in sorted(set(self._files.values())):
            placed = [name for name, home in self._files.items() if home == file]
            try:
                with safe_open(self._folder / file, framework="pt") as reader:
                    stored = set(reader.keys())
            except (SafetensorError, OSError) as error:
                raise EngineError(
                    f"{self._folder / file} cannot be read ({error}); copy or export it again."
                ) from error
            _compare(str(self._folder / file), placed, stored)

    def get(self, name: str) -> Tensor:
        """A stored tensor, on the CPU, in its stored dtype; it may share memory with the file.

        Raises :class:`EngineError` when the engine has no such tensor.
        """
        if name not in self._files:
            raise EngineError(f"{self._folder} has no tensor {name}; export the engine again.")
        with safe_open(self._folder / self._files[name], framework="pt") as reader:
            tensor: Tensor = reader.get_tensor(name)
        return tensor

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing stays open between two tensors."""
