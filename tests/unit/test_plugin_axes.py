"""Cells of a benchmark: products of markers, narrowed by options; and the journal of entries."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmr5_bench.evidence.document import load_evidence, new_evidence
from mmr5_bench.evidence.statistics import STATISTICS
from mmr5_bench.plugin.axes import AXES, cell_name, group_name, make_cells
from mmr5_bench.plugin.journal import Journal
from mmr5_bench.plugin.settings import CACHES, STOPS, THINKS, Settings

ENGINES = ("bf16", "int8", "int4")
SETTINGS = Settings(
    engines={name: Path(name) for name in ENGINES},
    reference=None,
    axes={"pages": (5, 10), "cache": ("cold", "warm"), "stop": ("determined",), "think": ("full",)},
    given=frozenset(),
    lists=12,
    warmup=2,
    seed=0,
    dtype="auto",
    device="auto",
    threads=None,
    max_new_tokens=512,
    ceilings_s=0.0,
    slowdown=0.0,
    allow_machine_diff=False,
    title=None,
    note=None,
    journal=None,
    json=None,
)


def values_of(cells: list[dict[str, Any]], axis: str) -> set[Any]:
    return {cell[axis] for cell in cells}


def test_without_a_marker_a_test_has_every_value_of_the_options() -> None:
    cells = make_cells(SETTINGS, [])
    assert cells == make_cells(SETTINGS, [{}])
    assert [cell["quant"] for cell in cells] == ["bf16"] * 4 + ["int8"] * 4 + ["int4"] * 4
    assert cells[0] == {
        "pages": 5, "quant": "bf16", "cache": "cold", "stop": "determined", "think": "full"
    }  # fmt: skip
    assert cell_name("rerank", cells[0]) == (
        "rerank[pages=5,quant=bf16,cache=cold,stop=determined,think=full]"
    )
    assert group_name("rerank", cells[0]) == "rerank[pages=5,quant=bf16]"
    assert group_name("own", {"threads": 2}) == "own"


def test_markers_add_up_and_options_narrow_them_down() -> None:
    markers: list[dict[str, Any]] = [
        {},
        {"quant": "int4", "cache": "cold", "stop": "eos"},
        {"quant": "int4", "cache": "cold", "think": ("off", 32)},
    ]
    assert len(make_cells(SETTINGS, markers)) == 12 + 2 + 4
    cold = replace(
        SETTINGS,
        axes={**SETTINGS.axes, "think": (32,), "pages": (3,)},
        given=frozenset({"think", "pages"}),
    )
    cells = make_cells(cold, markers)
    assert values_of(cells, "think") == {32} and values_of(cells, "pages") == {3}
    assert len(cells) == 6 + 1  # the third marker only repeats a cell of the first
    other = replace(SETTINGS, engines={"own": Path("own")}, given=frozenset({"quant"}))
    assert values_of(make_cells(other, markers), "quant") == {"own"}
    assert make_cells(other, markers[1:]) == []


AXIS_VALUES: dict[str, Any] = {
    "pages": st.integers(1, 30),
    "quant": st.sampled_from(ENGINES),
    "cache": st.sampled_from(CACHES),
    "stop": st.sampled_from(STOPS),
    "think": st.one_of(st.sampled_from(THINKS), st.integers(1, 99)),
}
MARKER = st.fixed_dictionaries(
    {}, optional={axis: st.lists(v, min_size=1, max_size=3) for axis, v in AXIS_VALUES.items()}
)


@given(st.lists(MARKER, min_size=1, max_size=3))
def test_cells_are_the_union_of_products(markers: list[dict[str, Any]]) -> None:
    defaults = {**SETTINGS.axes, "quant": ENGINES}
    wanted = {
        values
        for marker in markers
        for values in product(*(marker.get(axis, defaults[axis]) for axis in AXES))
    }
    cells = make_cells(SETTINGS, markers)
    assert {tuple(cell.values()) for cell in cells} == wanted
    assert len(cells) == len(wanted)
    engines = [ENGINES.index(str(cell["quant"])) for cell in cells]
    assert engines == sorted(engines)  # every engine is loaded once


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ({"memory": "cold"}, "no axis 'memory'; it takes pages, quant, cache, stop, think"),
        ({"pages": 0}, r"rerank_axes\(pages=0\) is no value"),
        ({"pages": True}, "is no value"),
        ({"cache": "hot"}, r"rerank_axes\(cache='hot'\) is no value"),
        ({"stop": 5}, "is no value"),
        ({"think": ("full", "loud")}, "think='loud'"),
        ({"quant": 4}, "is no value"),
    ],
)
def test_markers_that_cannot_be_meant(marker: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_cells(SETTINGS, [marker])


def entry(name: str) -> dict[str, Any]:
    interval = {"value": 1.0, "low": 1.0, "high": 1.0}
    return {
        "name": name,
        "subject": "own",
        "axes": {},
        "work": "0123456789abcdef",
        "samples_ms": [1.0],
        "latency_ms": dict.fromkeys(STATISTICS, interval),
    }


@given(cut=st.integers(0, 4000), again=st.booleans())
def test_a_cut_off_journal_keeps_every_whole_entry(
    tmp_path_factory: pytest.TempPathFactory, cut: int, again: bool
) -> None:
    path = tmp_path_factory.mktemp("journal") / "new" / "run.jsonl"
    journal = Journal(path)
    journal.begin(new_evidence("first", "", {}))
    for name in "abc":
        journal.append({"entry": entry(name)})
    journal.append({"skipped": {"subject": "d", "reason": "KeyboardInterrupt"}})
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    ends = [at + 1 for at in range(len(data)) if data[at : at + 2] == b"}\n"]
    whole = sum(end <= cut for end in ends[1:4])
    if again:
        journal.begin(new_evidence("second", "", {}))
        journal.append({"entry": entry("z")})
        found = load_evidence(path)
        assert (found["title"], [e["name"] for e in found["entries"]]) == ("second", ["z"])
    elif whole:
        found = load_evidence(path)
        assert found["title"] == "first"
        assert [e["name"] for e in found["entries"]] == list("abc"[:whole])
        assert len(found["skipped"]) == (ends[4] <= cut)
    else:
        with pytest.raises(ValueError, match="has no finished entry"):
            load_evidence(path)


def test_a_run_without_an_entry_does_not_hide_the_one_before(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.jsonl")
    journal.begin(new_evidence("first", "", {}))
    journal.append({"entry": entry("a")})
    journal.begin(new_evidence("second", "", {}))
    journal.append({"skipped": {"subject": "a", "reason": "KeyboardInterrupt"}})
    assert load_evidence(tmp_path / "run.jsonl")["title"] == "first"
