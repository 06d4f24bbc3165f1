"""One self-contained HTML page: no script, no network, light and dark, screen and print.

material -> cards and sections -> template (autoescaped) -> HTML
"""

from __future__ import annotations

from datetime import datetime

from mmr5_bench.report.material import Material
from mmr5_bench.report.sections import make_cards, make_sections


def render_page(material: Material) -> str:
    """The page as text. Everything out of a file is escaped, also inside the drawings."""
    # Only for this command, and only with the extra `bench`.
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("mmr5_bench.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    first = material.sources[0].evidence
    machine = first["machine"]
    threads = machine.get("threads")
    facts = [
        _day(first["created"]),
        machine.get("gpu") or machine.get("host_cpu"),
        f"{threads} thread{'' if threads == 1 else 's'}" if threads else None,
        f"commit {first['provenance'].get('commit')}"
        if first["provenance"].get("commit")
        else None,
        f"{len(material.views)} entries" if material.views else None,
    ]
    # The charts are markup made here, of escaped parts.
    sections = [
        (section, [(c.caption, Markup(c.wide), Markup(c.phone)) for c in section.charts])
        for section in make_sections(material)
    ]
    return environment.get_template("report.html.j2").render(
        title=first["title"],
        notes=material.notes,
        facts=[str(fact) for fact in facts if fact],
        cards=make_cards(material),
        sections=sections,
    )


def _day(created: str) -> str:
    try:
        return f"{datetime.fromisoformat(created):%d %B %Y, %H:%M} UTC"
    except ValueError:
        return created
