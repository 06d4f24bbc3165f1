"""One export from start to end.

::

    prepare    find and check; nothing is written                            (job, workload)
    answers    the model's own answers to the samples, where not given       (responses)
    choose     of mixed recipes: which linears get more bits                 (sensitivity, mixed)
    walk       layer by layer: calibrate, quantize, pass on                  (sequential)
    make       every tensor into its file; the engine against the original;
               report, card, manifest; the checkpoint beside it              (publish, evaluate)
    publish    the folders get their names, or the engine is put aside       (publish)

What a step gives is kept in the journal of a work folder beside the output, from which ``resume``
goes on; so is how the export ended, before anything gets its name. Equal input gives equal bytes,
however often it was interrupted.
"""

from __future__ import annotations

from pathlib import Path

from mmr5_export.agreement import VerificationFailed
from mmr5_export.assemble import Progress
from mmr5_export.job import Job, prepare
from mmr5_export.journal import Journal, open_journal, resumable, work_folder
from mmr5_export.options import ExportOptions
from mmr5_export.places import check_checkpoint, check_output, check_places, job_sha256
from mmr5_export.publish import engine_folder, make_checkpoint, make_engine, publish
from mmr5_export.run import Run
from mmr5_export.workload import Requirements, check, require
from mmr5_export.write import disk_error
from mmr5_runtime.artifact import Manifest, read_manifest

_DEFAULTS = ExportOptions()
_END = "complete"  # the last step, of which the result says how the export ended


def _ignore(stage: str, done: int, total: int, note: str = "") -> None:
    return None


def export(
    model: str | Path,
    quant: str | None,
    output: str | Path,
    options: ExportOptions = _DEFAULTS,
    *,
    progress: Progress = _ignore,
) -> Manifest:
    """Turns a checkpoint into an engine folder and returns its manifest.

    ``model`` is a checkpoint folder, "mini" or a hub id; ``quant`` the name of a shipped recipe or
    the path of one, None for int4, or for a checkpoint that is quantized already, which is taken
    over as it is.

    Memory holds one decoder layer and one sample at a time. The folder appears under its name only
    when it is complete. What fails or is stopped before the first step is finished leaves nothing;
    later it leaves ``OUTPUT.partial-work``, which readers refuse and ``resume`` goes on from. An
    engine that verification rejects is put aside as ``OUTPUT.rejected``.

    Raises :class:`ExportError` (source or data not found, options that do not fit, output there,
    a folder to write that holds what is read), :class:`ResourceError` (memory or disk too small),
    :class:`CheckpointError` (no complete Qwen2.5-VL checkpoint, weights not finite) and
    :class:`VerificationFailed`, also when what is resumed had ended with it.
    """
    output, rejected = Path(output), None
    work = work_folder(output)
    try:
        job, required = plan_export(model, quant, output, options, progress=progress)
        check(job, required)
        identity = job.identity()
        job_hash = job_sha256(identity)
        if options.checkpoint_out is not None:
            check_checkpoint(options.checkpoint_out, options.force, job_hash)
        with open_journal(work, identity, resume=options.resume, discard=options.force) as journal:
            if not _over(journal, job):
                check_output(output, options.force)  # a resumed export comes here unchecked
                skipped = required.graphs_skipped
                run = Run(job, journal, required.answering, progress, skipped)
                run.calibrate()
                rejected = make_engine(run)
                if rejected is None:
                    make_checkpoint(run, job_hash)
                journal.finish(_END, {**_wishes(job), "rejected": rejected})
            rejected = journal.result(_END)["rejected"]
            publish(job, engine_folder(work), job_hash, rejected is not None)
    except OSError as error:
        kept = "pass --resume to go on" if resumable(work) else "nothing was kept"
        raise disk_error(
            error,
            f"exporting {model} to {output} failed ({error}); check the disk and the permissions, "
            f"{kept}.",
        ) from error
    if rejected is not None:
        raise VerificationFailed(rejected)
    return read_manifest(output)


def _over(journal: Journal, job: Job) -> bool:
    """Whether all was made, as ``job`` wants it, and is here to get its name or has it."""
    if not journal.done(_END):
        return False
    end = journal.result(_END)
    if end != {**_wishes(job), "rejected": end["rejected"]}:
        return False
    moved = end["rejected"] is not None or job.output.is_dir()
    return moved or engine_folder(journal.folder).is_dir()


def _wishes(job: Job) -> dict[str, str | float | None]:
    """What may differ when an export is resumed, and is too late to differ once all was made."""
    beside = job.options.checkpoint_out
    return {
        "min_top1_agreement": job.options.min_top1_agreement,
        "checkpoint_out": None if beside is None else str(beside.absolute()),
    }


def plan_export(
    model: str | Path,
    quant: str | None,
    output: str | Path,
    options: ExportOptions = _DEFAULTS,
    *,
    progress: Progress = _ignore,
) -> tuple[Job, Requirements]:
    """What :func:`export` would do and need; nothing is written. Raises like it."""
    check_places(model, Path(output), options)
    job = prepare(model, quant, Path(output), options, progress)
    return job, require(job)
