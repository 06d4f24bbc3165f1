"""What the kernels of a decode step ask of their arguments."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from mmr5_kernels.sequences import COLUMNS

KVFormat = Literal["bf16", "int8"]

MAX_GROUP = 8
"""Query heads per key head, at most."""
MAX_TOKENS = 8
"""Tokens of one slot in a step, at most."""
MAX_HEAD_DIM = 128


def check_step(
    x: Tensor,
    table: Tensor,
    tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    kv: KVFormat,
) -> None:
    """Raises ValueError unless x [B*T, ...] and the sequence table [B, 6] make a decode step."""
    if kv not in get_args(KVFormat):
        raise ValueError(f"kv={kv!r} is unknown; pass bf16 or int8.")
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"a decode step takes 1 to {MAX_TOKENS} tokens per slot, not {tokens}.")
    if num_heads % num_kv_heads or not 1 <= num_heads // num_kv_heads <= MAX_GROUP:
        raise ValueError(
            f"{num_heads} query heads over {num_kv_heads} key heads are not supported; the kernels "
            f"take 1 to {MAX_GROUP} per key head."
        )
    if head_dim % 16 or not 16 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"a head of {head_dim} values is not supported; the kernels take multiples of 16 up to "
            f"{MAX_HEAD_DIM}."
        )
    if tuple(table.shape) != (len(x) // tokens, COLUMNS) or len(x) % tokens:
        raise ValueError(
            f"{len(x)} rows of {tokens} tokens per slot come with a table {list(table.shape)}; "
            f"give one row of {COLUMNS} columns per slot."
        )
    if table.dtype != torch.int64 or x.dtype != torch.bfloat16 or table.device != x.device:
        raise ValueError(
            f"a step of {x.dtype} on {x.device} with a table of {table.dtype} on {table.device} "
            "cannot run; give bfloat16 rows and an int64 table on one device."
        )
    if not (x.is_contiguous() and table.is_contiguous()):
        raise ValueError("the rows and the table of a decode step must be contiguous.")
