"""Options and markers to the cells of a test: which list size, engine, cache, stop and think."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

import pytest

from mmr5_bench.plugin.settings import CACHES, STOPS, THINKS, AxisValue, Settings

AXES = ("pages", "quant", "cache", "stop", "think")
Cell = dict[str, AxisValue]
"""A value per axis, in the order of :data:`AXES`; plain, because it ends up in JSON."""


def make_cells(settings: Settings, markers: Iterable[Mapping[str, Any]]) -> list[Cell]:
    """Cells of a test: the product of each marker, added up, every cell once, engine by engine.

    A marker says which values an axis has; what it leaves out has those of the options. Options
    that were given on the command line narrow markers down. Without a marker all values of the
    options are taken. ValueError for a marker that cannot be meant.
    """
    cells = [cell for marker in list(markers) or [{}] for cell in _product(settings, marker)]
    engines = list(settings.engines)
    ordered = sorted(cells, key=lambda cell: engines.index(str(cell["quant"])))
    return list({cell_name("", cell): cell for cell in ordered}.values())


def cell_name(base: str, cell: Mapping[str, Any]) -> str:
    """The name of an entry, as in ``rerank[pages=5,quant=int4,cache=cold]``."""
    return f"{base}[{','.join(f'{axis}={value}' for axis, value in cell.items())}]"


def group_name(base: str, cell: Mapping[str, Any]) -> str:
    """What pytest-benchmark's table is grouped by: list size and engine, where there are any."""
    shown = {axis: cell[axis] for axis in ("pages", "quant") if axis in cell}
    return cell_name(base, shown) if shown else base


def _product(settings: Settings, marker: Mapping[str, Any]) -> Iterable[Cell]:
    if unknown := sorted(set(marker) - set(AXES)):
        raise ValueError(
            f"rerank_axes has no axis {unknown[0]!r}; it takes {', '.join(AXES)} as keywords"
        )
    defaults = {**settings.axes, "quant": tuple(settings.engines)}
    values = []
    for axis in AXES:
        chosen = _several(marker[axis]) if axis in marker else defaults[axis]
        for value in chosen:
            _check(axis, value)
        # An engine that is not there cannot be measured, whether or not others were named.
        narrow = axis in settings.given or axis == "quant"
        values.append([v for v in chosen if v in defaults[axis]] if narrow else chosen)
    return (dict(zip(AXES, cell, strict=True)) for cell in product(*values))


def _several(value: Any) -> tuple[AxisValue, ...]:
    return (value,) if isinstance(value, str | int) else tuple(value)


def _check(axis: str, value: AxisValue) -> None:
    known: dict[str, tuple[str, ...]] = {"cache": CACHES, "stop": STOPS, "think": THINKS}
    count = isinstance(value, int) and not isinstance(value, bool) and value > 0
    fits = {"pages": count, "quant": isinstance(value, str), "think": count or value in THINKS}
    if not fits.get(axis, value in known.get(axis, ())):
        raise ValueError(f"rerank_axes({axis}={value!r}) is no value of this axis")


def marked(definition: pytest.Item) -> list[Mapping[str, Any]]:
    """The arguments of a test's ``rerank_axes`` markers, in the order they are written."""
    found = list(definition.iter_markers("rerank_axes"))
    if any(marker.args for marker in found):
        raise ValueError("rerank_axes takes keywords only: pages, quant, cache, stop, think")
    return [marker.kwargs for marker in reversed(found)]
