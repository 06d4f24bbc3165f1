"""The pieces every chart is put together from: escaped elements, fitted text, one outer frame.

Colours are classes and CSS variables of the page, so that a chart follows light and dark; without
the page's CSS it is black on white and still readable. Coordinates are SVG units, text is 12 high.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

TEXT = 12.0
# Mean advance of a proportional font by its size; labels are cut a little early rather than late.
ADVANCE = 0.56
SERIES = 6


def clean(text: object) -> str:
    """``text`` for XML: escaped, without the control characters that XML cannot hold."""
    kept = "".join(c for c in str(text) if _allowed(c))
    return escape(kept, quote=True)


def _allowed(character: str) -> bool:
    code = ord(character)
    return (
        code >= 32
        and not 0x7F <= code < 0xA0
        and not 0xD800 <= code < 0xE000
        and (code not in (0xFFFE, 0xFFFF))
    )


def element(tag: str, content: str | None = None, **attributes: object) -> str:
    """One element; ``content`` is markup already, attributes are escaped (``class_`` is class)."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{written}/>" if content is None else f"<{tag}{written}>{content}</{tag}>"


def _value(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else clean(value)


def frame(width: float, height: float, title: str, description: str, parts: Sequence[str]) -> str:
    """The whole drawing, named and described for those who do not see it."""
    inside = element("title", clean(title)) + element("desc", clean(description))
    return element(
        "svg",
        inside + "".join(parts),
        xmlns="http://www.w3.org/2000/svg",
        class_="chart",
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=f"{title}. {description}",
    )


def text_width(text: str, size: float = TEXT) -> float:
    """About how wide ``text`` is drawn."""
    return len(text) * size * ADVANCE


def fitted(text: str, room: float, size: float = TEXT) -> str:
    """``text``, or as much of it as fits into ``room`` with an ellipsis."""
    if text_width(text, size) <= room or len(text) < 2:
        return text
    return text[: max(1, int(room / (size * ADVANCE)) - 1)].rstrip() + "…"


def label(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    room: float | None = None,
    size: float = TEXT,
    class_: str = "label",
) -> str:
    """Text at its baseline; cut to ``room``, and then whole in a tooltip."""
    shown = text if room is None else fitted(text, room, size)
    content = clean(shown)
    if shown != text:
        content += element("title", clean(text))
    return element(
        "text",
        content,
        x=x,
        y=y,
        text_anchor=anchor if anchor != "start" else None,
        font_size=size,
        class_=class_,
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: Sequence[tuple[float, float]], class_: str) -> str:
    """A line through ``points``; nothing for none."""
    if not points:
        return ""
    steps = " L".join(f"{x:.2f} {y:.2f}" for x, y in points)
    return element("path", d=f"M{steps}", class_=class_)


def marker(x: float, y: float, index: int, tooltip: str = "") -> str:
    """The sign of series ``index``: shape and colour both tell it apart."""
    series = index % SERIES
    inside = element("title", clean(tooltip)) if tooltip else None
    # The next six have the same colours in other shapes.
    shape = (index + index // SERIES) % 3
    if shape == 0:
        return element("circle", inside, cx=x, cy=y, r=4.5, class_=f"mark s{series}")
    reach = 5.6 if shape == 1 else 4.2
    corners = (
        [(x, y - reach), (x + reach, y), (x, y + reach), (x - reach, y)]
        if shape == 1
        else [(x - reach, y - reach), (x + reach, y - reach), (x + reach, y + reach)]
        + [(x - reach, y + reach)]
    )
    points = " ".join(f"{px:.2f},{py:.2f}" for px, py in corners)
    return element("polygon", inside, points=points, class_=f"mark s{series}")


def legend(
    entries: Sequence[tuple[str, str]], x: float, y: float, width: float
) -> tuple[str, float]:
    """Swatches of (class, name) from ``y`` on: markup, and where the next thing may begin."""
    parts = []
    at_x, at_y = x, y
    for class_, name in entries:
        needed = 18 + text_width(name) + 14
        if at_x > x and at_x + needed > x + width:
            at_x, at_y = x, at_y + 20
        parts.append(
            element("rect", x=at_x, y=at_y + 2, width=11, height=11, rx=2, class_=f"bar {class_}")
        )
        parts.append(label(at_x + 17, at_y + 12, name, room=x + width - at_x - 17))
        at_x += needed
    return "".join(parts), at_y + 24 if entries else y
