"""What an engine will consist of, decided before its first byte: formats, tensors, files, size."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mmr5_kernels.layout import (
    FP8,
    GROUP_SIZE,
    GROUP_SIZES,
    INT8,
    INT8_WEIGHT_ONLY,
    Format,
)
from mmr5_runtime.spec import (
    ModelSpec,
    decoder_linear_shapes,
    linear_shapes,
    stored_tensors,
    vision_linear_shapes,
)
from mmr5_runtime.types import CheckpointError, ExportError

QUANTS = ("bf16", "int8", "int8-weight-only", "fp8", "int4")
MAX_FILE_BYTES = 2 << 30
_MANIFEST_BYTES = 1 << 20  # generous: a 7B manifest takes about 150 kB


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

    formats: Mapping[str, Format]
    stored: tuple[Stored, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.stored)


def make_plan(
    spec: ModelSpec, formats: Mapping[str, Format], max_file_bytes: int = MAX_FILE_BYTES
) -> Plan:
    """Lays out an engine whose linears are stored as ``formats`` says, everything else as bf16.

    Raises :class:`CheckpointError` naming a linear whose columns the groups of its format do not
    divide, and :class:`EngineError` for formats that no engine can have (a linear that is not
    there, a vision MLP quantized in part).
    """
    check_groups(spec, formats)
    tensors = stored_tensors(spec, formats)
    numbers: dict[str, int] = {}
    number, filled = 0, 0
    for name, (shape, dtype) in tensors.items():
        size = _num_bytes(dtype, shape)
        if filled and filled + size > max_file_bytes:
            number, filled = number + 1, 0
        filled += size
        numbers[name] = number
    files = [f"model-{i:05}-of-{number + 1:05}.safetensors" for i in range(1, number + 2)]
    stored = (
        Stored(name, dtype, shape, files[numbers[name]]) for name, (shape, dtype) in tensors.items()
    )
    return Plan(formats, tuple(stored))


def linear_formats(
    spec: ModelSpec,
    quant: str,
    lm_head: str | None = None,
    vision: str = "bf16",
    group_size: int = GROUP_SIZE,
    symmetric: bool = True,
) -> dict[str, Format]:
    """Storage format of every linear that these options do not leave dense.

    ``quant`` is that of the decoder layers; ``lm_head`` is bf16, int4 or int8, which is weight-only
    (default: int8, or bf16 when everything is); ``vision`` is bf16, int8 or fp8, for every linear
    of the tower. ``group_size`` and ``symmetric`` are those of int4.

    Raises :class:`ExportError` for an unknown option and :class:`CheckpointError` naming a linear
    that the groups do not fit.
    """
    try:
        int4 = Format("int4", group_size, symmetric)
    except ValueError as error:
        raise ExportError(f"int4 cannot be stored like that: {error}") from error
    lm_head = lm_head or ("bf16" if quant == "bf16" else "int8")
    decoder = {"int4": int4, "int8": INT8, "int8-weight-only": INT8_WEIGHT_ONLY, "fp8": FP8}
    formats = {
        **_chosen("quantization", quant, decoder, decoder_linear_shapes(spec)),
        **_chosen("lm_head", lm_head, {"int8": INT8_WEIGHT_ONLY, "int4": int4}, ["lm_head"]),
        **_chosen("vision", vision, {"int8": INT8, "fp8": FP8}, vision_linear_shapes(spec)),
    }
    check_groups(spec, formats)
    return formats


def _chosen(
    what: str, name: str, known: Mapping[str, Format], linears: Iterable[str]
) -> dict[str, Format]:
    if name == "bf16":
        return {}
    if name not in known:
        choices = ", ".join(("bf16", *known))
        raise ExportError(f"{what} {name!r} is unknown; choose one of {choices}.")
    return dict.fromkeys(linears, known[name])


def check_groups(spec: ModelSpec, formats: Mapping[str, Format]) -> None:
    """Raises :class:`CheckpointError` naming a linear that the groups of its format do not fit."""
    for name, (_, columns) in linear_shapes(spec, formats).items():
        format = formats.get(name)
        if format is None or format.group_size is None or columns % format.group_size == 0:
            continue
        fitting = [str(size) for size in GROUP_SIZES if columns % size == 0]
        remedy = f"a group size of {' or '.join(fitting)} fits" if fitting else "no group size fits"
        raise CheckpointError(
            f"{name} has {columns} columns, which {format.weights} groups of {format.group_size} "
            f"do not fit; {remedy}, and so do int8, fp8 and bf16."
        )


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


def _num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
