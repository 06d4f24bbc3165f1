"""From values to places and words: axes with sensible ticks, and numbers as people write them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

MISSING = "–"
# Beyond this span a linear axis hides the small values.
LOG_SPAN = 25.0


@dataclass(frozen=True)
class Scale:
    """Values ``low`` .. ``high`` onto ``start`` .. ``end`` (SVG units); outside is clamped."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        if high == low:
            return (self.start + self.end) / 2
        # Each term is a share of the span, so that the largest finite numbers do not overflow.
        share = at / (high - low) - low / (high - low) if math.isfinite(high - low) else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the axis, about ``count`` of them."""
        return (
            log_ticks(self.low, self.high) if self.log else nice_ticks(self.low, self.high, count)
        )


def time_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """From zero, or logarithmic when the times lie far apart; ``values`` in ms, possibly none."""
    found = [value for value in values if is_number(value) and value > 0]
    if not found:
        return Scale(0, 1, start, end)
    low, high = min(found), max(found)
    if high / low > LOG_SPAN:
        return Scale(low / 1.3, min(high * 1.15, 1e300), start, end, log=True)
    return Scale(0, min(high * 1.04, 1e300), start, end)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in ``low`` .. ``high``."""
    span = high - low
    if not math.isfinite(span) or span < 1e-290 or span < 1e-12 * max(abs(low), abs(high)):
        return [low]
    raw = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((f * power for f in (1, 2, 5, 10) if f * power >= raw), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, only the powers when there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1.0, 2.0, 5.0) if len(powers) <= 3 else (1.0,)
    step = max(1, len(powers) // 6)
    every = [factor * 10.0**power for power in powers[::step] for factor in factors]
    return [tick for tick in every if low <= tick <= high] or [low]


def is_number(value: Any) -> TypeGuard[float]:
    """A finite number; what stands in a file may be anything."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 3) -> str:
    """``digits`` significant ones, thousands apart with a thin space; – when there is none."""
    if not is_number(value):
        return MISSING
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e7 or size < 1e-4:
        return f"{value:.{digits - 1}e}"
    places = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{value:,.{places}f}".replace(",", "\u202f")


def milliseconds(value: Any) -> str:
    """A time in ms with its unit."""
    return MISSING if not is_number(value) else f"{number(value)} ms"


def tick_label(value: float) -> str:
    """Short, without trailing zeros."""
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")
    return f"{value:,.6g}".replace(",", "\u202f") if abs(value) >= 1e3 else f"{value:.4g}"


def percent(value: Any, digits: int = 1) -> str:
    """A share as percent."""
    return MISSING if not is_number(value) else f"{100 * value:.{digits}f} %"


def ratio(value: Any) -> str:
    """A factor, as ``1.23×``."""
    return MISSING if not is_number(value) else f"{number(value)}×"


def with_interval(interval: Any, show: str = "number") -> str:
    """``value [low, high]`` of an interval as numbers, percent or fractions; – when there is none.

    ``show`` is ``number``, ``percent``, ``fraction`` (3 decimals) or ``change`` (with a sign).
    """
    if not isinstance(interval, dict):
        return MISSING
    found = [interval.get(key) for key in ("value", "low", "high")]
    values = [value for value in found if is_number(value)]
    if len(values) < 3:
        return MISSING
    styles: dict[str, Callable[[float], str]] = {
        "number": number,
        "percent": lambda v: f"{100 * v:.1f}",
        "fraction": lambda v: f"{v:.3f}",
        "change": lambda v: f"{v:+.3f}",
    }
    value, low, high = (styles[show](v) for v in values)
    return f"{value}{' %' if show == 'percent' else ''} [{low}, {high}]"
