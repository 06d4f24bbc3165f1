"""What an engine will consist of, decided before its first byte: formats, tensors, files, size."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mmr5_kernels.layout import GROUP_SIZE
from mmr5_runtime.spec import ModelSpec, decoder_linear_shapes, stored_shapes
from mmr5_runtime.types import CheckpointError, ExportError

QUANTS = ("bf16", "int8", "int4")
MAX_FILE_BYTES = 2 << 30
_MANIFEST_BYTES = 1 << 20  # generous: a 7B manifest takes about 150 kB
_DTYPES = {
    ("int8", "weight"): torch.int8,
    ("int4", "weight_packed"): torch.int32,
    ("int4", "weight_shape"): torch.int64,
}


@dataclass(frozen=True)
class Stored:
    """A tensor to be stored, and the file it goes to."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str

    @property
    def num_bytes(self) -> int:
        return _num_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Plan:
    """``formats`` maps quantized linears to their format; ``stored`` is in order of writing."""

    formats: Mapping[str, str]
    stored: tuple[Stored, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.stored)


def make_plan(spec: ModelSpec, quant: str, max_file_bytes: int = MAX_FILE_BYTES) -> Plan:
    """Lays out an engine: decoder linears as ``quant`` says, everything else dense bf16.

    Raises :class:`ExportError` for an unknown ``quant`` and :class:`CheckpointError` naming a
    linear that int4 groups do not fit.
    """
    formats = linear_formats(spec, quant)
    shapes = stored_shapes(spec, formats)
    dtypes = {name: _dtype(name, formats) for name in shapes}
    numbers: dict[str, int] = {}
    number, filled = 0, 0
    for name, shape in shapes.items():
        size = _num_bytes(dtypes[name], shape)
        if filled and filled + size > max_file_bytes:
            number, filled = number + 1, 0
        filled += size
        numbers[name] = number
    files = [f"model-{i:05}-of-{number + 1:05}.safetensors" for i in range(1, number + 2)]
    return Plan(
        formats,
        tuple(Stored(name, dtypes[name], shapes[name], files[numbers[name]]) for name in shapes),
    )


def linear_formats(spec: ModelSpec, quant: str) -> dict[str, str]:
    """Storage format of every linear that ``quant`` does not leave dense."""
    if quant not in QUANTS:
        raise ExportError(f"quantization {quant!r} is unknown; choose one of {', '.join(QUANTS)}.")
    if quant == "bf16":
        return {}
    linears = decoder_linear_shapes(spec)
    for name, (_, columns) in linears.items():
        if quant == "int4" and columns % GROUP_SIZE:
            raise CheckpointError(
                f"{name} has {columns} columns, which int4 groups of {GROUP_SIZE} do not fit; "
                "export with --quant int8 or bf16."
            )
    return dict.fromkeys(linears, quant)


def check_disk(folder: Path, plan: Plan, copied: Iterable[Path], free: int | None = None) -> None:
    """Raises :class:`ExportError` unless the engine fits on the disk of ``folder``.

    ``copied`` are the files taken over as they are. ``free`` overrides the free bytes of the disk.
    """
    needed = plan.num_bytes + sum(path.stat().st_size for path in copied) + _MANIFEST_BYTES
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free if free is None else free
    if free < needed:
        raise ExportError(
            f"the engine needs {_gigabytes(needed)} but the disk of {folder} has "
            f"{_gigabytes(free)} free; make room or choose another --output."
        )


def _dtype(name: str, formats: Mapping[str, str]) -> torch.dtype:
    linear, _, suffix = name.rpartition(".")
    return _DTYPES.get((formats.get(linear, "dense"), suffix), torch.bfloat16)


def _num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
