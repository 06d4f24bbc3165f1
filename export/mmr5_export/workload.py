"""What a job will take: its prompts counted, its needs estimated and checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from mmr5_export.backends import chosen_parts
from mmr5_export.calibration import encode_prompt
from mmr5_export.checkpoint import Checkpoint
from mmr5_export.estimate import (
    GRAPH_STAGE,
    Loaded,
    Needs,
    Workload,
    check_disk,
    check_memory,
    estimate,
    gigabytes,
    with_backends,
    with_graphs,
)
from mmr5_export.job import Job, graphs_unverified
from mmr5_export.machine import available_memory, existing, measure_speed
from mmr5_export.responses import GivenResponses, missing_answers
from mmr5_export.tensorrt_parts import POINTER
from mmr5_export.wish import Planned
from mmr5_kernels.layout import INT8_WEIGHT_ONLY, Format
from mmr5_runtime.onnx.files import BACKEND as ONNXRUNTIME
from mmr5_runtime.spec import decoder_linear_shapes, linear_shapes, parameter_count

_DESCRIPTION_BYTES = 4 << 20  # manifest, report and card: a 7B report takes about 1 MB
_EXPECTED_ANSWER = 256  # tokens of an answer that nobody has written yet; for times only


@dataclass(frozen=True)
class Requirements:
    """``engine_bytes``: of the tensors; ``disk_bytes``: of all that is written at one time.

    ``checkpoint_bytes`` of the latter are the checkpoint beside the engine. ``missing`` answers are
    neither in the data nor kept from before. ``answering`` is the format of the model that writes
    what the data does not have, None when it has all: bf16, or int8-weight-only where bf16 would
    not fit on the device. ``backends`` is what files for other engines take, by part;
    ``graphs_skipped`` is why graphs of ONNX Runtime are not run, where memory is what they lack.
    """

    workload: Workload
    engine_bytes: int
    disk_bytes: int
    checkpoint_bytes: int
    needs: Needs
    missing: int
    answering: str | None
    backends: Mapping[str, Planned] = field(default_factory=dict)
    graphs_skipped: str | None = None


def require(job: Job) -> Requirements:
    """Counts and estimates; every page of every sample is opened on the way.

    Raises :class:`DataError` naming a page that cannot be read, or a prompt that the context
    cannot hold with its answer.
    """
    spec, plan = job.spec, job.plan()
    engine_bytes = plan.num_bytes
    if job.recipe is not None and job.recipe.mixed is not None:
        engine_bytes += job.recipe.mixed.budget_bytes(spec)  # at most: nothing is chosen yet
    engine = Loaded(engine_bytes + _widening(job), plan.formats)
    speed = measure_speed(job.dtype, job.device)
    lengths = _lengths(job)

    def needed(quant: str, missing: int) -> tuple[Workload, Needs]:
        work = _workload(job, lengths, missing)
        model = _answering_model(job, quant)
        return work, estimate(spec, work, engine, model, job.dtype, job.device, speed)

    answering, missing = _answerer(job, "bf16")
    work, needs = needed("bf16", missing)
    if missing:
        free = job.options.free_memory
        free = available_memory(job.device) if free is None else free
        if free is not None and needs.memory["answering"] > free:
            answering, missing = _answerer(job, "int8-weight-only")
            work, needs = needed("int8-weight-only", missing)
    # Calibrated layers are kept in the journal until the engine is published.
    disk = engine_bytes * (2 if job.calibration else 1) + _DESCRIPTION_BYTES + needs.spill_bytes
    disk += sum(path.stat().st_size for path in job.copied)
    parts = {part.name: part.plan(job.wish) for part in chosen_parts(job.options)}
    disk += sum(planned.bytes for planned in parts.values())
    needs = with_backends(needs, [planned.memory for planned in parts.values()], job.device)
    skipped = None
    if ONNXRUNTIME in parts and work.verify and graphs_unverified(job) is None:
        needs, skipped = _with_graphs(job, needs, work)
    checkpoint = parameter_count(spec) * 2 if job.options.checkpoint_out else 0  # at most
    return Requirements(
        work, engine_bytes, disk + checkpoint, checkpoint, needs, missing, answering, parts, skipped
    )


def _with_graphs(job: Job, needs: Needs, work: Workload) -> tuple[Needs, str | None]:
    """``needs`` with running the graphs, or as they are with the reason why memory forbids that.

    The engine is verified without them, so too little memory for two engines is no reason to refuse
    the export of both.
    """
    found = with_graphs(needs, job.spec, job.plan().formats, work)
    free = job.options.free_memory
    free = available_memory(job.device) if free is None else free
    size = found.memory[GRAPH_STAGE]
    if free is None or size <= free:
        return found, None
    return needs, (
        f"running them takes about {gigabytes(size)} of memory and {gigabytes(free)} were free"
    )


def check(job: Job, required: Requirements) -> None:
    """Raises :class:`ResourceError` when memory or disk is too small for the job."""
    check_memory(required.needs, job.device, job.options.free_memory)
    output, beside = job.output.absolute(), job.options.checkpoint_out
    here, there = required.disk_bytes, required.checkpoint_bytes
    if beside is not None and not _same_disk(output, beside.absolute()):
        here -= there
        check_disk(beside.absolute(), there, option="--checkpoint-out")
    check_disk(output, here, job.options.free_bytes)


def _same_disk(one: Path, other: Path) -> bool:
    return existing(one).stat().st_dev == existing(other).stat().st_dev


def _widening(job: Job) -> int:
    """Bytes by which dense tensors grow when they are loaded in the compute dtype."""
    dense = (tensor for tensor in job.plan().stored if tensor.dtype == torch.bfloat16)
    return sum(tensor.num_bytes for tensor in dense) * (job.dtype.itemsize - 2) // 2


def _answerer(job: Job, quant: str) -> tuple[str | None, int]:
    """The format that answers what the data leaves open, and how many answers it has to write."""
    if all(sample.response is not None for sample in job.samples):
        return None, 0
    return quant, missing_answers(job.samples, job.generator(quant), job.response_cache)


def _answering_model(job: Job, quant: str) -> Loaded:
    size = parameter_count(job.spec) * job.dtype.itemsize
    if quant == "bf16":
        return Loaded(size, {})
    shapes = decoder_linear_shapes(job.spec)
    saved = sum(prod(shape) for shape in shapes.values()) * (job.dtype.itemsize - 1)
    formats: Mapping[str, Format] = dict.fromkeys(shapes, INT8_WEIGHT_ONLY)
    return Loaded(size - saved, formats)


def _lengths(job: Job) -> list[tuple[int, int | None]]:
    """Tokens of every prompt, and of its answer where the data has one."""
    if not job.samples:
        return []
    assert isinstance(job.checkpoint, Checkpoint)
    tokenizer = job.tokenizer()
    given, lengths = GivenResponses(job.checkpoint), []
    for sample in job.samples:
        text = sample.response
        answer = () if text is None else given.respond(sample, text).token_ids
        prompt = encode_prompt(sample, answer, tokenizer, job.pixel_budget, job.spec)
        lengths.append((prompt.prompt_tokens, None if text is None else len(answer)))
    return lengths


def _workload(job: Job, lengths: list[tuple[int, int | None]], missing: int) -> Workload:
    most, context = job.options.max_new_tokens, job.spec.text.max_position_embeddings
    expected = min(most, _EXPECTED_ANSWER)
    answers = [min(most if given is None else given, context - own) for own, given in lengths]
    pairs = list(zip(lengths, answers, strict=True))
    methods = set(job.methods().values()) if job.calibration else set()
    return Workload(
        prompts=len(lengths),
        tokens=sum(own + (expected if given is None else given) for own, given in lengths),
        longest=max((own + answer for (own, _), answer in pairs), default=_EXPECTED_ANSWER),
        answer=max(answers, default=_EXPECTED_ANSWER),
        to_answer=missing * expected,
        gptq=any("gptq" in method for method in methods),
        awq="awq" in methods,
        verify=bool(job.held_out),
    )


def plan_lines(job: Job, required: Requirements) -> list[str]:
    """A plan for people: what would be stored how, and what that takes."""
    plan, methods, work = job.plan(), job.methods(), required.workload
    kinds = Counter(f"{format.name} by {methods[name]}" for name, format in plan.formats.items())
    dense = len(linear_shapes(job.spec, plan.formats)) - len(plan.formats)
    lines = [
        f"{job.location.name} as {job.quant}, on {job.device} in {str(job.dtype)[6:]}",
        *(f"  {count} linears {kind}" for kind, count in sorted(kinds.items())),
        f"  {dense} linears bf16",
        f"engine: {gigabytes(required.engine_bytes)} in {len(plan.stored)} tensors",
        *(
            f"{_part_name(name)}: about {gigabytes(planned.bytes)} in {', '.join(planned.files)}"
            for name, planned in required.backends.items()
        ),
        f"disk while working: {gigabytes(required.disk_bytes)}",
    ]
    if job.samples:
        lines.append(
            f"samples: {len(job.calibration)} to calibrate, {len(job.held_out)} held out; "
            f"about {work.tokens:,} tokens, longest prompt {work.longest:,}"
        )
        given = sum(sample.response is not None for sample in job.samples)
        kept = len(job.samples) - given - required.missing
        lines.append(
            f"answers: {given} given, {kept} known, {required.missing} to write"
            + (f" with the model as {required.answering}" if required.missing else "")
        )
    lines += [
        f"memory, {stage}: about {gigabytes(size)}" for stage, size in required.needs.memory.items()
    ]
    lines += [
        f"main memory, {stage}: about {gigabytes(size)}"
        for stage, size in required.needs.host.items()
    ]
    lines.append(f"time: very roughly {_duration(required.needs.seconds)}, on a device left alone")
    if job.unverified:
        lines.append(f"not verified: {job.unverified}")
    if "engine" in required.backends:
        lines.append(f"note: {POINTER}")
    return lines


def _part_name(part: str) -> str:
    return part if part == "onnxruntime" else f"tensorrt-llm, target {part}"


def plan_document(job: Job, required: Requirements) -> dict[str, Any]:
    """The same as one JSON object; sizes in bytes."""
    needs, work = required.needs, required.workload
    return {
        "model": job.location.name,
        "quant": job.quant,
        "device": str(job.device),
        "dtype": str(job.dtype).removeprefix("torch."),
        "formats": {name: format.name for name, format in job.plan().formats.items()},
        "methods": job.methods(),
        "engine_bytes": required.engine_bytes,
        "backends": {
            name: {"files": list(planned.files), "bytes": planned.bytes}
            for name, planned in required.backends.items()
        },
        "disk_bytes": required.disk_bytes,
        "memory_bytes": dict(needs.memory),
        "main_memory_bytes": dict(needs.host),
        "seconds": round(needs.seconds),
        "samples": len(job.calibration),
        "held_out": len(job.held_out),
        "tokens": work.tokens,
        "longest_prompt": work.longest,
        "answers_missing": required.missing,
        "answering": required.answering,
        "unverified": job.unverified,
    }


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"
