"""``--backend onnxruntime``: three graphs beside the weights of a finished engine.

The graphs name bytes of the engine's own safetensors files, so that the backend adds about a
megabyte and both engines load from one folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from mmr5_export.onnx.graph import Graph
from mmr5_export.onnx.ort_decoder import OPSET, add_decoder, add_head
from mmr5_export.onnx.ort_linear import CONTRIB, GraphWeights, refuse
from mmr5_export.onnx.ort_vision import add_vision
from mmr5_export.onnx.stored import stored_places
from mmr5_kernels.layout import Format
from mmr5_runtime.onnx.files import DECODER, HEAD, VISION
from mmr5_runtime.spec import ModelSpec

_Add = Callable[[Graph, ModelSpec, GraphWeights], None]
_GRAPHS: dict[str, _Add] = {DECODER: add_decoder, HEAD: add_head, VISION: add_vision}


def write_graphs(
    folder: Path,
    spec: ModelSpec,
    formats: Mapping[str, Format],
    tensors: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
) -> list[Path]:
    """Writes the graphs into an engine folder that has its tensors; returns their paths.

    ``tensors`` maps stored tensors to files; ``dtype`` is what the graphs compute in. Raises
    :class:`ExportError`, before anything is written, for what ONNX Runtime cannot run.
    """
    refuse(spec, formats)
    places = stored_places(folder, tensors)
    written = []
    for file, add in _GRAPHS.items():
        graph = Graph(Path(file).stem, OPSET, {CONTRIB: 1})
        add(graph, spec, GraphWeights(graph, spec, formats, places, dtype))
        graph.save(folder / file)
        written.append(folder / file)
    return written
