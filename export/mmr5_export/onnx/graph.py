"""Writing an ONNX graph: nodes one after the other, weights by reference.

A graph is a few hundred kilobytes; its weights stay in files beside it, at offsets that the graph
names (ONNX's external data). Those files may be ones that exist already, such as the safetensors
files of an engine, or a :class:`DataFile` that is filled tensor by tensor. Either way one tensor is
in memory at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

IR_VERSION = 10  # of onnx 1.16; the newest that every reader of these graphs takes
_ALIGNMENT = 64
_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}


class Place(NamedTuple):
    """Where the bytes of a tensor lie: in a file in the folder of the graph."""

    file: str
    offset: int
    length: int


def tensor_type(dtype: torch.dtype) -> int:
    """ONNX's number for a dtype."""
    return int(_TYPES[dtype])


def data_bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor on the CPU, in order, as a buffer."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


class Graph:
    """A graph under construction; values are their names, nodes come in the order of computation.

    ``opset`` is the version of the standard operators, ``domains`` those of others.
    """

    def __init__(self, name: str, opset: int, domains: Mapping[str, int] | None = None) -> None:
        self._name = name
        self._imports = {"": opset, **(domains or {})}
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._constants: dict[tuple[int, tuple[int, ...], bytes], str] = {}

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> str:
        """An input; letters stand for sizes that differ from call to call."""
        self._inputs.append(helper.make_tensor_value_info(name, tensor_type(dtype), shape))
        return name

    def output(self, name: str, value: str, dtype: torch.dtype, shape: Sequence[int | str]) -> None:
        """Gives the ``value`` of a node the name of an output.

        Raises ``ValueError`` for a value that no node made.
        """
        maker = next((node for node in self._nodes if value in node.output), None)
        if maker is None:
            raise ValueError(f"{value} is not made by a node of {self._name}.")
        for node in self._nodes:
            for names in (node.input, node.output):
                for index, used in enumerate(names):
                    if used == value:
                        names[index] = name
        self._outputs.append(helper.make_tensor_value_info(name, tensor_type(dtype), shape))

    def node(
        self,
        op: str,
        *inputs: str | None,
        domain: str = "",
        output: str | None = None,
        **attributes: Any,
    ) -> str:
        """Adds a node of one output and returns its value; None is an input left out.

        At the end of the inputs nothing is written for it: some parsers take an empty name there
        for a missing input.
        """
        return self._add(op, inputs, (output,), domain, attributes)[0]

    def nodes(
        self, op: str, *inputs: str | None, outputs: int, domain: str = "", **attributes: Any
    ) -> tuple[str, ...]:
        """Adds a node of several outputs."""
        return self._add(op, inputs, (None,) * outputs, domain, attributes)

    def _add(
        self,
        op: str,
        inputs: Sequence[str | None],
        outputs: Sequence[str | None],
        domain: str,
        attributes: Mapping[str, Any],
    ) -> tuple[str, ...]:
        if domain not in self._imports:
            raise ValueError(f"{self._name} does not import {domain!r}, which {op} is from.")
        base = f"{op}_{len(self._nodes)}"
        names = tuple(
            name or (base if len(outputs) == 1 else f"{base}_{index}")
            for index, name in enumerate(outputs)
        )
        given = ["" if name is None else name for name in inputs]
        while given and not given[-1]:
            given.pop()
        made = helper.make_node(op, given, list(names), name=base, domain=domain, **attributes)
        self._nodes.append(made)
        return names

    def constant(
        self, value: Tensor | float | int | Sequence[int], dtype: torch.dtype | None = None
    ) -> str:
        """A small tensor kept in the graph itself; equal ones are kept once.

        Python floats become fp32 and integers int64 unless ``dtype`` says otherwise.
        """
        tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype)
        if dtype is not None:
            tensor = tensor.to(dtype)
        raw = bytes(data_bytes(tensor))
        key = (tensor_type(tensor.dtype), tuple(tensor.shape), raw)
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._initializers[name] = helper.make_tensor(name, key[0], key[1], raw, raw=True)
            self._constants[key] = name
        return self._constants[key]

    def external(self, name: str, dtype: int, shape: Sequence[int], place: Place) -> str:
        """A tensor [shape] of ONNX's type ``dtype`` whose bytes lie in a file beside the graph.

        Asked for again it is the same; ``ValueError`` for one of another type or shape.
        """
        there = self._initializers.get(name)
        if there is not None and (there.data_type, list(there.dims)) != (dtype, list(shape)):
            raise ValueError(f"{name} is in {self._name} with another type or shape.")
        if there is None:
            tensor = TensorProto(name=name, data_type=dtype, dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            entries = (("location", place.file), ("offset", place.offset), ("length", place.length))
            for key, value in entries:
                tensor.external_data.add(key=key, value=str(value))
            self._initializers[name] = tensor
        return name

    def save(self, path: Path) -> None:
        """Writes the graph; equal graphs give equal bytes."""
        graph = helper.make_graph(
            self._nodes, self._name, self._inputs, self._outputs, list(self._initializers.values())
        )
        imports = [
            helper.make_opsetid(domain, version) for domain, version in self._imports.items()
        ]
        model = helper.make_model(graph, opset_imports=imports, producer_name="mmr5-runtime")
        model.ir_version = IR_VERSION
        path.write_bytes(model.SerializeToString(deterministic=True))


class DataFile:
    """A file of tensors behind each other, each begun at a multiple of 64 bytes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")

    @property
    def size(self) -> int:
        return self._file.tell()

    def add(self, tensor: Tensor) -> Place:
        """Writes a tensor, on any device, and says where it is."""
        self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
        offset = self._file.tell()
        self._file.write(data_bytes(tensor.cpu()))
        return Place(self._path.name, offset, self._file.tell() - offset)

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
