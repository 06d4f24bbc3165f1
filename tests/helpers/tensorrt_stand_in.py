"""A TensorRT whose one engine encodes pages on the CPU, from what lies at given addresses."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from math import prod
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from mmr5_runtime.rope import Grid
from mmr5_runtime.spec import VisionSpec
from mmr5_runtime.trtllm.inputs import VISION_OUTPUT, vision_inputs

Encode = Callable[[Tensor, Grid], Tensor]
Shapes = Mapping[str, Sequence[Sequence[int]]]  # least, usual and largest by input
DataType = Enum("DataType", ["FLOAT", "HALF", "BF16", "INT32", "INT64", "BOOL"])
_TYPES = {
    DataType["FLOAT"]: torch.float32,
    DataType["BF16"]: torch.bfloat16,
    DataType["INT32"]: torch.int32,
    DataType["INT64"]: torch.int64,
}
_INPUTS = {
    "pixels": "FLOAT", "cos": "FLOAT", "sin": "FLOAT",
    "windows": "INT64", "window_mask": "INT32", "places": "INT64",
}  # fmt: skip


class Engine:
    """Encodes with ``encode``; ``profiles`` are the shapes it was built for, any if there are none.

    ``dtype`` names the type of its output.
    """

    def __init__(
        self, encode: Encode, spec: VisionSpec, dtype: str, profiles: Sequence[Shapes]
    ) -> None:
        self.encode, self.spec, self.profiles = encode, spec, profiles
        self.types = {**_INPUTS, VISION_OUTPUT: dtype}
        self.num_optimization_profiles = len(profiles) or 1

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self.types[name]]

    def get_tensor_profile_shape(self, name: str, index: int) -> Sequence[Sequence[int]]:
        if self.profiles:
            return self.profiles[index][name]
        ranks = {"places": 1}
        return [[least] * ranks.get(name, 2) for least in (1, 64, 1 << 20)]

    def create_execution_context(self) -> Context:
        return Context(self)


class Context:
    """One run at a time; ``profile`` is the one it was told to take."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.profile = engine, -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, int]:
        spec = self.engine.spec
        return self.shapes["pixels"][0] // spec.merge_unit, spec.out_hidden_size

    def execute_async_v3(self, stream: int) -> bool:
        assert self.profile >= 0 and set(self.addresses) == {*_INPUTS, VISION_OUTPUT}
        given = {name: self._read(name) for name in _INPUTS}
        out = self.engine.encode(given["pixels"], self._grid(given))
        out = out.to(_TYPES[self.engine.get_tensor_dtype(VISION_OUTPUT)]).contiguous()
        ctypes.memmove(self.addresses[VISION_OUTPUT], out.data_ptr(), out.nbytes)
        return True

    def _read(self, name: str) -> Tensor:
        kind, shape = _TYPES[self.engine.get_tensor_dtype(name)], self.shapes[name]
        content = ctypes.string_at(self.addresses[name], prod(shape) * kind.itemsize)
        return torch.frombuffer(bytearray(content), dtype=kind).view(shape)

    def _grid(self, given: Mapping[str, Tensor]) -> Grid:
        """The one grid that all inputs belong to: rotations and windows say which."""
        spec, count = self.engine.spec, len(given["pixels"])
        merge = spec.spatial_merge_size
        for rows in range(merge, count + 1, merge):
            if count % rows or count // rows % merge:
                continue
            grid = (1, rows, count // rows)
            expected = vision_inputs(given["pixels"], grid, spec)
            if all(torch.equal(given[name], value) for name, value in expected.items()):
                return grid
        raise AssertionError("no grid has these inputs")


def install_tensorrt(
    monkeypatch: pytest.MonkeyPatch,
    encode: Encode,
    spec: VisionSpec,
    dtype: str = "FLOAT",
    profiles: Sequence[Shapes] = (),
    version: str = "10.14.1",
) -> None:
    """Makes ``import tensorrt`` find the stand-in, and the CPU have a stream."""
    module = ModuleType("tensorrt")

    class Runtime:
        def __init__(self, logger: object) -> None:
            pass

        def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
            return Engine(encode, spec, dtype, profiles) if content == b"engine" else None

    class Logger:
        WARNING = 2

        def __init__(self, level: int) -> None:
            pass

    contents = {"__version__": version, "DataType": DataType, "Runtime": Runtime, "Logger": Logger}
    for name, value in contents.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
