"""From a finished run to a published folder: the engine's files, their verification, their story.

The folder is made inside the work folder and gets its name at the very end, by a rename. Until then
it can be thrown away and made again from the journal.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmr5_export.agreement import VerificationFailed
from mmr5_export.assemble import EngineTensors, TakenOver, write_tensors
from mmr5_export.evaluate import Evaluation, evaluate_engine
from mmr5_export.hf_checkpoint import write_checkpoint
from mmr5_export.job import Job
from mmr5_export.prequantized import QuantizedCheckpoint
from mmr5_export.report import Facts, Threshold, manifest_report, report_document, write_report
from mmr5_export.run import Run
from mmr5_export.write import check_output, replace_folder
from mmr5_kernels.layout import Format
from mmr5_runtime.artifact import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    Quant,
    Source,
    TemplateRef,
    file_sha256,
    write_manifest,
)
from mmr5_runtime.loading import load_engine
from mmr5_runtime.prompt import load_template
from mmr5_runtime.spec import parameter_count
from mmr5_runtime.types import ExportError


def make_engine(run: Run) -> tuple[Path, Manifest, Evaluation | None]:
    """Writes every file of the engine into the work folder, and verifies it.

    Returns the folder, its manifest and what verification found, None when there was none.
    """
    job, folder = run.job, run.journal.folder / "engine"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in job.copied:
        shutil.copyfile(path, folder / path.name)
    source = engine_tensors(run, run.plan.formats)
    write_tensors(source, run.plan, folder, run.progress)
    layers = _layers(run, source)
    write_manifest(folder, _manifest(run, folder, {}))  # for load_engine; written again below
    evaluation = _verify(run, folder)
    document = report_document(_facts(run, layers), evaluation, _threshold(job))
    document["unverified"] = job.unverified
    (folder / MANIFEST_NAME).unlink()
    write_report(folder, document)
    manifest = _manifest(run, folder, manifest_report(document))
    write_manifest(folder, manifest)
    return folder, manifest, evaluation


def engine_tensors(run: Run, formats: Mapping[str, Format]) -> EngineTensors:
    """Where the tensors of the engine, or of a checkpoint of its linears, come from."""
    checkpoint = run.job.checkpoint
    if isinstance(checkpoint, QuantizedCheckpoint):
        return TakenOver(checkpoint)
    return run.tensors(formats)


def publish(run: Run, folder: Path, evaluation: Evaluation | None) -> VerificationFailed | None:
    """Gives the folder its name, and writes the checkpoint that was asked for beside it.

    Below the threshold the engine is put aside instead, as ``OUTPUT.rejected``, and the error to
    raise is returned: for the journal the export is over either way.
    """
    job, threshold = run.job, _threshold(run.job)
    if threshold is not None and evaluation is not None:
        try:
            threshold.check(evaluation.ranks)
        except VerificationFailed as error:
            aside = job.output.absolute().with_name(f"{job.output.name}.rejected")
            check_output(aside, force=True)
            replace_folder(folder, aside)
            return VerificationFailed(f"{str(error).rstrip('.')}; what was made is in {aside}.")
    if job.options.checkpoint_out is not None:
        _write_checkpoint(run, job.options.checkpoint_out)
    check_output(job.output, job.options.force)
    replace_folder(folder, job.output.absolute())
    return None


def _write_checkpoint(run: Run, folder: Path) -> None:
    """The decoder's quantized linears as an ordinary checkpoint; head and tower stay bf16."""
    if folder.exists() and (run.job.options.force or run.job.options.resume):
        _remove_checkpoint(folder)
    formats = {
        name: format
        for name, format in run.plan.formats.items()
        if name.startswith("model.layers.")
    }
    tensors = engine_tensors(run, formats)
    write_checkpoint(
        folder, run.job.checkpoint, formats, lambda name: dict(tensors.parts(name)), tensors.dense
    )


def _remove_checkpoint(folder: Path) -> None:
    """Removes what looks like a checkpoint of ours, and nothing else."""
    if not (folder / "config.json").is_file():
        raise ExportError(
            f"{folder} is no checkpoint, so it is not replaced; choose another --checkpoint-out."
        )
    shutil.rmtree(folder)


def _verify(run: Run, folder: Path) -> Evaluation | None:
    job = run.job
    if job.unverified is not None:
        return None
    loaded = load_engine(
        folder,
        device=str(job.device),
        dtype=str(job.dtype).removeprefix("torch."),
        min_pixels=None,
        max_pixels=None,
        check_hashes=False,
    )
    total = len(job.held_out)
    return evaluate_engine(loaded, run.held_out(), lambda done: run.progress("verify", done, total))


def _threshold(job: Job) -> Threshold | None:
    least = job.options.min_top1_agreement
    return None if least is None else Threshold(least)


def _layers(run: Run, source: EngineTensors) -> dict[str, dict[str, Any]]:
    """Report by quantized linear: of calibration where it went, of rounding elsewhere."""
    calibrated = run.layer_reports()
    rounded: Mapping[str, float | None] = getattr(source, "sqnr_db", {})
    methods = run.job.methods(run.recipe)
    return {
        name: calibrated.get(name)
        or {
            "method": methods[name],
            "format": format.name,
            "sqnr_db": rounded.get(name),
            "error": None,
            "damp": None,
        }
        for name, format in run.plan.formats.items()
    }


def _facts(run: Run, layers: Mapping[str, Mapping[str, Any]]) -> Facts:
    job = run.job
    surroundings = job.environment
    return Facts(
        command=_command(job),
        source=_source(job),
        versions={
            **surroundings.pop("versions"),
            **{key: str(value) for key, value in surroundings.items()},
        },
        seed=job.options.seed if job.samples else None,
        quant=_quant(run),
        layers=layers,
        calibration=run.calibration_facts(),
        bytes=run.plan.num_bytes,
        bf16_bytes=2 * parameter_count(job.spec),
    )


def _command(job: Job) -> list[str]:
    """What to type for the same engine; where it is put does not matter to it."""
    words = ["mmr5-export", "--model", job.location.name]
    if job.location.revision is not None:
        words += ["--revision", job.location.revision]
    if job.quant_asked is not None:
        words += ["--quant", job.quant_asked]
    return [*words, *job.options.arguments(), "--output", "engine"]


def _source(job: Job) -> Source:
    return Source(job.location.name, job.location.revision, dict(job.hashes))


def _quant(run: Run) -> Quant:
    methods = set(run.job.methods(run.recipe).values())
    decoder = {
        method
        for name, method in run.job.methods(run.recipe).items()
        if name.startswith("model.layers.")
    }
    return Quant(
        name=run.job.quant,
        method=" and ".join(sorted(decoder or methods)) or "none",
        layers=run.plan.formats,
        recipe=None if run.recipe is None else run.recipe.to_json(),
        calibration=run.calibration_facts(),
    )


def _manifest(run: Run, folder: Path, report: Mapping[str, Any]) -> Manifest:
    job, template = run.job, load_template()
    return Manifest(
        created_by=job.environment["versions"],
        source=_source(job),
        spec=job.spec,
        quant=_quant(run),
        template=TemplateRef(template.name, template.sha256),
        pixel_budget=job.budget,
        image=job.image,
        files={
            path.name: FileEntry(file_sha256(path), path.stat().st_size)
            for path in sorted(folder.iterdir())
        },
        tensors={tensor.name: tensor.file for tensor in run.plan.stored},
        report=dict(report),
    )
