"""How many bytes a model, a prompt and a page take, and what fits into what is free.

Pure functions of the architecture. Weights and KV are exact; activations are those of the largest
moment of the portable path, an upper estimate for kernels that fuse more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from mmr5_kernels import footprint
from mmr5_kernels.layout import Format
from mmr5_kernels.target import Target
from mmr5_runtime.spec import ModelSpec, TextSpec, VisionSpec, linear_shapes, stored_tensors

KVFormat = Literal["bf16", "int8"]

_SCALE_BYTES = 4  # of an 8-bit key or value of one head of one token
_WIDE = 4  # norms compute in fp32
_FIRST = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # run with them


def weight_bytes(spec: ModelSpec, formats: Mapping[str, Format]) -> int:
    """Bytes of all stored tensors; :func:`loaded_bytes` is what becomes of them."""
    tensors = stored_tensors(spec, formats).values()
    return sum(dtype.itemsize * math.prod(shape) for shape, dtype in tensors)


def loaded_bytes(
    spec: ModelSpec,
    formats: Mapping[str, Format],
    dtype: torch.dtype,
    target: Target,
    prefill: str = "exact",
) -> int:
    """Bytes that the weights take once loaded, in all layouts and copies, but for some padding.

    With ``prefill`` "int8" or "fp8" the decoder layers have a second copy; where a prompt expands
    int4, the memory for the largest expanded weight is counted as well.
    """
    stored, linears = stored_tensors(spec, formats), linear_shapes(spec, formats)
    total = scratch = 0
    for name, (shape, _) in stored.items():
        linear, _, suffix = name.rpartition(".")
        if linear not in linears or suffix == "bias":
            total += math.prod(shape) * dtype.itemsize
    for name, (n, k) in _joined(linears).items():
        format = formats.get(name)
        total += footprint.weight_bytes(format, target, dtype, n, k)
        if not name.startswith("model.layers."):
            continue
        if prefill != "exact" and format is not None and format.activations is None:
            total += footprint.copy_bytes(format, prefill, n, k)
        else:
            scratch = max(scratch, footprint.scratch_bytes(format, target, dtype, n, k))
    return total + scratch


def _joined(linears: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Shapes of the linears as they are run, under the name of the first: q, k, v as one."""
    joined: dict[str, tuple[int, int]] = {}
    for name, (n, k) in linears.items():
        before, _, part = name.rpartition(".")
        first = f"{before}.{_FIRST.get(part, part)}".removeprefix(".")
        joined[first] = joined.get(first, (0, k))[0] + n, k
    return joined


def kv_bytes_per_token(text: TextSpec, dtype: torch.dtype, kv: KVFormat = "bf16") -> int:
    """Bytes that one token leaves in an arena: values of ``dtype``, or 8-bit codes and scales."""
    if kv == "int8":
        return text.token_kv_values + 2 * text.num_layers * text.num_kv_heads * _SCALE_BYTES
    return text.token_kv_values * dtype.itemsize


def prefill_bytes(text: TextSpec, dtype: torch.dtype, tokens: int) -> int:
    """Most bytes of activations while ``tokens`` are read in one call.

    That is in the MLP: the residual stream, gate and up, and their product; or, where the heads are
    wide against it, in the attention.
    """
    residual = text.hidden_size * (2 * dtype.itemsize + 2 * _WIDE)
    mlp = 4 * text.intermediate_size * dtype.itemsize
    attention = 3 * (text.q_size + 2 * text.kv_size) * dtype.itemsize
    return tokens * (residual + max(mlp, attention))


def vision_bytes(vision: VisionSpec, dtype: torch.dtype, patches: int) -> int:
    """Most bytes of activations while a page of ``patches`` is encoded."""
    pixels = vision.patch_dim * (_WIDE + dtype.itemsize)
    residual = vision.hidden_size * (2 * dtype.itemsize + 2 * _WIDE)
    mlp = 4 * vision.intermediate_size * dtype.itemsize
    attention = 3 * vision.hidden_size * (dtype.itemsize + _WIDE)
    return patches * (residual + max(pixels, mlp, attention))


@dataclass(frozen=True)
class Need:
    """What a prompt over pages takes beside the weights, in bytes.

    ``pages`` of ``page_tokens`` each at most, ``other_tokens`` of text and reply.
    """

    pages: int
    page_tokens: int
    other_tokens: int
    kv_per_token: int
    activations: int  # for the largest page, which is the largest thing read in one call

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        dtype: torch.dtype,
        kv: KVFormat,
        *,
        pages: int,
        page_tokens: int,
        other_tokens: int,
    ) -> Need:
        """For ``pages`` of ``page_tokens`` each, and text and a reply of ``other_tokens``."""
        patches = page_tokens * spec.vision.merge_unit
        activations = max(
            prefill_bytes(spec.text, dtype, max(page_tokens, 1)),
            vision_bytes(spec.vision, dtype, patches),
        )
        per_token = kv_bytes_per_token(spec.text, dtype, kv)
        return cls(pages, page_tokens, other_tokens, per_token, activations)

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and its reply."""
        return self.pages * self.page_tokens + self.other_tokens

    @property
    def kv(self) -> int:
        """Bytes of keys and values."""
        return self.tokens * self.kv_per_token

    @property
    def total(self) -> int:
        return self.kv + self.activations

    def pages_within(self, free: int) -> int:
        """Pages of this size that ``free`` bytes hold; 0 when not even one fits."""
        room = free - self.activations - self.other_tokens * self.kv_per_token
        return max(0, room // (max(self.page_tokens, 1) * self.kv_per_token))

    def page_tokens_within(self, free: int) -> int:
        """Tokens that each of the pages may have for all of them to fit; 0 when none may.

        Activations are taken to shrink with the page.
        """
        per_token = self.pages * self.kv_per_token + self.activations / max(self.page_tokens, 1)
        room = free - self.other_tokens * self.kv_per_token
        return max(0, min(self.page_tokens, int(room / per_token)))


def gib(count: int) -> str:
    """Bytes as a person reads them: ``1.50 GiB``, or ``300.0 MiB`` where that is less than one."""
    if count < 1 << 30:
        return f"{count / 2**20:.1f} MiB"
    return f"{count / 2**30:.2f} GiB"
