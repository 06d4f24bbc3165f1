"""One export from start to end.

::

    prepare    find and check; nothing is written                            (job, workload)
    answers    the model's own answers to the samples, where not given       (responses)
    choose     of mixed recipes: which linears get more bits                 (sensitivity, mixed)
    walk       layer by layer: calibrate, quantize, pass on                  (sequential)
    make       every tensor into its file; the engine against the original   (publish, evaluate)
    publish    report, card, manifest; the folder gets its name              (publish)

What a step gives is kept in the journal of a work folder beside the output, from which ``resume``
goes on. Equal input gives equal bytes, however often it was interrupted.
"""

from __future__ import annotations

from pathlib import Path

from mmr5_export.assemble import Progress
from mmr5_export.job import Job, prepare
from mmr5_export.journal import open_journal, work_folder
from mmr5_export.options import ExportOptions
from mmr5_export.publish import make_engine, publish
from mmr5_export.run import Run
from mmr5_export.workload import Requirements, check, require
from mmr5_export.write import check_output
from mmr5_runtime.artifact import Manifest, read_manifest
from mmr5_runtime.types import ExportError

_DEFAULTS = ExportOptions()


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
    later it leaves ``OUTPUT.partial-work``, which readers refuse and ``resume`` goes on from.

    Raises :class:`ExportError` (source or data not found, options that do not fit, output there),
    :class:`ResourceError` (memory or disk too small), :class:`CheckpointError` (no complete
    Qwen2.5-VL checkpoint, weights not finite) and :class:`VerificationFailed`.
    """
    output = Path(output)
    try:
        work = work_folder(output)
        if not (options.resume and work.is_dir()):
            check_output(output, options.force)
        job, required = plan_export(model, quant, output, options, progress=progress)
        check(job, required)
        identity = job.identity()
        with open_journal(work, identity, resume=options.resume, discard=options.force) as journal:
            if journal.done("complete") and not (work / "engine").is_dir():
                return read_manifest(output)  # stopped between its last two breaths
            check_output(output, options.force)  # a resumed export comes here unchecked
            run = Run(job, journal, required.answering, progress)
            run.calibrate()
            folder, manifest, evaluation = make_engine(run)
            journal.finish("complete", None)
            failure = publish(run, folder, evaluation)
    except OSError as error:
        kept = "pass --resume to go on" if work.is_dir() else "nothing was kept"
        raise ExportError(
            f"exporting {model} to {output} failed ({error}); check the disk and the permissions, "
            f"{kept}."
        ) from error
    if failure is not None:
        raise failure
    return manifest


def plan_export(
    model: str | Path,
    quant: str | None,
    output: str | Path,
    options: ExportOptions = _DEFAULTS,
    *,
    progress: Progress = _ignore,
) -> tuple[Job, Requirements]:
    """What :func:`export` would do and need; nothing is written. Raises like it."""
    job = prepare(model, quant, Path(output), options, progress)
    return job, require(job)
