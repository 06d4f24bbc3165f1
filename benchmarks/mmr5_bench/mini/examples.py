"""Training sequences: prompt, target text and a weight per predicted token."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mmr5_bench.minidocs.lists import VERDICTS, RerankCase
from mmr5_runtime.prompt import render

QUESTION_MARK = "\nThe question is"
CAPTION = re.compile(f"shows a (.*?)({'|'.join(VERDICTS)})\\.")
VERDICT_WEIGHT, ID_WEIGHT = 4.0, 2.0


@dataclass(frozen=True)
class Example:
    """One sequence: ids [T], loss weight of each id as a target [T], and where pages go.

    ``weights[t]`` applies to predicting ``ids[t]`` from what stands before it; it is 0 in the
    prompt.
    """

    ids: Tensor
    weights: Tensor


def encode_case(
    tokenizer: Tokenizer,
    case: RerankCase,
    tokens_per_page: tuple[int, ...],
    *,
    short: bool = False,
    captions: float = 1.0,
) -> Example:
    """Encode a case with its target.

    ``tokens_per_page`` counts the image pads of each page; empty leaves the pages out, as the
    text-only matching stage wants it. ``short`` drops the fixed instructions in front of the
    question. ``captions`` weighs the words that describe a page.
    """
    prompt = render(case.question, len(case.pages))
    if short:
        prompt = "<|im_start|>user" + prompt[prompt.index(QUESTION_MARK) :]
    if not tokens_per_page:
        first = prompt.index("\nImage 1: ")
        prompt = prompt[:first] + prompt[prompt.rindex("<|vision_end|>") + len("<|vision_end|>") :]
    target = case.answer() + "<|im_end|>"
    pad = tokenizer.token_to_id("<|image_pad|>")
    counts = iter(tokens_per_page)
    ids: list[int] = []
    for token in tokenizer.encode(prompt, add_special_tokens=False).ids:
        ids.extend([pad] * next(counts) if token == pad else [token])
    encoded = tokenizer.encode(target, add_special_tokens=False)
    weights = [0.0] * len(ids) + _target_weights(target, encoded.offsets, captions)
    return Example(torch.tensor(ids + encoded.ids), torch.tensor(weights))


def _target_weights(target: str, offsets: list[tuple[int, int]], captions: float) -> list[float]:
    by_char = [1.0] * len(target)
    for match in CAPTION.finditer(target):
        by_char[match.start(1) - 1 : match.end(1)] = [captions] * (len(match[1]) + 1)
        by_char[match.start(2) : match.end(2)] = [VERDICT_WEIGHT] * len(match[2])
    start = target.index("<answer>")
    for match in re.compile(r"\d").finditer(target, start):
        by_char[match.start()] = ID_WEIGHT
    return [max(by_char[a:b], default=0.0) for a, b in offsets]
