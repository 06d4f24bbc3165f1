"""Where the bytes of an engine's tensors lie, so that a graph can point at them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mmr5_export.onnx.graph import Place
from mmr5_runtime.types import EngineError


def stored_places(folder: Path, tensors: Mapping[str, str]) -> dict[str, Place]:
    """Place of every tensor; ``tensors`` maps its name to a safetensors file of ``folder``.

    The format of the files: https://github.com/huggingface/safetensors#format. Raises
    :class:`EngineError` for a file that cannot be read or lacks a tensor.
    """
    places: dict[str, Place] = {}
    for file in sorted(set(tensors.values())):
        try:
            with (folder / file).open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(size))
            for name, home in tensors.items():
                if home == file:
                    begin, end = header[name]["data_offsets"]
                    places[name] = Place(file, 8 + size + begin, end - begin)
        except (OSError, ValueError, KeyError) as error:
            raise EngineError(
                f"{folder / file} cannot be read ({error}); export the engine again."
            ) from error
    return places
