"""A small byte-level BPE with Qwen's pre-tokenizer and special tokens, trained on the fly."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from mmr5_runtime.prompt import load_template

# The order of ids 151643.. in Qwen2.5 tokenizers; the last two are not special there either.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PLAIN_ADDED_TOKENS = ("<tool_call>", "</tool_call>")

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def _trained_json() -> str:
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
        vocab_size=500,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN_ADDED_TOKENS])
    return str(tokenizer.to_str())


def qwen_like_tokenizer() -> Tokenizer:
    """A fresh copy each time, since truncation and padding are settings of the object."""
    return Tokenizer.from_str(_trained_json())
