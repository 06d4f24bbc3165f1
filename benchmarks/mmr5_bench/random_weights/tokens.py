"""A small byte-level BPE with Qwen's pre-tokenizer and special tokens, trained on the fly.

Qwen's own vocabulary is not shipped here. This one is trained on the prompt's text until every word
of it is one token, as nearly all of them are in Qwen's, so that a prompt has about as many tokens.
"""

from __future__ import annotations

import json
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from mmr5_bench.mini.tokenizer import QWEN_SPLIT, SPECIAL_TOKENS
from mmr5_runtime.prompt import load_template

# Behind the special ones in Qwen2.5 tokenizers, and not special there either.
PLAIN_ADDED_TOKENS = ("<tool_call>", "</tool_call>")
WHOLE_WORDS = 1500  # entries after which every word of the prompt is one token


@cache
def _trained_json(vocab_size: int) -> str:
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    template = load_template()
    corpus = [
        template.system,
        template.question,
        *(template.label(number) for number in range(1, 30)),
        # Often enough to become single tokens, as they are in the real vocabulary.
        *["mapping:\n\nImage 1: ", "it.</think><answer>[2, 1]</answer>"] * 40,
        "Größe, 東京の地図, 😀 and the rest",
    ] * 3
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN_ADDED_TOKENS])
    return str(tokenizer.to_str())


def qwen_like_tokenizer(vocab_size: int = 500) -> Tokenizer:
    """A tokenizer of at most ``vocab_size`` tokens of text, special ones behind them.

    A fresh copy each time, since truncation and padding are settings of the object.
    """
    return Tokenizer.from_str(_trained_json(vocab_size))


def padded_tokenizer_json(first_special_id: int, vocab_size: int = 500) -> str:
    """``tokenizer.json`` whose special tokens begin at ``first_special_id``, as in a checkpoint.

    The ids between are ``[unused N]``: text never becomes one of them, but they decode to that.
    """
    document = json.loads(_trained_json(vocab_size))
    vocabulary = document["model"]["vocab"]
    if len(vocabulary) > first_special_id:
        raise ValueError(
            f"{len(vocabulary)} tokens of text do not fit below id {first_special_id}; train fewer"
        )
    for number in range(len(vocabulary), first_special_id):
        vocabulary[f"[unused {number}]"] = number
    order = (*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS)
    for token in document["added_tokens"]:
        token["id"] = first_special_id + order.index(token["content"])
    return json.dumps(document)
