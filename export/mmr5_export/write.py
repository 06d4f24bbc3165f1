"""Writes an engine folder: tensors streamed into safetensors files, and all of it or nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

from mmr5_export.estimate import ResourceError
from mmr5_export.plan import Stored
from mmr5_runtime.artifact import partial_name
from mmr5_runtime.types import ExportError

_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
}
_ALIGNMENT = 64  # of the first tensor in a file; safetensors asks for 8


class TensorWriter:
    """Writes planned tensors, in any order, to their places in the files of ``folder``.

    safetensors' own writer takes all tensors of a file at once. Here the header comes first, from
    the planned shapes, and each tensor is then written to its offset and forgotten. A file keeps
    wide dtypes before narrow ones, so that every tensor is aligned to its dtype when mapped.
    """

    def __init__(self, folder: Path, stored: Sequence[Stored]) -> None:
        self._left = {tensor.name: tensor for tensor in stored}
        self._files: dict[str, BinaryIO] = {}
        self._offsets: dict[str, int] = {}
        for file in dict.fromkeys(tensor.file for tensor in stored):
            self._begin(folder / file, [tensor for tensor in stored if tensor.file == file])

    def _begin(self, path: Path, tensors: list[Stored]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        places, end = {}, 0
        for tensor in sorted(tensors, key=lambda item: (-item.dtype.itemsize, item.name)):
            places[tensor.name], end = end, end + tensor.num_bytes
            header[tensor.name] = {
                "dtype": _DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [places[tensor.name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode("ascii")
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        file = self._files[path.name] = path.open("wb")
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + end)
        self._offsets |= {name: start + place for name, place in places.items()}

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor [planned shape] of the planned dtype.

        Raises ``ValueError`` when it was not planned like that or is already written.
        """
        planned = self._left.pop(name, None)
        if planned is None or (planned.dtype, planned.shape) != (tensor.dtype, tensor.shape):
            raise ValueError(f"{name} {tensor.dtype} {list(tensor.shape)} is not in the plan.")
        file = self._files[planned.file]
        file.seek(self._offsets[name])
        file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Brings everything to the disk; raises ``ValueError`` when a tensor was never written."""
        if self._left:
            raise ValueError(f"{min(self._left)} was planned and never written.")
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes a safetensors file of tensors on any device and returns its sha256.

    It is on the disk when this returns. Raises ``OSError`` when the disk refuses it: safetensors'
    own writer hides the reason, of which a full disk is one, in a text.
    """
    content = save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def sync(path: Path) -> None:
    """Brings to the disk what a file holds, or which names a folder holds."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network disks do not sync folders; they write names at once or not on demand.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Brings a folder and everything below it to the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def disk_error(error: OSError, message: str) -> ExportError:
    """The error to raise with ``message``: :class:`ResourceError` where the disk is full."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return (ResourceError if full else ExportError)(message)


@contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """A folder beside ``output`` to work in, which becomes ``output`` when the block succeeds.

    When the block fails or is interrupted the folder is removed. A folder that ``output`` names is
    replaced at the very end: two renames, and the old one comes back if the second fails.
    """
    output = output.absolute()
    partial = output.with_name(partial_name(output.name, os.getpid()))
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)  # of a dead process that had the same number
    partial.mkdir()
    try:
        yield partial
        sync_folder(partial)
        replace_folder(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def replace_folder(partial: Path, output: Path) -> None:
    """Gives ``partial`` the name ``output``; a folder there is removed once that has worked.

    A process killed in between leaves the old one as ``PARTIAL-old``: the next call removes it, or
    brings it back if it fails too.
    """
    old = partial.with_name(f"{partial.name}-old")
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
    try:
        partial.rename(output)
    except BaseException:
        if old.exists():
            old.rename(output)
        raise
    sync(output.parent)
    shutil.rmtree(old, ignore_errors=True)
