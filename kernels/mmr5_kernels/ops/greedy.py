"""Greedy choice of the next token: repetition penalty and argmax over the vocabulary.

Two kernels and no atomics. The first gives each chunk of a row its largest logit and the lowest id
that has it, the second does the same with the chunks. Specification:
:func:`mmr5_kernels.greedy_reference.greedy_tokens`, with which every row agrees exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmr5_kernels.greedy_reference import NO_TOKEN

CHUNK = 4096  # logits per program: 38 programs for the 152,064 of the 7B model
_NO_ID = tl.constexpr(2147483647)


@triton.jit
def _largest(values, ids, inside):
    """The largest of ``values`` [n] fp32 where ``inside`` holds, and the lowest of its ids."""
    largest = tl.max(tl.where(inside, values, float("-inf")), axis=0)
    return largest, tl.min(tl.where(inside & (values == largest), ids, _NO_ID), axis=0)


@triton.jit
def chunk_kernel(
    logits, seen, best, best_id, row_stride, vocab, penalty, SEEN: tl.constexpr, CHUNK: tl.constexpr
):
    """Program (row, chunk) writes best [R, chunks] fp32 and best_id [R, chunks] int32.

    The id is -1 where the chunk holds a NaN.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = ids < vocab
    x = tl.load(logits + row * row_stride + ids, mask=inside, other=0.0)
    if SEEN:
        was = tl.load(seen + row * vocab + ids, mask=inside, other=0) != 0
        x = tl.where(was, tl.where(x < 0, x * penalty, tl.div_rn(x, penalty)), x)
    # A maximum may drop a NaN, so they are looked for by themselves.
    has_nan = tl.max((inside & (x != x)).to(tl.int32), axis=0)
    largest, lowest = _largest(x, ids, inside)
    place = row * tl.num_programs(1) + chunk
    tl.store(best + place, largest)
    tl.store(best_id + place, tl.where(has_nan != 0, -1, lowest))


@triton.jit
def row_kernel(best, best_id, tokens, chunks, CHUNKS: tl.constexpr):
    """Program (row) reduces best, best_id [R, chunks] to tokens [R] int64."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < chunks
    values = tl.load(best + row * chunks + chunk, mask=inside, other=float("-inf"))
    ids = tl.load(best_id + row * chunks + chunk, mask=inside, other=0)
    has_nan = tl.min(ids, axis=0) < 0
    _, lowest = _largest(values, ids, inside)
    tl.store(tokens + row, tl.where(has_nan, -1, lowest).to(tl.int64))


def greedy_tokens(logits: Tensor, seen: Tensor | None, penalty: float) -> Tensor:
    """The likeliest token of each row, after the repetition penalty.

    logits [R, V] float32, its rows dense; ``seen`` [R, V] bool, contiguous, or None for no penalty.
    Returns [R] int64 on the same device, -1 (``NO_TOKEN``) where a row holds a NaN. Nothing is read
    back to the host. Raises ValueError on other shapes or dtypes.
    """
    _check(logits, seen)
    rows, vocab = logits.shape
    chunks = triton.cdiv(vocab, CHUNK)
    tokens = torch.full((rows,), NO_TOKEN, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return tokens
    best = torch.empty(rows, chunks, dtype=torch.float32, device=logits.device)
    best_id = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    marks = logits if seen is None else seen.view(torch.uint8)
    chunk_kernel[(rows, chunks)](
        logits, marks, best, best_id, logits.stride(0), vocab, penalty, seen is not None, CHUNK
    )
    row_kernel[(rows,)](best, best_id, tokens, chunks, triton.next_power_of_2(chunks))
    return tokens


def _check(logits: Tensor, seen: Tensor | None) -> None:
    dense = logits.ndim == 2 and logits.shape[1] > 0 and logits.stride(1) == 1
    if not dense or logits.dtype != torch.float32:
        raise ValueError(
            f"logits {list(logits.shape)} of {logits.dtype} are no dense rows [R, V] of float32; "
            "convert them first."
        )
    if seen is None:
        return
    if seen.shape != logits.shape or seen.dtype != torch.bool or not seen.is_contiguous():
        raise ValueError(
            f"seen {list(seen.shape)} of {seen.dtype} does not belong to logits "
            f"{list(logits.shape)}; give one contiguous bool per logit."
        )


def variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """What to compile ahead of time: name, kernel, argument types, constexprs, options."""
    types = {
        "logits": "*fp32", "seen": "*u8", "best": "*fp32", "best_id": "*i32", "tokens": "*i64",
        "row_stride": "i32:16", "vocab": "i32:16", "penalty": "fp32", "chunks": "i32",
    }  # fmt: skip
    for seen in (True, False):
        yield f"chunk seen={seen}", chunk_kernel, types, {"SEEN": seen, "CHUNK": CHUNK}, {}
    yield "row", row_kernel, types, {"CHUNKS": 64}, {}
