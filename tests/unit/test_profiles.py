"""The prompt profiles that ship: what each asks, and what of it depends on question and list."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from helpers.bpe import SPECIAL_TOKENS, qwen_like_tokenizer
from mmr5_runtime.prompt import (
    PromptTokenizer,
    Segments,
    load_template,
    profile_names,
    render,
    template_sha256,
)
from mmr5_runtime.types import EngineError, RequestError

PLAIN = PromptTokenizer(qwen_like_tokenizer())
PROMPTS = {name: PLAIN.with_template(load_template(name)) for name in profile_names()}
LISTWISE = [name for name in PROMPTS if not load_template(name).pointwise]

queries = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
page_sizes = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def whole_ids(profile: str, query: str, sizes: list[int]) -> list[int]:
    """Token ids of the prompt as one text, its pads multiplied in it."""
    template = load_template(profile)
    first, *rest = render(query, len(sizes), template).split(template.image_pad)
    text = first + "".join(
        template.image_pad * size + after for size, after in zip(sizes, rest, strict=True)
    )
    ids: list[int] = qwen_like_tokenizer().encode(text, add_special_tokens=False).ids
    return ids


def test_the_shipped_profiles() -> None:
    assert profile_names() == ("mm-r5", "mm-r5-images-first", "mmrag", "pointwise")
    assert [name for name in PROMPTS if name not in LISTWISE] == ["pointwise"]
    assert len({template_sha256(name) for name in PROMPTS}) == len(PROMPTS)


@pytest.mark.parametrize("name", profile_names())
def test_either_spelling_names_a_profile(name: str) -> None:
    template = load_template(name)
    assert load_template(name.replace("-", "_")) == template
    assert template.profile == name
    assert load_template(template.name) == template  # as a manifest names it


@pytest.mark.parametrize("name", ["", "../mm_r5", "mm_r5.json", "MM-R5"])
def test_no_other_name_reads_a_file(name: str) -> None:
    with pytest.raises(EngineError, match="no prompt template"):
        load_template(name)


def test_published_hashes() -> None:
    """Engines carry these: a change of the wording has to be a decision, not a slip."""
    assert {name: template_sha256(name) for name in PROMPTS} == {
        "mm-r5": "e9a48bc41a8bba2a07d9095f06f9f4cbe00a4b5ae2b3b5d852f5c247ff62f81f",
        "mm-r5-images-first": "ef843426b41934f105826f598a87fc451b729453ce1bdf1a07d64afb6545a9f4",
        "mmrag": "06baadb10c4c8b9b11311122ee453326770b9fc928f8a438d28da851f6fdd7d4",
        "pointwise": "ebcdf2c78fc7523214733972abf2324d1ab53a55c9e1a3f724df7e7360b9758a",
    }


def test_an_unused_field_does_not_change_a_hash() -> None:
    template = load_template("pointwise")
    assert dataclasses.replace(template, yes="", no="", instruction="").sha256 != template.sha256
    # The nine fields of mm_r5.json and nothing else: the defaults of the others are left out.
    assert dataclasses.replace(load_template(), instruction="").sha256 == template_sha256()


@pytest.mark.parametrize("profile", LISTWISE)
@given(query=queries, sizes=page_sizes)
def test_pieces_tokenize_as_the_whole_text(profile: str, query: str, sizes: list[int]) -> None:
    assert PROMPTS[profile].encode(query, sizes) == whole_ids(profile, query, sizes)


@given(query=queries, size=st.integers(1, 9))
def test_pieces_of_one_page_tokenize_as_the_whole_text(query: str, size: int) -> None:
    assert PROMPTS["pointwise"].encode(query, [size]) == whole_ids("pointwise", query, [size])


@given(queries, queries, page_sizes, page_sizes)
def test_images_first_reads_pages_before_it_knows_question_or_count(
    query: str, other: str, sizes: list[int], more: list[int]
) -> None:
    prompts = PROMPTS["mm-r5-images-first"]
    one, longer = prompts.segments(query, sizes), prompts.segments(other, sizes + more)
    assert one.head == longer.head
    assert one.pages == longer.pages[: len(one.pages)]
    assert one.tail != longer.tail


def test_images_first_has_the_wording_of_the_reference() -> None:
    reference, ours = load_template(), load_template("mm-r5-images-first")
    mapping = ours.question
    assert reference.question.endswith(f", {mapping}")
    assert ours.instruction.strip() == reference.question.removesuffix(f", {mapping}") + "."
    same = {"name": ours.name, "question": ours.question, "instruction": ours.instruction}
    assert dataclasses.replace(reference, **same) == ours


@pytest.mark.parametrize("profile", profile_names())
def test_question_and_tags_in_the_text(profile: str) -> None:
    text = render("How {tall} is it?", 1, load_template(profile))
    assert "How {tall} is it?" in text
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    lists = re.findall(r"<answer>\[[^\]]*\]</answer>", text)
    assert bool(lists) == (profile != "pointwise")
    assert ("<response>" in text) == (profile == "mmrag")


@pytest.mark.parametrize("profile", ["pointwise", "mm-r5"])
def test_head_with_the_question_is_shared_by_all_pages(profile: str) -> None:
    """Pages judged one by one differ in the page alone, so the head is read once."""
    segments: list[Segments] = [PROMPTS[profile].segments("what?", [size]) for size in (3, 7)]
    assert segments[0].head == segments[1].head and segments[0].tail == segments[1].tail


def test_pointwise_takes_one_page() -> None:
    with pytest.raises(RequestError, match="one page at a time and was given 2"):
        PROMPTS["pointwise"].encode("what?", [3, 3])
    with pytest.raises(RequestError, match="no pages"):
        PROMPTS["pointwise"].encode("what?", [])
    with pytest.raises(RequestError, match="one page at a time and was given 2"):
        render("what?", 2, load_template("pointwise"))


def test_verdicts_are_two_tokens() -> None:
    yes, no = PROMPTS["pointwise"].verdict_ids
    assert yes != no
    assert "Yes".startswith(PLAIN.decode([yes])) and "No".startswith(PLAIN.decode([no]))


def test_verdicts_of_a_tokenizer_or_profile_that_has_none() -> None:
    with pytest.raises(EngineError, match="no two answers"):
        _ = PLAIN.verdict_ids
    blind = Tokenizer(BPE())  # knows no letters, so both words are nothing to it
    blind.add_special_tokens([AddedToken(token) for token in SPECIAL_TOKENS])
    with pytest.raises(EngineError, match="no two answers"):
        _ = PromptTokenizer(blind, load_template("pointwise")).verdict_ids


def test_with_template_leaves_the_original_as_it_was() -> None:
    before = PLAIN.encode("what?", [2, 1])
    assert PLAIN.with_template(load_template("mmrag")).encode("what?", [2, 1]) != before
    assert PLAIN.encode("what?", [2, 1]) == before
