"""What an engine will consist of, decided before its first byte: formats, tensors, files, size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mmr5_kernels.layout import GROUP_SIZES, Format
from mmr5_runtime.spec import ModelSpec, linear_shapes, stored_tensors
from mmr5_runtime.types import CheckpointError

MAX_FILE_BYTES = 2 << 30


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


def check_groups(spec: ModelSpec, formats: Mapping[str, Format]) -> None:
    """Raises :class:`CheckpointError` naming a linear that the groups of its format do not fit."""
    for name, (_, columns) in linear_shapes(spec, formats).items():
        format = formats.get(name)
        if format is None or format.group_size is None or columns % format.group_size == 0:
            continue
        fitting = [str(size) for size in GROUP_SIZES if columns % size == 0]
        remedy = "no group size does, but int8, fp8 and bf16 do"
        if fitting:
            remedy = f"a group size of {' or '.join(fitting)} fits, and so do int8, fp8 and bf16"
        raise CheckpointError(
            f"{name} has {columns} columns, which {format.weights} groups of {format.group_size} "
            f"do not fit; {remedy}."
        )


def _num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)
