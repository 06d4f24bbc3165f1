"""From a finished run to a published folder: the engine's files, their verification, their story.

The folder is made inside the work folder and gets its name at the very end, by a rename. Until then
it can be thrown away and made again from the journal. So it is with a checkpoint beside it.
"""

from __future__ import annotations

import glob
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmr5_export.agreement import VerificationFailed, reference_name
from mmr5_export.assemble import EngineTensors, TakenOver, write_tensors
from mmr5_export.backends import listed_files, write_graphs_part, write_tensorrt_parts
from mmr5_export.checkpoint import Checkpoint
from mmr5_export.evaluate import Evaluation, evaluate_engine
from mmr5_export.finished import FinishedEngine, open_finished
from mmr5_export.hf_checkpoint import write_checkpoint
from mmr5_export.job import Job, graphs_unverified
from mmr5_export.places import (
    check_checkpoint,
    check_output,
    checkpoint_job,
    mark_checkpoint,
    rejected_folder,
    unfinished_checkpoint,
)
from mmr5_export.prequantized import QuantizedCheckpoint
from mmr5_export.report import (
    ENGINE,
    GRAPHS,
    Facts,
    Judged,
    Threshold,
    manifest_report,
    report_document,
    verification_means,
    write_report,
)
from mmr5_export.run import Run
from mmr5_export.write import replace_folder, sync_folder
from mmr5_kernels.layout import Format
from mmr5_runtime.artifact import (
    MANIFEST_NAME,
    Backend,
    FileEntry,
    Manifest,
    Quant,
    Source,
    TemplateRef,
    file_sha256,
    write_manifest,
)
from mmr5_runtime.loading import load_engine
from mmr5_runtime.onnx.files import BACKEND as ONNXRUNTIME
from mmr5_runtime.spec import parameter_count
from mmr5_runtime.types import ExportError


def engine_folder(work: Path) -> Path:
    """The engine in the making, in the work folder of its export."""
    return work / "engine"


