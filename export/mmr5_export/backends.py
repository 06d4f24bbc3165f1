"""What an export adds to a native engine for other engines: one table of parts.

``--backend`` and ``--trt-target`` choose parts. Each can say, before anything is read or written,
whether it is possible and what it will take; later it writes its files from the finished engine.
``onnxruntime`` is one part, and every target of ``tensorrt-llm`` is one, with a folder of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmr5_export.assemble import Progress
from mmr5_export.finished import FinishedEngine
from mmr5_export.options import ExportOptions, OptionError
from mmr5_export.tensorrt_parts import TENSORRT_PARTS
from mmr5_export.wish import GRAPHS_BYTES, Part, Planned, Wish
from mmr5_kernels.layout import Format
from mmr5_runtime.artifact import MANIFEST_NAME, Backend
from mmr5_runtime.onnx.files import BACKEND as ONNXRUNTIME
from mmr5_runtime.onnx.files import GRAPHS
from mmr5_runtime.onnx.session import is_installed, runtime
from mmr5_runtime.types import ExportError

TENSORRT = "tensorrt-llm"


def chosen_parts(options: ExportOptions) -> Iterator[Part]:
    """The parts that ``options`` ask for, in the order of the table."""
    for part in _PARTS:
        if part.name in (*options.backend, *options.targets):
            yield part


def check_backends(wish: Wish) -> None:
    """Raises :class:`OptionError` for the first part that the engine or an option rules out."""
    for part in chosen_parts(wish.options):
        if wish.chosen_later and part.name in ("engine", "llm-api"):
            raise OptionError(
                f"--trt-target {part.name} needs all linears of the decoder stored alike, and a "
                "mixed recipe stores them differently; pass --quant int4 or fp8."
            )
        try:
            part.check(wish)
        except OptionError:
            raise
        except ExportError as error:  # the format is at fault, and an option chose it
            raise OptionError(str(error)) from error


def needs_ranges(formats: Mapping[str, Format], options: ExportOptions) -> bool:
    """Whether a part wants the ranges of inputs that only calibration sees.

    TensorRT multiplies 8-bit activations by one constant scale per linear.
    """
    static = {"engine", "onnx"} & set(options.targets)
    decoder = (kind for name, kind in formats.items() if name.startswith("model.layers."))
    return bool(static) and any(kind.activations is not None for kind in decoder)


def write_backends(
    engine: FinishedEngine, options: ExportOptions, progress: Progress
) -> dict[str, Backend]:
    """Writes all that ``options`` ask for into the folder of ``engine``; says what it was.

    What a part wrote is what its files are: the folder is looked at before and after.
    """
    found: dict[str, Backend] = {}
    targets: dict[str, dict[str, Any]] = {}
    for part in chosen_parts(options):
        before = _files(engine.folder)
        facts = part.write(engine, options, progress)
        files = tuple(sorted(_files(engine.folder) - before))
        if part.name == ONNXRUNTIME:
            found[part.name] = Backend(files, facts.pop("verified"), facts)
        else:
            targets[part.name] = {"files": list(files), **facts}
    if targets:
        files = tuple(name for facts in targets.values() for name in facts.pop("files"))
        verified = "; ".join(f"{name}: {facts['verified']}" for name, facts in targets.items())
        found[TENSORRT] = Backend(files, verified, {"targets": targets})
    return found


def _files(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in paths} - {MANIFEST_NAME}


def _check_onnxruntime(wish: Wish) -> None:
    from mmr5_export.onnx.ort_linear import refuse

    refuse(wish.spec, wish.formats)


def _plan_onnxruntime(wish: Wish) -> Planned:
    return Planned(GRAPHS, GRAPHS_BYTES, {})


def _write_onnxruntime(
    engine: FinishedEngine, options: ExportOptions, progress: Progress
) -> dict[str, Any]:
    import onnx

    from mmr5_export.onnx.ort import write_graphs

    progress(ONNXRUNTIME, 0, 1)
    for path in write_graphs(engine.folder, engine.spec, engine.formats, engine.manifest.tensors):
        onnx.checker.check_model(str(path))
    progress(ONNXRUNTIME, 1, 1)
    return {
        "verified": "checked by onnx; not executed in this export",
        "onnx": onnx.__version__,
        "onnxruntime": runtime().__version__ if is_installed() else None,
    }


_PARTS = (
    Part(ONNXRUNTIME, _check_onnxruntime, _plan_onnxruntime, _write_onnxruntime),
    *TENSORRT_PARTS,
)
