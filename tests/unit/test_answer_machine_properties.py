"""Twelve thousand random token streams: what the machine says early is what the end confirms.

Each seed is one stream of tokens of Qwen's true vocabulary, where ``]</``, ``><``, ``></``, ``>[``
and ``>\\n`` are single tokens, broken off anywhere.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cache

import pytest

from helpers.answer_streams import random_answer, random_stream, random_text
from helpers.qwen_ranks import bpe, vocabulary
from helpers.reference_parser import listed_ids, reference_order, skips_a_list
from mmr5_runtime.answer import order_of, parse_answer
from mmr5_runtime.stopping.machine import AnswerMachine

STREAMS, CONSTRAINED, BATCHES = 10_000, 2_000, 4


def joined(tokens: Sequence[int]) -> bytes:
    return b"".join(vocabulary()[token] for token in tokens)


def decoded(tokens: Sequence[int]) -> str:
    return joined(tokens).decode("utf-8", "replace")


def view(machine: AnswerMachine) -> tuple[object, ...]:
    """Everything the machine says."""
    return (
        machine.state,
        machine.ids,
        machine.repaired,
        machine.quoted,
        machine.determined,
        machine.closed_by_tag,
        machine.pending_close,
        machine.grammar_key if machine.state == "list" else None,
    )


def fed(tokens: Sequence[int], num_pages: int, constrained: bool = False) -> AnswerMachine:
    machine = AnswerMachine(num_pages, constrained=constrained)
    for token in tokens:
        machine.feed(vocabulary()[token])
    return machine


def confirm(machine: AnswerMachine, tokens: Sequence[int], num_pages: int) -> None:
    """What ``machine`` knows of the order is so in the whole answer ``tokens``."""
    order = parse_answer(decoded(tokens), num_pages).order
    assert order[: len(machine.ids)] == tuple(number - 1 for number in machine.ids)
    if machine.determined:
        assert order == order_of(machine.ids, num_pages)


def continuations(rng: random.Random, num_pages: int) -> list[list[int]]:
    """What may follow any point of an answer: another list, other text, any tokens at all."""
    return [
        bpe(random_answer(rng, num_pages)),
        bpe(rng.choice(["", "]", "</answer>", "]</answer>"]) + random_text(rng, num_pages)),
        [rng.randrange(len(vocabulary())) for _ in range(5)],
    ]


def check_stream(seed: int) -> AnswerMachine:
    rng = random.Random(seed)
    num_pages, tokens = random_stream(rng)
    machine = AnswerMachine(num_pages)
    known, determined = 0, False
    for place, token in enumerate(tokens):
        machine.feed(vocabulary()[token])
        if machine.determined > determined or len(machine.ids) > known:
            determined, known = machine.determined, len(machine.ids)
            confirm(machine, tokens, num_pages)
            if machine.determined or rng.random() < 0.2:
                for other in continuations(rng, num_pages):
                    confirm(machine, [*tokens[: place + 1], *other], num_pages)
    text = decoded(tokens)
    check_splits(rng, machine, num_pages, joined(tokens))
    assert list(machine.ids) == listed_ids(text, num_pages)
    machine.finish()
    parsed = parse_answer(text, num_pages)
    if machine.ids:
        assert order_of(machine.ids, num_pages) == parsed.order
    expected = reference_order(text, num_pages)
    if expected is None:
        assert parsed.status != "ok"
    elif not (skips_a_list(text) and machine.ids):
        assert parsed.order == tuple(dict.fromkeys(expected))
    return machine


def check_splits(rng: random.Random, machine: AnswerMachine, num_pages: int, data: bytes) -> None:
    """Any split of the bytes, also within a character, gives the same; so does none."""
    places = sorted(rng.randint(0, len(data)) for _ in range(rng.choice([0, 2, 8])))
    for constrained in (False, True):
        whole = AnswerMachine(num_pages, constrained=constrained)
        whole.feed(data)
        parts = AnswerMachine(num_pages, constrained=constrained)
        for start, end in zip([0, *places], [*places, len(data)], strict=True):
            parts.feed(data[start:end])
        assert view(parts) == view(whole)
        parts.finish()
        whole.finish()
        assert view(parts) == view(whole)
        if not constrained:
            whole = AnswerMachine(num_pages)
            whole.feed(data)
            assert view(machine) == view(whole)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_what_is_known_early_is_confirmed(batch: int) -> None:
    machines = [check_stream(seed) for seed in range(batch, STREAMS, BATCHES)]
    # The streams reach every part of an answer.
    for reached in ("before", "think", "between", "list", "closed"):
        assert sum(machine.state == reached for machine in machines) > 20
    for count in (
        sum(machine.determined for machine in machines),
        sum(machine.repaired for machine in machines),
        sum(machine.quoted for machine in machines),
        sum(machine.closed_by_tag for machine in machines),
        sum(len(machine.ids) > 9 for machine in machines),
    ):
        assert count > 100


@cache
def list_tokens() -> list[int]:
    """Delimiters, white space, and brackets with anything behind them."""
    starts = re.compile(rb"[ \n\t,]*(\]|\Z)")
    return [token for token, data in enumerate(vocabulary()[:20_000]) if starts.match(data)]


def sample_list(rng: random.Random, machine: AnswerMachine) -> list[int]:
    """Tokens that the grammar allows, picked at random until the list ends."""
    likely = [*bpe("0123456789,  ,"), *bpe("]</answer>")[:1]]
    tokens: list[int] = []
    while machine.state == "list":
        token = rng.choice(likely if rng.random() < 0.95 else list_tokens())
        if machine.allows(vocabulary()[token]):
            machine.feed(vocabulary()[token])
            tokens.append(token)
    return tokens


@pytest.mark.parametrize("batch", range(BATCHES))
def test_constrained_lists_are_known_even_earlier(batch: int) -> None:
    for seed in range(batch, CONSTRAINED, BATCHES):
        rng = random.Random(seed)
        num_pages = rng.choice([1, 2, 3, 5, 9, 10, 12, 20, 25])
        opening = bpe("<think>Page 2.</think>" + rng.choice(["<answer>[", "\n<answer> ["]))
        machine = fed(opening, num_pages, constrained=True)
        listing = sample_list(rng, machine)
        tokens = [*opening, *listing]
        assert machine.determined and not machine.repaired and len(machine.ids) >= 1
        confirm(machine, [*tokens, *rng.choice(continuations(rng, num_pages))], num_pages)
        place = rng.randint(0, len(listing))
        early = fed([*opening, *listing[:place]], num_pages, constrained=True)
        confirm(early, tokens, num_pages)
        other = [*opening, *listing[:place], *sample_list(rng, early.copy())]
        confirm(early, other, num_pages)
        late = fed([*opening, *listing[:place]], num_pages)
        assert early.ids[: len(late.ids)] == late.ids
        assert len(early.ids) - len(late.ids) <= 1