def make_engine(run: Run) -> str | None:
    """Brings every file of the engine to the disk, in the work folder, and verifies it.

    Files for other backends come last, those that can be verified before the others, and nothing
    behind what is rejected. Returns why the engine must not be published, None when nothing speaks
    against it.
    """
    job, folder = run.job, engine_folder(run.journal.folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in job.copied:
        shutil.copyfile(path, folder / path.name)
    source = engine_tensors(run, run.plan.formats)
    write_tensors(source, run.plan, folder, run.progress)
    layers = _layers(run, source)
    hashed: dict[str, FileEntry] = {}
    # For those who load the engine now; written again below.
    write_manifest(folder, _manifest(run, folder, {}, {}, hashed))
    evaluation = _verify(run, folder)
    rejected = verdict(job, evaluation)
    backends: dict[str, Backend] = {}
    if rejected is None:
        engine, options = _finished(run, folder, layers), job.options
        backends |= write_graphs_part(engine, options, run.progress)
        if backends:
            write_manifest(folder, _manifest(run, folder, {}, backends, hashed))
            backends[ONNXRUNTIME], rejected = _verify_graphs(run, folder, backends[ONNXRUNTIME])
        if rejected is None:
            backends |= write_tensorrt_parts(engine, options, run.progress)
    document = report_document(_facts(run, layers, backends), evaluation, _threshold(job))
    document["unverified"] = job.unverified
    (folder / MANIFEST_NAME).unlink()
    write_report(folder, document)
    write_manifest(folder, _manifest(run, folder, manifest_report(document), backends, hashed))
    sync_folder(folder)
    return rejected


def _verify_graphs(run: Run, folder: Path, graphs: Backend) -> tuple[Backend, str | None]:
    """``graphs`` with what the held-out lists gave on them, and why they must not be published."""
    job = run.job
    reason = job.unverified or graphs_unverified(job) or run.graphs_skipped
    if reason is not None:
        said = f"{graphs.verified}; not executed in this export ({reason.rstrip('.')})"
        return replace(graphs, verified=said), None
    found = _verify(run, folder, ONNXRUNTIME)
    assert found is not None
    reference = reference_name(found.ranks.reference_by)
    said = (
        f"{graphs.verified} and run by onnxruntime {graphs.facts['onnxruntime']} on the "
        f"{len(found.ranks.samples)} held-out lists: first page that of {reference} on "
        f"{found.ranks.first_choice_agreement:.1%}, next token the original's on "
        f"{found.tokens.agreement:.2%}"
    )
    facts = {**graphs.facts, "verification": verification_means(found)}
    return replace(graphs, verified=said, facts=facts), verdict(job, found, GRAPHS)


def _finished(run: Run, folder: Path, layers: Mapping[str, Mapping[str, Any]]) -> FinishedEngine:
    """The engine in ``folder`` as the writers of files for other engines see it."""
    checkpoint = run.job.checkpoint
    original = checkpoint.read if isinstance(checkpoint, Checkpoint) else None
    ranges = {
        name: layer["input_absmax"] for name, layer in layers.items() if "input_absmax" in layer
    }
    return open_finished(folder, original, ranges)


def engine_tensors(run: Run, formats: Mapping[str, Format]) -> EngineTensors:
    """Where the tensors of the engine, or of a checkpoint of its linears, come from."""
    checkpoint = run.job.checkpoint
    if isinstance(checkpoint, QuantizedCheckpoint):
        return TakenOver(checkpoint)
    return run.tensors(formats)


def verdict(job: Job, evaluation: Evaluation | None, what: Judged = ENGINE) -> str | None:
    """Why the engine must not be published; None when nothing speaks against it.

    ``what`` gave the evaluation: the engine itself, or the graphs beside it.
    """
    threshold = _threshold(job)
    if threshold is None or evaluation is None:
        return None
    try:
        threshold.check(evaluation.ranks, what)
    except VerificationFailed as error:
        return f"{str(error).rstrip('.')}; what was made is in {rejected_folder(job.output)}."
    return None


def make_checkpoint(run: Run, job_hash: str) -> None:
    """Writes the checkpoint that was asked for, if one was, beside the place it will have.

    The decoder's quantized linears are those of the engine; head and tower stay bf16.
    """
    job, target = run.job, run.job.options.checkpoint_out
    if target is None:
        return
    _remove_unfinished(job, target)
    folder = unfinished_checkpoint(target, job.output)
    formats = {
        name: format
        for name, format in run.plan.formats.items()
        if name.startswith("model.layers.")
    }
    tensors = engine_tensors(run, formats)
    write_checkpoint(
        folder, job.checkpoint, formats, lambda name: dict(tensors.parts(name)), tensors.dense
    )
    mark_checkpoint(folder, job_hash)
    sync_folder(folder)


def _remove_unfinished(job: Job, target: Path) -> None:
    """Removes the checkpoint folder of a killed process, and what stood in for it."""
    folder = unfinished_checkpoint(target, job.output)
    for path in folder.parent.glob(f"{glob.escape(folder.name)}*"):
        if path.name != f"{folder.name}-old":  # what was at the target, moved away for a moment
            shutil.rmtree(path)


def publish(job: Job, folder: Path, job_hash: str, rejected: bool) -> None:
    """Gives what was made its name: the engine in ``folder``, and before it the checkpoint.

    An engine that was rejected is put aside instead, and there is no checkpoint. What has its name
    already is left alone, so that this can be killed and done again.
    """
    target = job.options.checkpoint_out
    if target is not None and rejected:
        _remove_unfinished(job, target)
    elif target is not None:
        _publish_checkpoint(job, target, job_hash)
    if folder.is_dir():
        output = rejected_folder(job.output) if rejected else job.output.absolute()
        check_output(output, force=rejected or job.options.force)
        replace_folder(folder, output)


def _publish_checkpoint(job: Job, target: Path, job_hash: str) -> None:
    made = unfinished_checkpoint(target, job.output)
    if checkpoint_job(made) == job_hash:
        check_checkpoint(target, job.options.force, job_hash)
        replace_folder(made, target.absolute())
    elif checkpoint_job(target) != job_hash:
        raise ExportError(
            f"the checkpoint made for {target} is gone from {made}; start the export over with "
            "--force."
        )


def _verify(run: Run, folder: Path, backend: str = "native") -> Evaluation | None:
    job = run.job
    if job.unverified is not None:
        return None
    loaded = load_engine(
        folder,
        device=str(job.device),
        dtype=str(job.dtype).removeprefix("torch.") if backend == "native" else "auto",
        min_pixels=None,
        max_pixels=None,
        check_hashes=False,
        backend=backend,
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


def _facts(
    run: Run, layers: Mapping[str, Mapping[str, Any]], backends: Mapping[str, Backend]
) -> Facts:
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
        sensitivity=run.sensitivity,
        backends={name: backend.to_json() for name, backend in backends.items()},
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


def _manifest(
    run: Run,
    folder: Path,
    report: Mapping[str, Any],
    backends: Mapping[str, Backend],
    hashed: dict[str, FileEntry],
) -> Manifest:
    """The manifest of what is in ``folder``; ``hashed`` keeps the hashes of files seen before."""
    job, template = run.job, run.job.template
    names = listed_files(folder)
    for name in names:
        if name not in hashed:
            hashed[name] = FileEntry(file_sha256(folder / name), (folder / name).stat().st_size)
    return Manifest(
        created_by=job.environment["versions"],
        source=_source(job),
        spec=job.spec,
        quant=_quant(run),
        template=TemplateRef(template.name, template.sha256),
        pixel_budget=job.budget,
        image=job.image,
        files={name: hashed[name] for name in names},
        tensors={tensor.name: tensor.file for tensor in run.plan.stored},
        report=dict(report),
        backends=backends,
    )
