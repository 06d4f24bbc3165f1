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
from mmr5_export.tensorrt_parts import TENSORRT_PARTS, is_built, require_onnx
from mmr5_export.wish import GRAPHS_BYTES, Part, Planned, Wish
from mmr5_kernels.layout import Format
from mmr5_runtime.artifact import MANIFEST_NAME, Backend
from mmr5_runtime.onnx.files import BACKEND as ONNXRUNTIME
from mmr5_runtime.onnx.files import GRAPHS
from mmr5_runtime.onnx.session import obstacle, runtime
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


def write_graphs_part(
    engine: FinishedEngine, options: ExportOptions, progress: Progress
) -> dict[str, Backend]:
    """The graphs of ONNX Runtime in the folder of ``engine``, if ``options`` ask for them.

    The first to be written: they can be run, and what they give can end the export.
    """
    if ONNXRUNTIME not in options.backend:
        return {}
    files, facts = _write(_PARTS[0], engine, options, progress)
    return {ONNXRUNTIME: Backend(files, facts.pop("verified"), facts)}


def write_tensorrt_parts(
    engine: FinishedEngine, options: ExportOptions, progress: Progress
) -> dict[str, Backend]:
    """All that ``options`` ask for of TensorRT, written into the folder of ``engine``."""
    added: tuple[str, ...] = ()
    targets: dict[str, dict[str, Any]] = {}
    for part in chosen_parts(options):
        if part.name != ONNXRUNTIME:
            files, targets[part.name] = _write(part, engine, options, progress)
            added += files
    if not targets:
        return {}
    verified = "; ".join(f"{name}: {facts['verified']}" for name, facts in targets.items())
    return {TENSORRT: Backend(added, verified, {"targets": targets})}


def _write(
    part: Part, engine: FinishedEngine, options: ExportOptions, progress: Progress
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """What a part wrote is what its files are: the folder is looked at before and after."""
    before = set(listed_files(engine.folder))
    facts = part.write(engine, options, progress)
    return tuple(sorted(set(listed_files(engine.folder)) - before)), facts


def listed_files(folder: Path) -> list[str]:
    """Files of an engine folder that its manifest answers for, by their path in it, sorted.

    That is all but the manifest itself, and what a build made and will make anew.
    """
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = {path.as_posix() for path in paths} - {MANIFEST_NAME}
    return sorted(name for name in names if not is_built(name))


def _check_onnxruntime(wish: Wish) -> None:
    require_onnx("--backend onnxruntime")
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
        "verified": "checked by onnx",
        "onnx": onnx.__version__,
        "onnxruntime": runtime().__version__ if obstacle() is None else None,
    }


_PARTS = (
    Part(ONNXRUNTIME, _check_onnxruntime, _plan_onnxruntime, _write_onnxruntime),
    *TENSORRT_PARTS,
)
