"""Frozen candidates: what scores become, and every way in which a file of them can be wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.mmdocir_files import (
    lines_of,
    small_papers,
    write_annotations,
    write_data,
    write_scores,
)
from mmr5_bench.mmdocir.annotations import Annotations, find_annotations, read_annotations
from mmr5_bench.mmdocir.candidates import Candidates, from_scores, load_candidates

ROWS = (2, 0, 1)  # the first document of the file begins at row 2


def _annotations(folder: Path) -> Annotations:
    return read_annotations(find_annotations(write_data(folder, small_papers(), ROWS)))


def _scores() -> list[tuple[int, list[float]]]:
    return [(0, [0.1, 0.9, 0.5, 0.9]), (1, [1, 2, 3]), (2, [1, 1, 1]), (3, [-5.0, 0.0])]


def _frozen(folder: Path, depth: int = 3) -> tuple[Annotations, Candidates]:
    annotations = _annotations(folder)
    scores = write_scores(folder / "scores.jsonl", _scores())
    return annotations, from_scores(scores, annotations, first_stage="colqwen", depth=depth)


def test_scores_become_lists_cut_at_depth_and_at_k(tmp_path: Path) -> None:
    _, candidates = _frozen(tmp_path)
    assert candidates.lists == {0: (1, 3, 2), 1: (2, 1, 0), 2: (0, 1, 2), 3: (1, 0)}
    assert candidates.cut(0, 2) == (1, 3)
    assert candidates.cut(3, 3) == (1, 0)  # a document of two pages
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"--k {k}: these candidates have 3 pages"):
            candidates.cut(0, k)
    with pytest.raises(ValueError, match="no list for question 9"):
        candidates.cut(9, 1)


def test_what_is_frozen_is_read_back(tmp_path: Path) -> None:
    annotations, candidates = _frozen(tmp_path)
    path = tmp_path / "deep" / "candidates.json"
    candidates.save(path)
    assert load_candidates(path, annotations) == candidates
    assert [file.name for file in path.parent.iterdir()] == ["candidates.json"]
    data = json.loads(path.read_text())
    shuffled = dict(reversed(data.items())) | {"lists": dict(reversed(data["lists"].items()))}
    path.write_text(json.dumps(shuffled, indent=2))  # laid out otherwise, the same content
    assert load_candidates(path, annotations) == candidates


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(kind="other"), "no candidates file of schema 1"),
        (lambda d: d.update(schema=2), "no candidates file of schema 1"),
        (lambda d: d["lists"]["0"].reverse(), "was changed after it was frozen"),
        (lambda d: d.update(first_stage="another"), "was changed after it was frozen"),
        (lambda d: d.update(sha256="0"), "was changed after it was frozen"),
        (lambda d: d.pop("sha256"), "was changed after it was frozen"),
        (lambda d: d.pop("first_stage"), "lacks dataset_sha256, first_stage or depth"),
        (lambda d: d.update(depth=0), "lacks dataset_sha256, first_stage or depth"),
        (lambda d: d.update(lists=[[0]]), "lists is no object"),
        (lambda d: d["lists"].update(x=[0]), "lists is no object"),
        (lambda d: d["lists"].update({"0": [0.0]}), "lists is no object"),
    ],
)
def test_a_changed_file_of_candidates_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    annotations, candidates = _frozen(tmp_path)
    path = tmp_path / "candidates.json"
    candidates.save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        load_candidates(path, annotations)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({0: (1, 1, 2)}, "question 0 has a page twice"),
        ({0: (1, 4, 2)}, "question 0 has a page outside of 0 to 3"),
        ({0: (1, -1, 2)}, "question 0 has a page outside of 0 to 3"),
        ({0: (1, 2)}, "question 0 has 2 pages and should have 3"),
        ({3: (1, 0, 2)}, "question 3 has 3 pages and should have 2"),
        ({4: (1, 0, 2)}, "a list for question 4, which there is none of"),
    ],
)
def test_lists_that_do_not_fit_the_data_are_refused(
    tmp_path: Path, lists: dict[int, tuple[int, ...]], message: str
) -> None:
    annotations, good = _frozen(tmp_path)
    changed = {**good.lists, **lists}
    path = tmp_path / "candidates.json"
    Candidates(good.dataset_sha256, good.first_stage, good.depth, changed).save(path)
    with pytest.raises(ValueError, match=message):
        load_candidates(path, annotations)


def test_candidates_of_other_questions_are_refused(tmp_path: Path) -> None:
    annotations, candidates = _frozen(tmp_path)
    candidates.save(tmp_path / "candidates.json")
    lines = lines_of(small_papers(), ROWS)
    lines[0]["questions"][0]["Q"] = "Where else?"
    other = read_annotations(write_annotations(tmp_path, lines))
    assert other.sha256 != annotations.sha256
    with pytest.raises(ValueError, match="belongs to the annotation file with sha256"):
        load_candidates(tmp_path / "candidates.json", other)
    lists = {question: pages for question, pages in candidates.lists.items() if question != 2}
    Candidates(annotations.sha256, "x", 3, lists).save(tmp_path / "candidates.json")
    with pytest.raises(ValueError, match="question 2 has no list"):
        load_candidates(tmp_path / "candidates.json", annotations)
    for data, message in ((None, "cannot be read"), (b"{", "no JSON"), (b"[]", "no candidates")):
        path = tmp_path / "other.json"
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            load_candidates(path, annotations)


@pytest.mark.parametrize(
    ("at", "row", "message"),
    [
        (1, '{"question": 1, "scores": [1, NaN, 3]}', "line 2: .* score nan for page 1"),
        (1, '{"question": 1, "scores": [1, Infinity, 3]}', "line 2: .* score inf for page 1"),
        (1, '{"question": 1, "scores": [1, null, 3]}', "score None for page 1"),
        (1, '{"question": 1, "scores": [1, true, 3]}', "score True for page 1"),
        (1, '{"question": 1, "scores": [1, "2", 3]}', "score '2' for page 1"),
        (1, '{"question": 1, "scores": [1, 2]}', "has 2 scores, but its document has 3 .*last"),
        (1, '{"question": 1, "scores": [1, 2, 3, 4]}', "has 4 scores, but .* 3 pages"),
        (1, '{"question": 1, "scores": 5}', "has no scores, but .* 3 pages"),
        (1, '{"question": 0, "scores": [1, 2, 3, 4]}', "line 2: question 0 has scores already"),
        (1, '{"question": 4, "scores": [1]}', "question 4 is none of 0 to 3"),
        (1, '{"question": "1", "scores": [1]}', "question '1' is none of 0 to 3"),
        (1, '{"question": 1}', 'line 2: it is no {"question"'),
        (1, "[]", 'line 2: it is no {"question"'),
        (1, "{", "line 2: it is no JSON"),
        (
            1,
            '{"question": 1, "scores": [1, 1' + "0" * 400 + ", 3]}",
            "score 1000* for page 1; .* finite",
        ),
    ],
)
def test_bad_scores_are_named(tmp_path: Path, at: int, row: str, message: str) -> None:
    annotations = _annotations(tmp_path)
    path = write_scores(tmp_path / "scores.jsonl", _scores())
    lines = path.read_text().splitlines()
    lines[at] = row
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        from_scores(path, annotations, first_stage="x")


def test_questions_without_scores_are_counted(tmp_path: Path) -> None:
    annotations = _annotations(tmp_path)
    path = write_scores(tmp_path / "scores.jsonl", _scores()[1:])
    with pytest.raises(ValueError, match="no scores for 1 of 4 questions .the first is 0"):
        from_scores(path, annotations, first_stage="x")
    with pytest.raises(ValueError, match="cannot be read"):
        from_scores(tmp_path / "absent.jsonl", annotations, first_stage="x")
    with pytest.raises(ValueError, match="--depth 0"):
        from_scores(path, annotations, first_stage="x", depth=0)
    with pytest.raises(ValueError, match="no name"):
        from_scores(path, annotations, first_stage=" ")


def test_pages_that_were_not_ranked_never_enter_by_their_number(tmp_path: Path) -> None:
    annotations = _annotations(tmp_path)
    scores = _scores()
    scores[0] = (0, [-math.inf, 0.5, -math.inf, 0.9])
    path = write_scores(tmp_path / "scores.jsonl", scores)
    assert from_scores(path, annotations, first_stage="x", depth=2).lists[0] == (3, 1)
    with pytest.raises(ValueError, match="ranks 2 of its 4 pages, fewer than --depth 3"):
        from_scores(path, annotations, first_stage="x", depth=3)
