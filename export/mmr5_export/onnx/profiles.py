"""For which sizes TensorRT builds: optimisation profiles as data, from the model and its budgets.

A profile gives every input whose shape changes three shapes: the least, the one kernels are chosen
for, and the most. ``profiles.json`` holds them per graph::

    {"vision": [{"name": "page", "shapes": {"pixels": {"min": [..], "opt": [..], "max": [..]}}}],
     "decoder": [{"name": "prefill", ...}, {"name": "step", ...}]}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmr5_export.largest_page import largest_page_tokens
from mmr5_export.options import OptionError
from mmr5_runtime.artifact import Manifest
from mmr5_runtime.image import MAX_ASPECT_RATIO
from mmr5_runtime.spec import TextSpec, VisionSpec

Shape = tuple[int, ...]
CAPACITY = 16_384  # tokens of a sequence unless asked otherwise: some twenty pages and an answer
STEP_TOKENS = 8  # new tokens of a decode step with a draft


@dataclass(frozen=True)
class Limits:
    """The most that engines are built for.

    ``capacity`` tokens in the KV buffers; ``prefill_tokens`` of them read in one call;
    ``max_patches`` on a page. Raises :class:`OptionError` when they contradict.
    """

    capacity: int
    prefill_tokens: int
    max_patches: int

    def __post_init__(self) -> None:
        if not 1 <= self.prefill_tokens <= self.capacity:
            raise OptionError(
                f"--max-input-len {self.prefill_tokens} and --max-seq-len {self.capacity} cannot "
                "both hold; a prompt has at least one token and no more than its sequence."
            )

    @classmethod
    def of(
        cls, manifest: Manifest, max_seq_len: int | None = None, max_input_len: int | None = None
    ) -> Limits:
        """Those of an engine: its pixel budget, and tokens as asked for.

        Raises :class:`OptionError` for sequences that the model has no positions for or that do
        not hold a largest page.
        """
        spec = manifest.spec
        most = spec.text.max_position_embeddings
        capacity = max_seq_len or min(CAPACITY, most)
        if capacity > most:
            raise OptionError(
                f"--max-seq-len {capacity} is more than the {most} positions of the model; give "
                "at most that."
            )
        tokens = largest_page_tokens(spec.vision, manifest.pixel_budget)
        if tokens > capacity:
            raise OptionError(
                f"--max-seq-len {capacity} does not hold a page of up to {tokens} tokens, which "
                "the pixel budget allows; give more tokens or export with a smaller --max-pixels."
            )
        return cls(capacity, max_input_len or capacity, tokens * spec.vision.merge_unit)


@dataclass(frozen=True)
class Range:
    """Least, usual and largest shape of one input."""

    min: Shape
    opt: Shape
    max: Shape


@dataclass(frozen=True)
class Profile:
    """One optimisation profile; ``shapes`` by input, in the order of the graph."""

    name: str
    shapes: Mapping[str, Range]

    def to_json(self) -> dict[str, Any]:
        """As ``profiles.json`` has it."""
        shapes = {
            name: {"min": list(shape.min), "opt": list(shape.opt), "max": list(shape.max)}
            for name, shape in self.shapes.items()
        }
        return {"name": self.name, "shapes": shapes}


def vision_profiles(spec: VisionSpec, limits: Limits) -> list[Profile]:
    """One profile, from a page of one token to the largest; tuned for the largest, a square one."""
    longest = (spec.window_size // spec.patch_size) ** 2
    side = max(1, math.isqrt(limits.max_patches // spec.merge_unit))
    usual = _windows(spec, side, max(1, limits.max_patches // spec.merge_unit // side))
    patches = (spec.merge_unit, limits.max_patches, limits.max_patches)
    windows = (1, usual, most_windows(spec, limits.max_patches))
    lengths = (spec.merge_unit, longest, longest)
    table = _range(lambda i: (patches[i], spec.head_dim // 2))
    window = _range(lambda i: (windows[i], lengths[i]))
    shapes = {
        "pixels": _range(lambda i: (patches[i], spec.patch_dim)),
        "cos": table,
        "sin": table,
        "windows": window,
        "window_mask": window,
        "places": _range(lambda i: (patches[i],)),
    }
    return [Profile("page", shapes)]


def decoder_profiles(spec: TextSpec, limits: Limits) -> list[Profile]:
    """``prefill``, tuned for a whole prompt in one call, and ``step``, for one token."""
    prompt, capacity = limits.prefill_tokens, limits.capacity
    steps = min(STEP_TOKENS, capacity)
    return [
        _decoder_profile(
            spec, "prefill", (1, prompt, prompt), (1, prompt, capacity), (1, 1, steps)
        ),
        _decoder_profile(
            spec, "step", (1, 1, steps), (1, max(1, capacity // 2), capacity), (1, 1, steps)
        ),
    ]


def most_windows(spec: VisionSpec, patches: int) -> int:
    """Windows of the worst page of at most so many patches: a thin one, cut into short windows.

    What bounds how thin: a page is 200 to 1 at most before it is resized, and rounding its sides to
    whole tokens leaves r rows no more than 200 (r + 1) columns. Any shape at all would be three
    times the windows for 16,384 tokens, and TensorRT reserves memory for the most.
    """
    tokens = max(1, patches // spec.merge_unit)
    worst = 1
    for rows in range(1, math.isqrt(tokens) + 1):
        columns = min(tokens // rows, (rows + 1) * MAX_ASPECT_RATIO)
        worst = max(worst, _windows(spec, rows, columns))
    return worst


def _windows(spec: VisionSpec, rows: int, columns: int) -> int:
    side = spec.window_size // spec.factor
    return -(-rows // side) * -(-columns // side)


def _decoder_profile(spec: TextSpec, name: str, tokens: Shape, keys: Shape, rows: Shape) -> Profile:
    table = _range(lambda i: (tokens[i], spec.head_dim // 2))
    shapes = {
        "embeds": _range(lambda i: (tokens[i], spec.hidden_size)),
        "cos": table,
        "sin": table,
        "places": _range(lambda i: (tokens[i],)),
        "keys": _range(lambda i: (keys[i],)),
        "rows": _range(lambda i: (rows[i],)),
    }
    return Profile(name, shapes)


def _range(shape: Callable[[int], Shape]) -> Range:
    return Range(shape(0), shape(1), shape(2))
