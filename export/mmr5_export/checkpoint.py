"""A checkpoint folder in the Hugging Face layout, opened for streaming.

Opening reads only headers: it finds every tensor under its canonical name, whatever naming and
sharding the folder uses, and refuses a checkpoint that is not a complete Qwen2.5-VL.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmr5_runtime.spec import ModelSpec, canonical_name, check_names, tensor_shapes
from mmr5_runtime.types import CheckpointError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
FLOATS = ("BF16", "F16", "F32")  # as safetensors names them


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file name, and the name it has there."""

    file: str
    name: str


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint; ``tensors`` maps canonical names to where they are stored."""

    folder: Path
    spec: ModelSpec
    tensors: Mapping[str, StoredTensor]

    @property
    def weight_files(self) -> list[str]:
        """Names of the safetensors files, sorted."""
        return sorted({stored.file for stored in self.tensors.values()})

    def read(self, name: str) -> Tensor:
        """One tensor by canonical name, on the CPU in its source dtype.

        The file is mapped anew each time: its pages leave memory together with the tensor.
        """
        return read_tensor(self.folder, self.tensors[name])


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads configs and headers.

    Raises :class:`CheckpointError` for a checkpoint that is not Qwen2.5-VL, is quantized already,
    keeps no safetensors, or whose tensors are missing, left over, there twice or misshapen.
    """
    config, spec = read_spec(folder)
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{folder} is quantized already; export from the original bf16 checkpoint."
        )
    tensors, shapes = scan(folder)
    check_names(spec, tensors)
    for name, expected in tensor_shapes(spec).items():
        shape, dtype = shapes[name]
        if shape != expected:
            raise CheckpointError(
                f"{name} has shape {list(shape)} but config.json says {list(expected)}; check that "
                f"config.json belongs to the weights in {folder}."
            )
        if dtype not in FLOATS:
            raise CheckpointError(
                f"{name} is stored as {dtype}; export from a bf16, fp16 or fp32 checkpoint."
            )
    return Checkpoint(folder, spec, tensors)


def read_spec(folder: Path) -> tuple[dict[str, Any], ModelSpec]:
    """``config.json`` of a checkpoint folder, and the architecture it describes."""
    config = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    stop = read_json(generation) if generation.exists() else None
    return config, ModelSpec.from_hf_config(config, stop)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises :class:`CheckpointError` when it is missing or cannot be read."""
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing; pass a complete Qwen2.5-VL checkpoint in the Hugging Face layout."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; download it again.")
    return content


def scan(folder: Path) -> tuple[dict[str, StoredTensor], dict[str, tuple[tuple[int, ...], str]]]:
    """Place, and shape with dtype, of every tensor in the weight files, by canonical name.

    Raises :class:`CheckpointError` for files that are missing, cut short, or hold a tensor twice.
    """
    tensors: dict[str, StoredTensor] = {}
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for file, listed in _weight_files(folder).items():
        with _open(folder / file) as reader:
            found = list(reader.keys())
            if absent := sorted(listed - set(found)):
                raise CheckpointError(
                    f"{folder / file} lacks {absent[0]}, which {_INDEX} places there; download it "
                    "again."
                )
            for name in found:
                known = canonical_name(name)
                if known in tensors:
                    raise CheckpointError(
                        f"{known} is stored twice, in {tensors[known].file} and {file}; remove the "
                        "weight file that does not belong to the checkpoint."
                    )
                tensors[known] = StoredTensor(file, name)
                view = reader.get_slice(name)
                shapes[known] = tuple(view.get_shape()), str(view.get_dtype())
    return tensors, shapes


def read_tensor(folder: Path, stored: StoredTensor) -> Tensor:
    """One tensor on the CPU, in the dtype it is stored in."""
    with _open(folder / stored.file) as reader:
        tensor: Tensor = reader.get_tensor(stored.name)
    return tensor


def _weight_files(folder: Path) -> dict[str, set[str]]:
    """Weight files with the tensors an index lists for each (none for a single file)."""
    if (folder / _SINGLE).is_file() and not (folder / _INDEX).is_file():
        return {_SINGLE: set()}
    if not (folder / _INDEX).is_file():
        raise CheckpointError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}; save the checkpoint as safetensors."
        )
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / _INDEX} has no weight_map; download it again.")
    files: dict[str, set[str]] = {file: set() for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        files[file].add(name)
    for file in files:
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file} is missing; download the checkpoint again.")
    return files


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or no safetensors file ({error}); download it again."
        ) from error
