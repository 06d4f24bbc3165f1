"""The report page, its Markdown and its CI file: complete, escaped, and fine with little data."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from helpers.evidence import MACHINE, interval, make_entry, make_evidence, realistic_run
from mmr5_bench.cli import main
from mmr5_bench.evidence.document import Evidence, write_evidence
from mmr5_bench.report.action import action_results
from mmr5_bench.report.markdown import markdown_report
from mmr5_bench.report.material import Material, Source, gather, name_entries
from mmr5_bench.report.page import render_page

HOSTILE = "<script>alert(1)</script>\" onload='x' & {{ 7*7 }} \x00\x1b | `a` [b](c)"
VOID = {"meta", "link", "br", "line", "rect", "circle", "path", "polygon"}


class Outline(HTMLParser):
    """Elements of a page, and that each one is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def material_of(*runs: Evidence, baseline: Evidence | None = None) -> Material:
    sources = [Source(f"{i}.json", f"{i}" * 64, run) for i, run in enumerate(runs)]
    return gather(sources, Source("old.json", "e" * 64, baseline) if baseline else None)


def sections_of(page: str) -> list[str | None]:
    return [attributes.get("id") for attributes in Outline(page).all("h2")]


def test_a_full_page() -> None:
    page = render_page(material_of(realistic_run(0), realistic_run(1)))
    assert sections_of(page) == [
        *("regression", "distribution", "latency", "stages", "pareto", "peers", "roofline"),
        *("quality", "kernels", "skipped", "provenance"),
    ]
    outline = Outline(page)
    assert "These figures say nothing about MM-R5." in page
    assert all(attributes.get("scope") in ("col", "row") for attributes in outline.all("th"))
    assert len(outline.all("caption")) == len(outline.all("table")) > 5
    assert len(outline.all("svg")) == 2 * len(outline.all("figure")) > 10
    assert "0" * 64 in page and "1" * 64 in page and "abc1234" in page


