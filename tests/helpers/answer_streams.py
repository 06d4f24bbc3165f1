"""Random answers in the true vocabulary: plausible ones, hostile ones, and broken off anywhere."""

from __future__ import annotations

import random

from helpers.qwen_ranks import bpe, vocabulary

TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<answer>[", "]</answer>", "[", "]"]
NOISE = [
    *TAGS, "<", "</", "</thi", "<ans", "</ans", "><", "]>", "<Answer>", "\n", " ", ",", ", ", ";",
    "0", "-", "+1", "1_0", "1.5", "\u0663", "\uff0c", "Image 2", "x", "\u00e9", "99", "\r\n",
]  # fmt: skip
PAGE_COUNTS = [1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 20, 30]


def random_stream(rng: random.Random) -> tuple[int, list[int]]:
    """A page count and the tokens of an answer for it."""
    num_pages = rng.choice(PAGE_COUNTS)
    tokens = bpe(random_text(rng, num_pages))
    for _ in range(rng.choice([0, 0, 0, 1, 3])):  # half characters, merges no text would give
        tokens.insert(rng.randint(0, len(tokens)), rng.randrange(len(vocabulary())))
    if rng.random() < 0.3:
        tokens = tokens[: rng.randint(0, len(tokens))]
    return num_pages, tokens


def random_text(rng: random.Random, num_pages: int) -> str:
    """Mostly a reasoning and one or more lists, with damage; at times tags and noise alone."""
    if rng.random() < 0.15:
        return "".join(_noise(rng) for _ in range(rng.randint(0, 25)))
    pieces = [rng.choice(["<think>", "<think>", "", "\n<think>\n"])]
    pieces += [rng.choice(["Page 2 fits", ".", " a<b ", "</", "[1]"]) for _ in range(3)]
    if rng.random() < 0.1:
        pieces.append(random_answer(rng, num_pages))  # quoted
    pieces.append(rng.choice(["</think>", "</think>", "</think>", "\n</think>\n", ""]))
    pieces += [random_answer(rng, num_pages) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        pieces.insert(rng.randint(0, len(pieces)), _noise(rng))
    return "".join(pieces)


def random_answer(rng: random.Random, num_pages: int) -> str:
    """One tagged list with anything from no to all ids, well formed or not."""
    opening = rng.choice(["<answer>["] * 6 + ["<answer> [", "<answer>\n[", "<answer>", "["])
    closing = rng.choice(["]</answer>"] * 6 + ["]", "</answer>", "]\n</answer>", "], ", ""])
    numbers = list(range(1, num_pages + 1))
    rng.shuffle(numbers)
    ids = [str(number) for number in numbers[: rng.choice([num_pages, rng.randint(0, num_pages)])]]
    for _ in range(rng.choice([0, 0, 0, 1, 3])):  # repeated, unknown, or no number
        ids.insert(rng.randint(0, len(ids)), rng.choice([str(rng.randint(0, 60)), _noise(rng)]))
    return opening + rng.choice([", ", ", ", ",", " ,", ",\n"]).join(ids) + closing


def _noise(rng: random.Random) -> str:
    return rng.choice(NOISE) if rng.random() < 0.8 else str(rng.randint(0, 60))
