"""Calibration data: what is read, what is refused, and how samples are drawn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmr5_export.samples import DataError, Sample, choose, read_samples, samples_sha256

ROW: dict[str, Any] = {"query": "Which?", "pages": ["a.png", "b.png"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, shade in (("a.png", 10), ("b.png", 200)):
        Image.new("RGB", (56, 56), (shade, 0, 0)).save(tmp_path / name)
    return tmp_path


def write(folder: Path, *rows: Any, name: str = "samples.jsonl") -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


def test_reads_a_file(folder: Path) -> None:
    text = "line\u2028separator"
    file = write(folder, ROW, "", json.dumps({**ROW, "relevant": [1], "response": text}))
    file.write_text(file.read_text().replace("\\u2028", "\u2028"), encoding="utf-8")
    pages = (folder / "a.png", folder / "b.png")
    assert read_samples(file) == [
        Sample("samples.jsonl line 1", "Which?", pages),
        Sample("samples.jsonl line 3", "Which?", pages, (1,), text),
    ]


def test_reads_a_folder(folder: Path) -> None:
    file = write(folder, ROW, name="mine.jsonl")
    assert read_samples(folder) == read_samples(file)
    write(folder, {**ROW, "query": "other"})
    assert [sample.query for sample in read_samples(folder)] == ["other"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{not json", "samples.jsonl line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ({"question": "Which?", "pages": ["a.png", "b.png"]}, "lacks query"),
        ({"query": "Which?"}, "line 2 lacks pages; the columns are query, pages"),
        ({**ROW, "relevants": [0]}, "line 2 has the unknown column relevants"),
        ({**ROW, "query": "  "}, "line 2: the question is blank"),
        ({**ROW, "query": 5}, "line 2: the question must be text"),
        ({**ROW, "pages": "a.png"}, "pages that are no list"),
        ({**ROW, "pages": ["a.png", 1]}, "pages that are no list"),
        ({**ROW, "pages": ["a.png"]}, "line 2 lists 1 page but a ranking needs 2"),
        ({**ROW, "pages": []}, "lists 0 pages"),
        ({**ROW, "relevant": [2]}, r"relevant = \[2\]; give different 0-based"),
        ({**ROW, "relevant": [1, 1]}, "give different 0-based"),
        ({**ROW, "relevant": [True]}, "give different 0-based"),
        ({**ROW, "relevant": 1}, "give different 0-based"),
        ({**ROW, "response": ""}, "response that is blank"),
        ({**ROW, "response": 3}, "response that is blank or no text"),
    ],
)
def test_refuses_a_row(folder: Path, row: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_samples(write(folder, ROW, row))


def test_names_the_first_missing_pages(folder: Path) -> None:
    rows = [{**ROW, "pages": ["a.png", f"gone-{number}.png"]} for number in range(5)]
    with pytest.raises(DataError, match=r"gone-0\.png \(samples.jsonl line 1\).* and 2 more;"):
        read_samples(write(folder, *rows))


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "is empty"), (b"\n \n", "is empty"), (b"\xff\xfe", "not UTF-8")]
)
def test_refuses_a_file(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_samples(file)


def test_refuses_a_source(folder: Path) -> None:
    with pytest.raises(DataError, match="there is no calibration data at"):
        read_samples(folder / "nothing")
    with pytest.raises(DataError, match="holds no jsonl file"):
        read_samples(folder)
    write(folder, ROW, name="one.jsonl")
    write(folder, ROW, name="two.jsonl")
    with pytest.raises(DataError, match=r"several jsonl files \(one.jsonl, two.jsonl\)"):
        read_samples(folder)


def test_responses_of_other_weights_are_left_out(folder: Path) -> None:
    file = write(folder, {**ROW, "relevant": [0], "response": "text"})
    (folder / "meta.json").write_text(json.dumps({"weights_sha256": "mine"}))
    for weights, response in ((None, "text"), ("mine", "text"), ("yours", None)):
        (sample,) = read_samples(file, weights)
        assert (sample.response, sample.relevant) == (response, (0,))
        assert sample.own == (weights == "mine")
    (folder / "meta.json").write_text("{}")
    with pytest.raises(DataError, match="does not say which weights"):
        read_samples(file, "mine")
    write(folder, ROW)  # nothing to tell apart: anybody may keep a meta.json beside their data
    assert len(read_samples(file, "mine")) == 1


def _samples(count: int) -> list[Sample]:
    return [Sample(f"line {number}", f"Which {number}?", ()) for number in range(count)]


@given(
    calibration=st.integers(0, 20),
    held_out=st.integers(0, 10),
    spare=st.integers(0, 10),
    seed=st.integers(0, 2**32),
)
def test_choice_is_disjoint_and_repeatable(
    calibration: int, held_out: int, spare: int, seed: int
) -> None:
    samples = _samples(calibration + held_out + spare)
    first, second = choose(samples, calibration, held_out, seed)
    assert (len(first), len(second)) == (calibration, held_out)
    assert len({sample.name for sample in first + second}) == calibration + held_out
    assert choose(samples, calibration, held_out, seed) == (first, second)


def test_more_calibration_samples_leave_the_held_out_ones() -> None:
    samples = _samples(100)
    few, held_out = choose(samples, 10, 20, seed=3)
    more, same = choose(samples, 80, 20, seed=3)
    assert held_out == same and more[:10] == few
    assert choose(samples, 10, 20, seed=4) != (few, held_out)


def test_too_few_samples() -> None:
    with pytest.raises(DataError, match="has 9 samples but 8 to calibrate on and 2 held out"):
        choose(_samples(9), 8, 2, seed=0)
    with pytest.raises(DataError, match="has 9 samples but 0 to calibrate on and 10 held out"):
        choose(_samples(9), 0, 10, seed=0)
    with pytest.raises(ValueError, match="-1 and 2 samples"):
        choose(_samples(9), -1, 2, seed=0)


@given(copies=st.lists(st.integers(0, 4), min_size=3, max_size=12), seed=st.integers(0, 2**32))
def test_what_is_measured_on_is_never_calibrated_on(copies: list[int], seed: int) -> None:
    samples = [Sample(f"line {at}", f"Which {query}?", ()) for at, query in enumerate(copies)]
    different = len(set(copies))
    first, second = choose(samples, different - 1, 1, seed)
    assert {sample.query for sample in first}.isdisjoint(sample.query for sample in second)
    assert len({sample.query for sample in first + second}) == different
    repeated = len(copies) - different
    rest = rf" that differ \({repeated} more repeat" if repeated else " but"
    with pytest.raises(DataError, match=f"has {different} samples{rest}"):
        choose(samples, different, 1, seed)


def test_equal_pages_in_other_files_and_another_order_are_the_same(folder: Path) -> None:
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes())
    rows = [ROW, {**ROW, "pages": ["b.png", "c.png"]}, {**ROW, "query": "Who?"}]
    samples = read_samples(write(folder, *rows))
    first, second = choose(samples, 1, 1, seed=0)
    assert {first[0].query, second[0].query} == {"Which?", "Who?"}
    with pytest.raises(DataError, match=r"2 samples that differ \(1 more"):
        choose(samples, 2, 1, seed=0)
    (folder / "b.png").unlink()
    with pytest.raises(DataError, match=r"b\.png cannot be read"):
        choose(samples, 1, 1, seed=0)


def test_only_the_models_own_answer_stays_with_a_held_out_sample() -> None:
    given_answers = [replace(sample, response="text") for sample in _samples(9)]
    first, second = choose(given_answers, 5, 4, seed=0)
    assert [sample.response for sample in first] == ["text"] * 5
    assert [sample.response for sample in second] == [None] * 4
    own = [replace(sample, own=True) for sample in given_answers]
    assert [sample.response for sample in choose(own, 5, 4, seed=0)[1]] == ["text"] * 4


def test_hash_covers_content_and_not_place(folder: Path, tmp_path: Path) -> None:
    (sample,) = read_samples(write(folder, ROW))
    reference = samples_sha256([sample], [[1, 2]])
    moved = tmp_path / "elsewhere" / "page.png"
    moved.parent.mkdir()
    moved.write_bytes(sample.pages[0].read_bytes())
    there = Sample("other name", sample.query, (moved, sample.pages[1]))
    assert samples_sha256([there], [[1, 2]]) == reference
    changed = [
        samples_sha256([sample], [[1, 3]]),
        samples_sha256([sample, sample], [[1, 2], [1, 2]]),
        samples_sha256([Sample("", "Who?", sample.pages)], [[1, 2]]),
        samples_sha256([Sample("", sample.query, sample.pages[::-1])], [[1, 2]]),
    ]
    assert len({reference, *changed}) == 5
    moved.unlink()
    with pytest.raises(DataError, match="page.png cannot be read"):
        samples_sha256([there], [[1, 2]])
