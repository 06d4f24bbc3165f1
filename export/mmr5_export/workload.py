"""What a job will take: its prompts counted, its needs estimated and checked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

import torch

from mmr5_export.calibration import encode_prompt
from mmr5_export.estimate import (
    Needs,
    Workload,
    available_memory,
    check_disk,
    check_memory,
    estimate,
    gigabytes,
)
from mmr5_export.job import Job
from mmr5_runtime.prompt import PromptTokenizer
from mmr5_runtime.spec import decoder_linear_shapes, linear_shapes, parameter_count

_DESCRIPTION_BYTES = 4 << 20  # manifest, report and card: a 7B report takes about 1 MB
_EXPECTED_ANSWER = 256  # tokens of an answer that nobody has written yet


@dataclass(frozen=True)
class Requirements:
    """``engine_bytes``: of the tensors; ``disk_bytes``: of all that is written at one time.

    ``answering`` is the format of the model that writes the missing answers, None when there are
    none: bf16, or int8-weight-only where bf16 would not fit on the device.
    """

    workload: Workload
    engine_bytes: int
    disk_bytes: int
    needs: Needs
    answering: str | None


def require(job: Job) -> Requirements:
    """Counts and estimates; every page of every sample is opened on the way.

    Raises :class:`ExportError` naming a page that cannot be read, or a prompt that the context
    cannot hold.
    """
    work = _workload(job)
    spec = job.spec
    engine_bytes = job.plan().num_bytes
    if job.recipe is not None and job.recipe.mixed is not None:
        engine_bytes += job.recipe.mixed.budget_bytes(spec)  # at most: nothing is chosen yet
    dense = parameter_count(spec) * job.dtype.itemsize
    answering, answering_bytes = ("bf16", dense) if work.to_answer else (None, 0)
    loaded = engine_bytes + _widening(job)
    needs = estimate(spec, work, loaded, answering_bytes, job.dtype, job.device)
    free = job.options.free_memory or available_memory(job.device)
    if answering and free is not None and needs.memory["answering"] > free:
        linears = sum(prod(shape) for shape in decoder_linear_shapes(spec).values())
        answering, answering_bytes = "int8-weight-only", dense - linears * (job.dtype.itemsize - 1)
        needs = estimate(spec, work, loaded, answering_bytes, job.dtype, job.device)
    # Calibrated layers are kept in the journal until the engine is published.
    disk = (
        engine_bytes * (2 if job.calibration else 1)
        + sum(path.stat().st_size for path in job.copied)
        + _DESCRIPTION_BYTES
    )
    disk += needs.spill_bytes
    if job.options.checkpoint_out is not None:
        disk += parameter_count(spec) * 2  # at most
    return Requirements(work, engine_bytes, disk, needs, answering)


def check(job: Job, required: Requirements) -> None:
    """Raises :class:`ResourceError` when memory or disk is too small for the job."""
    check_memory(required.needs, job.device, job.options.free_memory)
    check_disk(job.output.absolute(), required.disk_bytes, job.options.free_bytes)


def _widening(job: Job) -> int:
    """Bytes by which dense tensors grow when they are loaded in the compute dtype."""
    dense = (tensor for tensor in job.plan().stored if tensor.dtype == torch.bfloat16)
    return sum(tensor.num_bytes for tensor in dense) * (job.dtype.itemsize - 2) // 2


def _workload(job: Job) -> Workload:
    tokenizer = PromptTokenizer.from_file(job.checkpoint.folder / "tokenizer.json")
    lengths, missing = [], 0
    for sample in job.samples:
        prompt = encode_prompt(sample, (), tokenizer, job.pixel_budget, job.spec)
        answer = min(job.options.max_new_tokens, _EXPECTED_ANSWER)
        missing += answer if sample.response is None else 0
        lengths.append(len(prompt.token_ids) + answer)
    methods = set(job.methods().values()) if job.calibration else set()
    return Workload(
        prompts=len(lengths),
        tokens=sum(lengths),
        longest=max(lengths, default=_EXPECTED_ANSWER),
        to_answer=missing,
        gptq=any("gptq" in method for method in methods),
        awq="awq" in methods,
        verify=bool(job.held_out),
    )


def plan_lines(job: Job, required: Requirements) -> list[str]:
    """A plan for people: what would be stored how, and what that takes."""
    plan, methods, work = job.plan(), job.methods(), required.workload
    kinds = Counter(f"{format.name} by {methods[name]}" for name, format in plan.formats.items())
    dense = len(linear_shapes(job.spec, plan.formats)) - len(plan.formats)
    gigabyte = 1e9
    lines = [
        f"{job.location.name} as {job.quant}, on {job.device} in {str(job.dtype)[6:]}",
        *(f"  {count} linears {kind}" for kind, count in sorted(kinds.items())),
        f"  {dense} linears bf16",
        f"engine: {gigabytes(required.engine_bytes)} in {len(plan.stored)} tensors",
        f"disk while working: {gigabytes(required.disk_bytes)}",
    ]
    if job.samples:
        lines.append(
            f"samples: {len(job.calibration)} to calibrate, {len(job.held_out)} held out; "
            f"about {work.tokens:,} tokens, longest prompt {work.longest:,}"
        )
        known = sum(sample.response is not None for sample in job.samples)
        lines.append(
            f"answers: {known} given, {len(job.samples) - known} to write"
            + (f" with the model as {required.answering}" if required.answering else "")
        )
    lines += [
        f"memory, {stage}: about {size / gigabyte:.1f} GB"
        for stage, size in required.needs.memory.items()
    ]
    lines.append(f"time: very roughly {_duration(required.needs.seconds)}, on a device left alone")
    if job.unverified:
        lines.append(f"not verified: {job.unverified}")
    return lines


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"
