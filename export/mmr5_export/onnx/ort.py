"""``--backend onnxruntime``: three graphs beside the weights of a finished engine.

The graphs name bytes of the engine's own safetensors files, so that the backend adds about a
megabyte and both engines load from one folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from mmr5_export.onnx.graph import Graph
from mmr5_export.onnx.ort_decoder import OPSET, add_decoder, add_head
from mmr5_export.onnx.ort_linear import CONTRIB, GraphWeights, refuse
from mmr5_export.onnx.ort_vision import add_vision
from mmr5_export.onnx.stored import stored_places
from mmr5_kernels.layout import Format
from mmr5_runtime.artifact import (
    Backend,
    FileEntry,
    file_sha256,
    read_manifest,
    write_manifest,
)
from mmr5_runtime.onnx.files import BACKEND, DECODER, HEAD, VISION
from mmr5_runtime.spec import ModelSpec

_Add = Callable[[Graph, ModelSpec, GraphWeights], None]
_GRAPHS: dict[str, _Add] = {DECODER: add_decoder, HEAD: add_head, VISION: add_vision}


def write_graphs(
    folder: Path,
    spec: ModelSpec,
    formats: Mapping[str, Format],
    tensors: Mapping[str, str],
) -> list[Path]:
    """Writes the graphs into an engine folder that has its tensors; returns their paths.

    ``tensors`` maps stored tensors to files. Raises :class:`ExportError`, before anything is
    written, for what ONNX Runtime cannot run.
    """
    refuse(spec, formats)
    places = stored_places(folder, tensors)
    written = []
    for file, add in _GRAPHS.items():
        graph = Graph(Path(file).stem, OPSET, {CONTRIB: 1})
        add(graph, spec, GraphWeights(graph, spec, formats, places))
        graph.save(folder / file)
        written.append(folder / file)
    return written


def add_graphs(folder: Path, verified: str = "not verified") -> None:
    """Gives an engine folder its graphs, and names them in its manifest; see :func:`write_graphs`.

    ``verified`` says what was run of them.
    """
    manifest = read_manifest(folder)
    paths = write_graphs(folder, manifest.spec, manifest.formats, manifest.tensors)
    files = {path.name: FileEntry(file_sha256(path), path.stat().st_size) for path in paths}
    backends = {**manifest.backends, BACKEND: Backend(tuple(files), verified)}
    added = replace(manifest, files={**manifest.files, **files}, backends=backends)
    write_manifest(folder, added)
