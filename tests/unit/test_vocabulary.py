"""Bytes of tokens against the tokenizers library's own decoding."""

from __future__ import annotations

from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from helpers.bpe import qwen_like_tokenizer
from mmr5_runtime.stopping.vocabulary import token_bytes

MINI = resources.files("mmr5_runtime") / "assets" / "mini" / "tokenizer.json"
TOKENIZERS = {
    "trained": qwen_like_tokenizer(),
    "mini": Tokenizer.from_str(MINI.read_text(encoding="utf-8")),
}
BYTES = {
    name: token_bytes(tokenizer, tokenizer.get_vocab_size() + 7)
    for name, tokenizer in TOKENIZERS.items()
}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_joined_bytes_are_the_decoded_text(name: str, data: st.DataObject) -> None:
    vocabulary = BYTES[name]
    ids = data.draw(st.lists(st.integers(0, len(vocabulary) - 1), max_size=20))
    decoded = TOKENIZERS[name].decode(ids, skip_special_tokens=True)
    assert b"".join(vocabulary[i] for i in ids).decode("utf-8", "replace") == decoded


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_token_on_its_own(name: str) -> None:
    tokenizer, vocabulary = TOKENIZERS[name], BYTES[name]
    for token_id, data in enumerate(vocabulary):
        decoded = tokenizer.decode([token_id], skip_special_tokens=True)
        assert data.decode("utf-8", "replace") == decoded


def test_special_tokens_and_unknown_ids_add_nothing() -> None:
    tokenizer, vocabulary = TOKENIZERS["trained"], BYTES["trained"]
    ids = tokenizer.get_vocab(with_added_tokens=True)
    assert vocabulary[ids["<|im_end|>"]] == b""
    assert vocabulary[ids["<tool_call>"]] == b"<tool_call>"
    assert vocabulary[-7:] == (b"",) * 7
    assert sum(not data for data in vocabulary) == 7 + 14
