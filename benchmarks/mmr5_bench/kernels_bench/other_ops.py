"""The operations of a model that are no linears, as rows to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from mmr5_bench.kernels_bench.attention import attention_sizes, attention_workload
from mmr5_bench.kernels_bench.shapes import Shapes
from mmr5_bench.kernels_bench.tasks import Task
from mmr5_bench.kernels_bench.triton_here import why_no_triton
from mmr5_bench.kernels_bench.workload import Workload

OTHER_OPS = (
    "attention.decode",
    "attention.prefill",
    "rope_append",
    "greedy",
    "vision.window",
    "quantize_rows",
)
STEP_TOKENS = (1, 4, 8)
KV_FORMATS = ("bf16", "int8")
HEAD_ROWS = (1, 8)


def other_tasks(
    shapes: Shapes,
    device: torch.device,
    dtype: torch.dtype,
    cache_bytes: int,
    wants: Callable[[str], bool],
    *,
    interpret: bool,
) -> Iterator[Task]:
    """Every row of the operations that ``wants`` names; of Triton kernels where they can run.

    On a CPU those are left out unless ``interpret``.
    """
    triton = device.type == "cuda" or interpret
    for tokens, cached in attention_sizes(shapes):
        name = "attention.decode" if tokens == 1 else "attention.prefill"
        if wants(name):
            plain = partial(attention_workload, shapes, tokens, cached, dtype, device, cache_bytes)
            yield _task(f"{name} T={tokens} S={cached}", plain, name, "causal_attention")
    if wants("attention.prefill") and triton:
        yield from _backends(shapes, device)
    if not triton:
        return
    reason = why_no_triton(device, dtype)
    for subject, op, kernel, make in _own(shapes, device, cache_bytes, wants):
        yield _task(subject, make if reason is None else _refusing(reason), op, kernel)


def _own(
    shapes: Shapes, device: torch.device, cache_bytes: int, wants: Callable[[str], bool]
) -> Iterator[tuple[str, str, str, Callable[[], Workload]]]:
    # Nothing of Triton is imported before a row is made.
    for kv in KV_FORMATS:
        for cached in shapes.cached if wants("attention.decode") else ():
            for tokens in STEP_TOKENS:
                make = _later(
                    "decode_attention_workload", shapes, tokens, cached, kv, device, cache_bytes
                )
                subject = f"attention.decode T={tokens} S={cached} {kv} kv"
                yield subject, "attention.decode", "decode_attention", make
        for tokens in STEP_TOKENS if wants("rope_append") else ():
            cached = shapes.cached[0]
            make = _later("rope_append_workload", shapes, tokens, cached, kv, device, cache_bytes)
            yield f"rope_append T={tokens} {kv} kv", "rope_append", "rope_append", make
    for rows in HEAD_ROWS if wants("greedy") else ():
        make = _later("greedy_workload", shapes, rows, device, cache_bytes)
        yield f"greedy M={rows}", "greedy", "greedy", make
    for tokens in shapes.prompts if wants("attention.prefill") else ():
        make = _later("prefill_attention_workload", shapes, tokens, "prefill_attention", device)
        yield f"attention.prefill T={tokens}", "attention.prefill", "prefill_attention", make
    if wants("vision.window"):
        make = _later("window_attention_workload", shapes, device)
        yield "vision.window", "vision.window", "window_attention", make
    for tokens in shapes.prompts if wants("quantize_rows") else ():
        for kind in ("int8", "fp8"):
            make = _later("quantize_workload", shapes, tokens, kind, device)
            yield f"quantize_rows {kind} M={tokens}", "quantize_rows", "quantize_rows", make


def _backends(shapes: Shapes, device: torch.device) -> Iterator[Task]:
    from mmr5_bench.kernels_bench.prompt_ops import BACKENDS, prefill_attention_workload

    for tokens in shapes.prompts:
        for backend in BACKENDS:
            make = partial(prefill_attention_workload, shapes, tokens, backend, device)
            row = {"op": "attention.prefill", "kernel": backend, "shape": [tokens]}
            yield Task(f"attention.prefill T={tokens}", make, row, backend)


def _later(name: str, *arguments: Any) -> Callable[[], Workload]:
    """A call of one of the workloads of this package's step and prompt operations."""

    def make() -> Workload:
        from mmr5_bench.kernels_bench import prompt_ops, step_ops

        found: Callable[..., Workload] = getattr(step_ops, name, None) or getattr(prompt_ops, name)
        return found(*arguments)

    return make


def _refusing(reason: str) -> Callable[[], Workload]:
    def make() -> Workload:
        raise ValueError(reason)

    return make


def _task(subject: str, make: Callable[[], Workload], op: str, kernel: str) -> Task:
    return Task(subject, make, {"op": op, "kernel": kernel, "format": "dense", "origin": "ours"})