def test_the_page_needs_nothing_but_itself() -> None:
    page = render_page(material_of(realistic_run(0)))
    outline = Outline(page)
    assert not outline.all("script") and not outline.all("img")
    assert [attributes["href"] for attributes in outline.all("link")] == ["data:,"]
    addresses = set(re.findall(r"https?://[^\"' <]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert "url(" not in page and "@import" not in page


def test_what_has_no_data_is_left_out() -> None:
    bare = make_evidence([make_entry("a", "ours", [1.0, 2.0])])
    assert sections_of(render_page(material_of(bare))) == ["distribution", "latency", "provenance"]
    assert sections_of(render_page(material_of(make_evidence([])))) == ["provenance"]
    kernels = make_evidence([], kernels=[{"op": "o", "status": "failed"}, "none"])
    page = render_page(material_of(kernels))
    assert sections_of(page) == ["kernels", "provenance"] and "–" in page


def hostile_run() -> Evidence:
    quality = {"cases": 3, "recall@1": interval(0.5, 0.1), HOSTILE: interval(0.5, 0.1)}
    more: dict[str, Any] = {
        "axes": {HOSTILE: HOSTILE, "pages": 5},
        "stages_ms": {HOSTILE: 1.0, "decode": 2.0},
        "rates": {"memory_share": 0.5},
        "gpu": {"clock_mhz": HOSTILE, "throttled": True},
        "quality": quality,
    }
    entries = [make_entry(f"{HOSTILE}{i}", HOSTILE, [1.0, 2.0] * 3, **more) for i in range(2)]
    return make_evidence(
        entries,
        title=HOSTILE,
        note=HOSTILE,
        created=HOSTILE,
        machine={**MACHINE, "host_cpu": HOSTILE},
        provenance={HOSTILE: HOSTILE, "commit": HOSTILE, "command": None},
        skipped=[{"subject": HOSTILE, "reason": HOSTILE}],
        kernels=[{"op": HOSTILE, "format": HOSTILE, "shape": [HOSTILE], "share": 0.5, "ms": 7}],
        qualities=[{"subject": HOSTILE, "dataset": HOSTILE, "axes": {}, "quality": quality}],
    )


def test_nothing_out_of_a_file_is_markup() -> None:
    page = render_page(material_of(hostile_run(), hostile_run()))
    outline = Outline(page)
    assert not outline.all("script")
    assert not any("onload" in attributes for _, attributes in outline.found)
    assert "&lt;script&gt;" in page and "{{ 7*7 }}" in page
    markdown = markdown_report(material_of(hostile_run(), hostile_run()))
    assert "<script>" not in markdown and "\\[b\\](c)" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert rows and all(line.endswith(" |") for line in rows)


def test_every_note_is_told_that_of_kernels_with_them() -> None:
    kernels = make_evidence([], note="Of single operations.", kernels=[{"op": "o", "share": 0.5}])
    page = render_page(material_of(realistic_run(0), kernels))
    header, rest = page.split("</header>")
    assert "nothing about MM-R5" in header and "Of single operations." not in header
    assert "Of single operations." in rest
    assert "Of single operations." in markdown_report(material_of(realistic_run(0), kernels))


def test_names_say_what_differs_and_the_rest_is_said_once() -> None:
    def entry(name: str, subject: str, **axes: Any) -> Any:
        return make_entry(name, subject, [1.0], axes=axes)

    entries = [
        entry("a", "ours int4", pages=5, quant="int4", cache="cold", stop="eos"),
        entry("b", "ours int4", pages=10, quant="int4", cache="warm", stop="eos"),
        entry("c", "ours int8", pages=5, quant="int8", cache="cold", stop="eos"),
    ]
    labels, common = name_entries(entries)
    assert labels == ["ours int4, 5 pages, cold cache"] * 1 + [
        "ours int4, 10 pages, warm cache",
        "ours int8, 5 pages, cold cache",
    ]
    assert common == "stop eos"
    same = [entry("x", "ours"), entry("y", "ours")]
    assert name_entries(same)[0] == ["ours, x", "ours, y"]
    again = [*same, entry("y[pages=5]", "ours")]  # the base of the name does not tell them apart
    assert name_entries(again)[0] == ["ours, x", "ours y", "ours y[pages=5]"]
    assert name_entries([]) == ([], "")


def test_how_most_answers_end_is_said_once() -> None:
    stops = ("determined", "determined", "determined", "eos")
    entries = [
        make_entry(f"rerank[{n}]", "ours", [1.0], axes={"pages": n, "stop": stop, "think": "full"})
        for n, stop in enumerate(stops)
    ]
    labels, common = name_entries(entries)
    assert labels == ["ours, 0 pages", "ours, 1 pages", "ours, 2 pages", "ours, 3 pages, eos stop"]
    assert common == "think full, stop determined unless said"


def test_a_baseline_is_compared_and_not_shown() -> None:
    slow = realistic_run(2, slower=1.5)
    material = material_of(slow, baseline=realistic_run(0))
    assert material.comparison and material.comparison["verdicts"]["regressed"]
    page = render_page(material)
    assert "Baseline: old.json" in page and "certainly" in page
    assert len(material.views) == len(slow["entries"])
    assert "| regressed |" in markdown_report(material)


def test_of_several_files_the_first_is_the_baseline() -> None:
    alone = material_of(realistic_run(0))
    assert alone.comparison is None and alone.baseline is None
    both = material_of(realistic_run(0), realistic_run(1))
    assert both.comparison and both.baseline == both.sources[0]
    assert len(both.views) == len(alone.views)
    assert both.views[0].entry["samples_ms"] == realistic_run(1)["entries"][0]["samples_ms"]
    other = material_of(realistic_run(0), make_evidence([make_entry("else", "ours", [1.0] * 5)]))
    assert other.comparison is None and "regression" not in sections_of(render_page(other))


def test_runs_of_two_machines_are_told_apart_and_not_compared() -> None:
    away = realistic_run(1)
    away["machine"] = {**MACHINE, "id": "f" * 16, "host_cpu": "Another 1"}
    material = material_of(realistic_run(0), away)
    assert material.comparison is None
    assert "host_cpu: Imaginary 9000 and Another 1" in material.comparison_note
    assert {view.label[-1] for view in material.views} == {"A", "B"}
    assert "machines differ" in render_page(material)


def test_ratios_against_a_peer_are_of_the_same_work() -> None:
    def run(work: str) -> Material:
        ours = make_entry("a", "ours", [10.0, 20.0] * 4)
        peer = make_entry("a", "peer", [40.0, 80.0] * 4, work=work or ours["work"])
        return material_of(make_evidence([ours, peer]))

    table = markdown_report(run(""))
    assert (
        "| ours | peer | 0.250 \\[0.250, 0.250\\] |" in table and "| peer | peer | 1 | 1 |" in table
    )
    assert "baseline on the same work" not in markdown_report(run("0" * 16))


def test_of_many_curves_the_baseline_and_the_fastest_are_drawn() -> None:
    entries = [make_entry("a", f"ours {i}", [100.0 - i] * 5) for i in range(9)]
    entries.append(make_entry("a", "peer", [500.0] * 5))
    page = render_page(material_of(make_evidence(entries)))
    drawing = page[page.index('id="distribution"') : page.index('id="latency"')]
    assert "Of 10 entries the baseline and the 5 fastest." in drawing
    assert [name for name in (e["subject"] for e in entries) if f">{name}<" in drawing] == [
        *(f"ours {i}" for i in range(4, 9)),
        "peer",
    ]


def test_results_for_ci_are_all_smaller_is_better() -> None:
    rows = action_results(material_of(realistic_run(0)))
    assert {type(row[key]) for row in rows for key in ("name", "unit", "range", "extra")} == {str}
    assert len({row["name"] for row in rows}) == len(rows)
    by_name = {row["name"]: row for row in rows}
    name = "ours int4 rerank[pages=5,cache=cold,stop=determined]"
    entry = realistic_run(0)["entries"][0]
    assert by_name[f"{name} p95"]["value"] == pytest.approx(
        entry["latency_ms"]["p95"]["value"], abs=1e-3
    )
    assert by_name[f"{name} recall@1 loss"]["value"] == pytest.approx(5.2)
    assert by_name[f"{name} fallback share"]["value"] == pytest.approx(0.5)
    assert all(row["value"] >= 0 for row in rows)


def test_the_command_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_evidence(realistic_run(0), tmp_path / "a.json")
    out = [tmp_path / "deep" / name for name in ("page.html", "page.md", "ci.json")]
    options = ["-o", str(out[0]), "--markdown", str(out[1]), "--action-json", str(out[2])]
    assert main(["report", str(tmp_path / "a.json"), *options]) == 0
    assert out[0].read_text(encoding="utf-8").startswith("<!doctype html>")
    assert out[1].read_text(encoding="utf-8").startswith("# Mini on held-out synthetic lists")
    assert json.loads(out[2].read_text(encoding="utf-8"))
    assert sorted(path.name for path in out[0].parent.iterdir()) == [
        "ci.json",
        "page.html",
        "page.md",
    ]
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["kind"], summary["entries"]) == ("mmr5-report", 14)


def test_the_command_names_a_file_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text("{")
    assert main(["report", str(tmp_path / "a.json"), "-o", str(tmp_path / "p.html")]) == 1
    assert "a.json is no JSON" in capsys.readouterr().err
    assert not (tmp_path / "p.html").exists()
