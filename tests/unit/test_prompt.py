"""The prompt's text against goldens made by the reference script's own strings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mmr5_runtime.prompt import Template, load_template, profile_names, render, template_sha256
from mmr5_runtime.types import EngineError, RequestError

GOLDEN = Path(__file__).parents[1] / "golden" / "prompts.json"
CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "case", CASES, ids=[f"{c['num_pages']}pages{i}" for i, c in enumerate(CASES)]
)
def test_text_equals_the_reference(case: dict[str, object]) -> None:
    query, num_pages = case["query"], case["num_pages"]
    assert isinstance(query, str) and isinstance(num_pages, int)
    assert render(query, num_pages) == case["text"]


def test_goldens_cover_one_page_two_digits_and_braces() -> None:
    assert {case["num_pages"] for case in CASES} >= {1, 11}
    assert any("{" in case["query"] for case in CASES)


@pytest.mark.parametrize("profile", profile_names())
def test_hash_covers_every_field(profile: str) -> None:
    template = load_template(profile)
    hashes = {template_sha256(profile)}
    for field in dataclasses.fields(Template):
        changed = dataclasses.replace(template, **{field.name: getattr(template, field.name) + " "})
        hashes.add(changed.sha256)
    assert len(hashes) == 1 + len(dataclasses.fields(Template))


def test_hash_is_the_published_one() -> None:
    """Engines carry this value: a change of the wording has to be a decision, not a slip."""
    assert template_sha256() == "e9a48bc41a8bba2a07d9095f06f9f4cbe00a4b5ae2b3b5d852f5c247ff62f81f"


def test_unknown_template() -> None:
    with pytest.raises(EngineError, match=r"no prompt template 'other' \(mm-r5, .* are there\)"):
        load_template("other")


@pytest.mark.parametrize("query", ["", " ", "\n\t\u3000"])
def test_blank_question(query: str) -> None:
    with pytest.raises(RequestError, match="question is blank"):
        render(query, 1)


def test_question_that_is_not_text() -> None:
    with pytest.raises(RequestError, match="must be text, not int"):
        render(3, 1)  # type: ignore[arg-type]


def test_question_with_half_a_surrogate_pair() -> None:
    with pytest.raises(RequestError, match="surrogate"):
        render("what \ud83d?", 1)


def test_no_pages() -> None:
    with pytest.raises(RequestError, match="no pages"):
        render("what?", 0)
