"""One export from start to end: check everything, stream every tensor, describe what was made."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mmr5_export.checkpoint import Checkpoint, open_checkpoint
from mmr5_export.plan import MAX_FILE_BYTES, Plan, check_disk, make_plan
from mmr5_export.processor import image_settings, pixel_budget, read_processor
from mmr5_export.quantize import quantize_linear
from mmr5_export.source import locate
from mmr5_export.write import TensorWriter, check_output, partial_folder
from mmr5_kernels.layout import GROUP_SIZE
from mmr5_runtime.artifact import (
    FileEntry,
    Manifest,
    Quant,
    Source,
    TemplateRef,
    file_sha256,
    tool_versions,
    write_manifest,
)
from mmr5_runtime.prompt import PromptTokenizer, load_template
from mmr5_runtime.spec import tensor_shapes
from mmr5_runtime.types import CheckpointError, EngineError, ExportError

# Taken over as they are. The processor's settings may be in either of two files.
_REQUIRED = ("config.json", "tokenizer.json")
_OPTIONAL = (
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "chat_template.json",
    "chat_template.jinja",
)

Progress = Callable[[str, int, int], None]
"""Called with a stage ("hash" or "write"), how much of it is done, and its total."""


def _ignore(stage: str, done: int, total: int) -> None:
    return None


def export(
    model: str | Path,
    quant: str,
    output: str | Path,
    *,
    revision: str | None = None,
    force: bool = False,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    free_bytes: int | None = None,
    progress: Progress = _ignore,
) -> Manifest:
    """Turns a checkpoint into an engine folder and returns its manifest.

    ``model`` is a checkpoint folder, "mini" or a hub id (of ``revision``, a branch, tag or commit);
    ``quant`` is "bf16", "int8" or "int4". The pixel budget is the checkpoint's unless given.
    ``free_bytes`` replaces the free space found on the disk.

    Memory holds one source tensor and its stored form at a time. The folder appears under its name
    only when it is complete; a failed or interrupted export leaves nothing, a killed one a
    ``*.partial-*`` folder beside it, which readers refuse. Equal input gives equal bytes.

    Raises :class:`ExportError` (source not found, output exists, disk too small or failing) and
    :class:`CheckpointError` (not a complete Qwen2.5-VL checkpoint).
    """
    output = Path(output)
    try:
        check_output(output, force)
        location = locate(str(model), revision)
        checkpoint = open_checkpoint(location.folder)
        plan = make_plan(checkpoint.spec, quant, max_file_bytes)
        processor = read_processor(location.folder)
        image = image_settings(processor, checkpoint.spec.vision)
        budget = pixel_budget(processor, min_pixels, max_pixels)
        _check_tokenizer(checkpoint)
        names = (*_REQUIRED, *_OPTIONAL)
        copied = [path for name in names if (path := location.folder / name).is_file()]
        check_disk(output.absolute(), plan, copied, free_bytes)
        template = load_template()
        with partial_folder(output) as folder:
            sources = _hash_sources(checkpoint, copied, progress)
            for path in copied:
                shutil.copyfile(path, folder / path.name)
            report = _write_tensors(checkpoint, plan, folder, progress)
            manifest = Manifest(
                created_by=tool_versions(),
                source=Source(location.name, location.revision, sources),
                spec=checkpoint.spec,
                quant=_describe(quant, plan),
                template=TemplateRef(template.name, template.sha256),
                pixel_budget=budget,
                image=image,
                files={path.name: _entry(path) for path in sorted(folder.iterdir())},
                tensors={tensor.name: tensor.file for tensor in plan.stored},
                report={"sqnr_db": report},
            )
            write_manifest(folder, manifest)
    except OSError as error:
        raise ExportError(
            f"exporting {model} to {output} failed ({error}); check the disk and the permissions, "
            "nothing was kept."
        ) from error
    return manifest


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    """The tokenizer must be there, and must know the markup under the ids of config.json."""
    path = checkpoint.folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing; download it, or write it with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    try:
        tokenizer = PromptTokenizer.from_file(path)
    except EngineError as error:
        raise CheckpointError(str(error)) from error
    if tokenizer.image_pad_id != checkpoint.spec.image_token_id:
        raise CheckpointError(
            f"{path} has id {tokenizer.image_pad_id} for an image token but config.json has "
            f"{checkpoint.spec.image_token_id}; use the tokenizer that belongs to the weights."
        )


def _hash_sources(checkpoint: Checkpoint, copied: list[Path], progress: Progress) -> dict[str, str]:
    paths = sorted([*copied, *(checkpoint.folder / name for name in checkpoint.weight_files)])
    hashes = {}
    for done, path in enumerate(paths):
        progress("hash", done, len(paths))
        hashes[path.name] = file_sha256(path)
    progress("hash", len(paths), len(paths))
    return hashes


def _write_tensors(
    checkpoint: Checkpoint, plan: Plan, folder: Path, progress: Progress
) -> dict[str, float | None]:
    """Streams every tensor into its file; returns decibels of SQNR by quantized linear."""
    report: dict[str, float | None] = {}
    names = list(tensor_shapes(checkpoint.spec))
    with TensorWriter(folder, plan.stored) as writer:
        for done, name in enumerate(names):
            progress("write", done, len(names))
            linear, _, suffix = name.rpartition(".")
            tensor = checkpoint.read(name)
            _require_finite(name, tensor)
            if suffix == "weight" and linear in plan.formats:
                stored, decibels = quantize_linear(tensor, plan.formats[linear])
                report[linear] = round(decibels, 3) if math.isfinite(decibels) else None
                for key, part in stored.items():
                    writer.write(f"{linear}.{key}", part)
            else:
                writer.write(name, tensor.to(torch.bfloat16))
        writer.finish()
    progress("write", len(names), len(names))
    return report


def _require_finite(name: str, tensor: Tensor) -> None:
    # aminmax passes NaN on and, unlike isfinite, needs no mask as long as the tensor.
    low, high = torch.aminmax(tensor)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise CheckpointError(
            f"{name} holds NaN or infinite values; download the checkpoint again."
        )


def _describe(quant: str, plan: Plan) -> Quant:
    return Quant(
        name=quant,
        method="rtn" if plan.formats else "none",
        group_size=GROUP_SIZE if quant == "int4" else None,
        layers=plan.formats,
    )


def _entry(path: Path) -> FileEntry:
    return FileEntry(file_sha256(path), path.stat().st_size)
