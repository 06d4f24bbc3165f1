"""Engine folders that backends are timed on: made once, with graphs for ONNX Runtime beside them.

mini is exported as ``mmr5-export`` does; the other shapes are written with random codes, which
takes no checkpoint. A folder is moved to its name when it is whole, and used again from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from mmr5_bench.backends.shapes import Shape
from mmr5_bench.random_weights.engine_folder import write_engine_of
from mmr5_bench.random_weights.shapes import Quant
from mmr5_export import export
from mmr5_export.onnx.ort import add_graphs
from mmr5_export.options import ExportOptions
from mmr5_runtime.artifact import read_manifest
from mmr5_runtime.onnx.files import BACKEND as ONNXRUNTIME


def engine_folder(
    shape: Shape, quant: Quant, work: Path, say: Callable[[str], None] = lambda line: None
) -> Path:
    """The engine of ``shape`` under ``work``, made where it is not there yet.

    Raises EngineError for a folder of that name which is no whole engine, ValueError for one
    without graphs for ONNX Runtime, and as exporting does.
    """
    folder = work / f"{shape.name}-{quant}"
    if not folder.exists():
        say(f"writing {folder}")
        work.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}-", dir=work) as made:
            _write(Path(made, folder.name), shape, quant).rename(folder)
    if ONNXRUNTIME not in read_manifest(folder).backends:
        raise ValueError(f"{folder} has no graphs for ONNX Runtime; remove it to have it made anew")
    return folder


def _write(folder: Path, shape: Shape, quant: Quant) -> Path:
    if shape.config is None:
        export(shape.name, quant, folder, ExportOptions())
    else:
        write_engine_of(folder, shape.config(), f"random {shape.name}", quant)
    add_graphs(folder)
    return folder
