"""Token ids, segments and incremental decoding on a small Qwen-like tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from helpers.bpe import SPECIAL_TOKENS, qwen_like_tokenizer
from mmr5_runtime.prompt import PromptTokenizer, Segments, load_template, render
from mmr5_runtime.types import EngineError, RequestError

PROMPTS = PromptTokenizer(qwen_like_tokenizer())
VOCAB_SIZE = qwen_like_tokenizer().get_vocab_size()

queries = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
page_sizes = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def whole_text(query: str, sizes: list[int]) -> str:
    """The prompt with its pads multiplied in the text, as processors do it."""
    template = load_template()
    first, *rest = render(query, len(sizes)).split(template.image_pad)
    return first + "".join(
        template.image_pad * size + after for size, after in zip(sizes, rest, strict=True)
    )


@given(queries, page_sizes)
def test_pieces_tokenize_as_the_whole_text(query: str, sizes: list[int]) -> None:
    whole = qwen_like_tokenizer().encode(whole_text(query, sizes), add_special_tokens=False).ids
    segments = PROMPTS.segments(query, sizes)
    joined = [*segments.head, *(i for page in segments.pages for i in page), *segments.tail]
    assert joined == whole
    assert PROMPTS.encode(query, sizes) == whole


def test_head_boundary_is_not_a_token_boundary() -> None:
    """The reason why the label of page 1 lies in the head; the tokenizer must exhibit it."""
    template = load_template()
    tokenizer = qwen_like_tokenizer()
    head = template.head("what?", 2)
    before = head.removesuffix(template.label(1))
    apart = tokenizer.encode(before).ids + tokenizer.encode(template.label(1)).ids
    assert apart != tokenizer.encode(head).ids


def test_segments_of_two_pages() -> None:
    segments = PROMPTS.segments("what?", [3, 2])
    assert [page.count(PROMPTS.image_pad_id) for page in segments.pages] == [3, 2]
    assert PROMPTS.decode(segments.head).endswith("mapping:\n\nImage 1: ")
    assert PROMPTS.decode(segments.pages[1]) == "\nImage 2: "
    assert (
        PROMPTS.decode(segments.tail, skip_special=False) == "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_segments_are_found_again_in_the_ids() -> None:
    for counts in ([1], [3, 1, 2], [4] * 12):
        segments = PROMPTS.segments("Which one?", counts)
        assert Segments.cut(segments.ids, PROMPTS.image_pad_id) == segments
    assert Segments.cut([5, 6], PROMPTS.image_pad_id) == Segments((5, 6), (), ())


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_reserved_token_in_the_question(token: str) -> None:
    with pytest.raises(RequestError) as caught:
        PROMPTS.encode(f"what {token} is?", [1])
    assert token in str(caught.value)


def test_added_token_that_is_not_special_is_allowed() -> None:
    assert (
        PROMPTS.decode(PROMPTS.encode("what does <tool_call> do?", [1])).count("<tool_call>") == 1
    )


def test_blank_question_and_no_pages() -> None:
    with pytest.raises(RequestError, match="blank"):
        PROMPTS.encode("  ", [1])
    with pytest.raises(RequestError, match="no pages"):
        PROMPTS.encode("what?", [])


def test_settings_left_in_the_file_do_not_cut_the_prompt() -> None:
    tokenizer = qwen_like_tokenizer()
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=4096)
    assert PromptTokenizer(tokenizer).encode("what?", [4]) == PROMPTS.encode("what?", [4])


@given(st.text(st.characters(codec="utf-8")))
def test_stream_of_text(text: str) -> None:
    ids = qwen_like_tokenizer().encode(text).ids
    decoder = PROMPTS.stream()
    pieces = [decoder.feed(token) for token in ids]
    assert "".join([*pieces, decoder.flush()]) == PROMPTS.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40), st.booleans())
def test_stream_of_any_tokens(ids: list[int], skip_special: bool) -> None:
    decoder = PROMPTS.stream(skip_special)
    pieces = [*(decoder.feed(token) for token in ids), decoder.flush()]
    assert "".join(pieces) == PROMPTS.decode(ids, skip_special)


def test_stream_waits_for_the_whole_character() -> None:
    tokenizer = qwen_like_tokenizer()
    ids = tokenizer.encode("\U0001f680").ids
    decoder = PROMPTS.stream()
    pieces = [decoder.feed(token) for token in ids]
    assert len(ids) > 1
    assert pieces == [""] * (len(ids) - 1) + ["\U0001f680"]


def test_from_file(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(EngineError, match="is missing"):
        PromptTokenizer.from_file(path)
    path.write_text("{}")
    with pytest.raises(EngineError, match="not a readable tokenizer"):
        PromptTokenizer.from_file(path)
    qwen_like_tokenizer().save(str(path))
    assert PromptTokenizer.from_file(path).encode("what?", [1]) == PROMPTS.encode("what?", [1])


@pytest.mark.parametrize(
    "absent", ["<|vision_start|>", "<|image_pad|>", "<|im_start|>", "<|im_end|>"]
)
def test_tokenizer_of_another_family(absent: str) -> None:
    tokenizer = Tokenizer(BPE())
    tokenizer.add_special_tokens([AddedToken(t) for t in SPECIAL_TOKENS if t != absent])
    with pytest.raises(EngineError) as caught:
        PromptTokenizer(tokenizer)
    assert f"no special token {absent};" in str(caught.value)
