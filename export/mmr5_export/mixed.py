"""Which linears get more bits: mixed precision by measured error under a budget of bytes.

Linears that run fused share a format, so the choice is made by group (the input and output side of
attention, and of the MLP, of every layer). Errors of groups are taken to add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, prod

from mmr5_export.layer_pass import GROUPS, group_linears
from mmr5_kernels.layout import Format
from mmr5_runtime.spec import ModelSpec, decoder_linear_shapes
from mmr5_runtime.types import ExportError

_DENSE_BYTES = 2  # of a bf16 weight


@dataclass(frozen=True)
class _Option:
    """One format for one group."""

    name: str
    size: int
    error: float


@dataclass(frozen=True)
class _Step:
    """What the next better format of a group costs and gains."""

    group: str
    to: _Option
    size: int
    gain: float

    @property
    def gain_per_byte(self) -> float:
        return self.gain / self.size


def layer_groups(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """Linears by group, ``model.layers.0.qkv`` and so on: what has one format and one input."""
    return {
        f"model.layers.{index}.{group}": group_linears(index, group)
        for index in range(spec.text.num_layers)
        for group in GROUPS
    }


def group_bytes(
    spec: ModelSpec, candidates: Mapping[str, Mapping[str, Format | None]]
) -> dict[str, dict[str, int]]:
    """Stored bytes of every group of ``candidates`` in each of its formats, by name; None: bf16."""
    shapes = decoder_linear_shapes(spec)
    linears = layer_groups(spec)
    return {
        group: {
            name: sum(_linear_bytes(*shapes[linear], format) for linear in linears[group])
            for name, format in formats.items()
        }
        for group, formats in candidates.items()
    }


def choose_mixed(
    sensitivity: Mapping[str, Mapping[str, float]],
    sizes: Mapping[str, Mapping[str, int]],
    budget_bytes: int,
) -> dict[str, str]:
    """Format name of every group: little error in sum, and ``budget_bytes`` at most.

    ``sensitivity`` holds the error, and ``sizes`` the bytes, of each group in each format; errors
    of different groups must be of one unit. Every group starts with its smallest format and takes
    better ones where they gain the most per byte, until none fits. Of the formats of a group only
    those on the lower convex hull of error over size are looked at, so that gains per byte shrink
    from step to step: a larger budget then never gives a larger sum of errors. Equal input gives
    equal choices.

    Raises :class:`ExportError` naming the smallest size there is when the budget is below it, and
    ``ValueError`` when the mappings differ in groups or formats or an error is not finite.
    """
    hulls = {group: _hull(group, sensitivity, sizes) for group in sorted({*sensitivity, *sizes})}
    chosen = {group: hull[0] for group, hull in hulls.items()}
    used = sum(option.size for option in chosen.values())
    if used > budget_bytes:
        raise ExportError(
            f"the decoder cannot be stored in {budget_bytes:,} bytes, its smallest formats take "
            f"{used:,}; raise the size budget to that or more."
        )
    steps = [
        _Step(group, after, after.size - before.size, before.error - after.error)
        for group, hull in hulls.items()
        for before, after in zip(hull, hull[1:], strict=False)
    ]
    full: set[str] = set()  # groups whose next step did not fit: those after it are not reached
    for step in sorted(steps, key=lambda step: (-step.gain_per_byte, step.group, step.to.size)):
        if step.group in full:
            continue
        if used + step.size > budget_bytes:
            full.add(step.group)
            continue
        chosen[step.group] = step.to
        used += step.size
    return {group: chosen[group].name for group in sensitivity}


def _hull(
    group: str,
    sensitivity: Mapping[str, Mapping[str, float]],
    sizes: Mapping[str, Mapping[str, int]],
) -> list[_Option]:
    """Options of a group by growing size, each with less error, at ever less gain per byte."""
    errors, known = sensitivity.get(group, {}), sizes.get(group, {})
    if not errors or set(errors) != set(known):
        raise ValueError(f"errors and sizes of {group} must be known for the same formats.")
    if not all(isfinite(error) for error in errors.values()):
        raise ValueError(f"the errors of {group} are not all finite.")
    options = sorted(
        (_Option(name, known[name], error) for name, error in errors.items()),
        key=lambda option: (option.size, option.error, option.name),
    )
    hull: list[_Option] = []
    for option in options:
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _gain(before: _Option, after: _Option) -> float:
    return (before.error - after.error) / (after.size - before.size)


def _linear_bytes(rows: int, columns: int, format: Format | None) -> int:
    if format is None:
        return rows * columns * _DENSE_BYTES
    return sum(
        prod(shape) * dtype.itemsize for shape, dtype in format.tensors(rows, columns).values()
    )
