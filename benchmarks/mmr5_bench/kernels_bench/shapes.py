"""Which matrix products a model is made of: the linears of Qwen2.5-VL as the runtime runs them.

Names and sizes come from :mod:`mmr5_runtime.spec`; linears of one input are fused here as
``mmr5_runtime.decoder`` and ``mmr5_runtime.vision`` fuse them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from mmr5_bench.random_weights.shapes import spec_of
from mmr5_kernels.layout import Format
from mmr5_runtime.spec import ModelSpec, has_bias, linear_shapes

# The head is asked for the tokens that are decoded, and for up to 8 that are verified at once;
# never for a whole prompt.
MOST_HEAD_ROWS = 32
PROMPTS = (4096, 8192, 13000)
CACHED = (4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Op:
    """One product of a forward pass: canonical ``linears``, fused along their outputs."""

    name: str
    linears: tuple[str, ...]
    rows: str  # "tokens", "head", "patches" or "merged": what M counts

    @property
    def has_bias(self) -> bool:
        return has_bias(self.linears[0])


@dataclass(frozen=True)
class Shapes:
    """One model, and the sizes at which it is timed.

    ``patches`` of one page go through the vision tower; each of ``prompts`` is a number of tokens
    that attend to each other; a decoded token attends to each of ``cached`` tokens in turn.
    """

    name: str
    spec: ModelSpec
    patches: int
    prompts: tuple[int, ...]
    cached: tuple[int, ...]


_DECODER, _VISION = "model.layers.0", "visual.blocks.0"
OPS: tuple[Op, ...] = (
    Op("decoder.qkv", tuple(f"{_DECODER}.self_attn.{part}_proj" for part in "qkv"), "tokens"),
    Op("decoder.o_proj", (f"{_DECODER}.self_attn.o_proj",), "tokens"),
    Op("decoder.gate_up", (f"{_DECODER}.mlp.gate_proj", f"{_DECODER}.mlp.up_proj"), "tokens"),
    Op("decoder.down", (f"{_DECODER}.mlp.down_proj",), "tokens"),
    Op("lm_head", ("lm_head",), "head"),
    Op("vision.qkv", (f"{_VISION}.attn.qkv",), "patches"),
    Op("vision.proj", (f"{_VISION}.attn.proj",), "patches"),
    Op("vision.gate_up", (f"{_VISION}.mlp.gate_proj", f"{_VISION}.mlp.up_proj"), "patches"),
    Op("vision.down", (f"{_VISION}.mlp.down_proj",), "patches"),
    Op("merger.in", ("visual.merger.mlp.0",), "merged"),
    Op("merger.out", ("visual.merger.mlp.2",), "merged"),
)


def load_shapes(name: str) -> Shapes:
    """``7b`` (see :mod:`mmr5_bench.random_weights.shapes`), ``mini`` or ``tiny``.

    A page of a million pixels is 5,120 patches of 14 x 14, and 13,000 tokens are ten such pages
    with their question. Tiny says nothing about any model. ValueError for another name.
    """
    if name == "7b":
        return Shapes(name, spec_of("7b"), 5120, PROMPTS, CACHED)
    if name == "mini":
        config = json.loads((files("mmr5_runtime") / "assets/mini/config.json").read_text())
        return Shapes(name, ModelSpec.from_hf_config(config), 256, (512,), (256, 1024))
    if name == "tiny":
        return Shapes(name, spec_of("tiny"), 32, (48,), (40,))
    raise ValueError(f"shapes {name!r} are unknown; pass 7b, mini or tiny")


def linear_shape(spec: ModelSpec, op: Op, format: Format | None) -> tuple[int, int]:
    """N and K of ``op`` as it is stored in ``format`` and run, several linears as one.

    ValueError where no engine has this linear in this format.
    """
    if format is not None and format.group_size and op.rows in ("patches", "merged"):
        raise ValueError("the vision tower takes no groups")
    if op.linears == ("lm_head",):  # one of its own only when it is quantized, if embeddings share
        n, k = spec.text.vocab_size, spec.text.hidden_size
    else:
        formats = {} if format is None else dict.fromkeys(linear_shapes(spec), format)
        stored = linear_shapes(spec, formats)
        n, k = sum(stored[name][0] for name in op.linears), stored[op.linears[0]][1]
    if format is not None:
        format.groups(k)
    return n, k


def rows_of(shapes: Shapes, op: Op, m: Sequence[int]) -> tuple[int, ...]:
    """The M at which ``op`` is timed: ``m`` in the decoder, one page in the vision tower."""
    if op.rows == "patches":
        return (shapes.patches,)
    if op.rows == "merged":
        return (shapes.patches // shapes.spec.vision.merge_unit,)
    if op.rows == "head":
        return tuple(count for count in m if count <= MOST_HEAD_ROWS)
    return tuple(m)
