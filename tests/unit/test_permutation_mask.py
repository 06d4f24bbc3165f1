"""The grammar of lists without repetition, and the tokens it leaves."""

from __future__ import annotations

import itertools
import random
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.qwen_ranks import bpe, vocabulary
from mmr5_runtime.stopping.machine import AnswerMachine
from mmr5_runtime.stopping.mask import PermutationMask
from mmr5_runtime.types import EngineError

CPU = torch.device("cpu")
OPENED = b"</think><answer>["
# All that a list may hold, from last resort to first choice, and what it may not.
BYTES = [bytes([byte]) for byte in b"\t\n ],0123456789"]
NEVER = [b"\r", b"-", b"+", b"_", b".", b"x", b"[", b"\xff", b"\x00", b"\xd9\xa3"]


def opened(num_pages: int, listing: bytes = b"") -> AnswerMachine:
    machine = AnswerMachine(num_pages, constrained=True)
    machine.feed(OPENED + listing)
    return machine


def words(num_pages: int) -> set[bytes]:
    """Every list without white space that the grammar has, up to and with the bracket."""
    numbers = range(1, num_pages + 1)
    return {
        b",".join(b"%d" % number for number in chosen) + b"]"
        for length in numbers
        for chosen in itertools.permutations(numbers, length)
    }


@pytest.mark.parametrize("num_pages", [1, 2, 3, 4])
def test_allows_exactly_the_beginnings_of_lists(num_pages: int) -> None:
    whole = words(num_pages)
    beginnings = {word[:length] for word in whole for length in range(len(word))}
    for written in beginnings:
        machine = opened(num_pages, written)
        for byte in [b"%d" % digit for digit in range(10)] + [b",", b"]", b"x", b"-", b"."]:
            possible = written + byte in beginnings | whole
            assert machine.allows(byte) is possible, (written, byte)


def test_allows_exactly_the_beginnings_of_lists_of_longer_numbers() -> None:
    """Ten to fourteen pages, the first nine but one already named."""
    whole = {
        b",".join(b"%d" % number for number in chosen) + b"]"
        for length in range(1, 7)
        for chosen in itertools.permutations([1, 10, 11, 12, 13, 14], length)
    }
    beginnings = {word[:length] for word in whole for length in range(len(word))}
    start = opened(14, b"2,3,4,5,6,7,8,9,")
    for written in sorted(beginnings)[::7]:
        machine = start.copy()
        machine.feed(written)
        for byte in [b"%d" % digit for digit in range(10)] + [b",", b"]"]:
            possible = written + byte in beginnings | whole
            assert machine.allows(byte) is possible, (written, byte)


@pytest.mark.parametrize(
    ("written", "data", "allowed"),
    [
        (b"", b"", False),
        (b"", b"    3", True),
        (b"", b"     3", False),
        (b"  ", b"   ", False),
        (b"", b"\n\t 3 \n\t ,", True),
        (b"", b"3 2", False),
        (b"3 ", b"2", False),
        (b"", b"\r3", False),
        (b"", b"]", False),
        (b"", b",", False),
        (b"3", b"]</answer> and so on", True),
        (b"3", b" ], 3, 3", True),
        (b"3,", b"]", False),
        (b"3,", b",", False),
        (b"3, ", b"3", False),
        (b"3", b", 1, 3", False),
        (b"3", b", 1, 2]", True),
        (b"3, 1, 2", b",", False),
        (b"3, 1, 2", b"\n]", True),
        (b"3", b"</answer>", False),
        # out of what no mask lets through
        (b"0", b",", True),
        (b"0", b"]", False),
        (b"0", b"3", False),
        (b"3, 7", b"]", True),
        (b"3, 7", b" ", False),
        (b"3, 1, 2,", b"]", True),
        (b"3, 1, 2, 1", b"]", True),
        (b"3, 1, 2, 1", b",", False),
    ],
)
def test_white_space_and_tokens_of_many_bytes(written: bytes, data: bytes, allowed: bool) -> None:
    assert opened(3, written).allows(data) is allowed


@given(st.integers(1, 30), st.randoms(use_true_random=False))
def test_sampling_single_bytes_always_ends_in_a_list(num_pages: int, rng: random.Random) -> None:
    """No dead end: from wherever bytes are picked at random, a bracket can be reached."""
    machine = opened(num_pages)
    text = b""
    while machine.state == "list":
        allowed = [byte for byte in BYTES if machine.allows(byte)]
        assert not any(machine.allows(byte) for byte in NEVER)
        digits = [byte for byte in allowed if byte.isdigit()]
        byte = rng.choice(rng.choice([allowed, digits or allowed]))
        machine.feed(byte)
        text += byte
    assert re.fullmatch(rb"\s{0,4}\d+\s{0,4}(,\s{0,4}\d+\s{0,4})*\]", text)
    ids = [int(piece) for piece in text[:-1].split(b",")]
    assert list(machine.ids) == ids == list(dict.fromkeys(ids))
    assert set(ids) <= set(range(1, num_pages + 1)) and not machine.repaired


@given(
    st.integers(1, 12),
    st.lists(st.sampled_from([b"1", b"12", b"0", b" ", b",", b"-", b'"', b"\xff"]), max_size=8),
)
def test_there_is_a_way_on_whatever_was_written(num_pages: int, pieces: list[bytes]) -> None:
    machine = opened(num_pages, b"".join(pieces))
    for _ in range(4 * num_pages + 8):
        if machine.state == "list":
            machine.feed([byte for byte in BYTES if machine.allows(byte)][-1])
    # A digit wherever one may stand names every page, and then the bracket comes; but a sign that
    # was there before makes another number of the digits behind it.
    assert machine.state == "closed"
    assert len(machine.ids) == num_pages or b"-" in pieces


def test_mask_is_what_the_grammar_says_of_every_token() -> None:
    mask = PermutationMask(vocabulary(), CPU)
    places = [(1, b""), (5, b"3, "), (12, b"1"), (20, b"3, 2"), (9, b"7\n"), (5, b'"')]
    for num_pages, written in places:
        machine = opened(num_pages, written)
        allows = machine.grammar_key.allows
        expected = [token for token, data in enumerate(vocabulary()) if allows(data)]
        assert mask.allowed(machine).tolist() == expected
        assert mask.allowed(machine).dtype == torch.int64


def test_canonical_lists_are_never_touched() -> None:
    mask = PermutationMask(vocabulary(), CPU)
    rng = random.Random(5)
    for number in range(120):
        num_pages = rng.choice([1, 2, 5, 9, 10, 12, 20])
        ids = rng.sample(
            range(1, num_pages + 1), rng.choice([num_pages, rng.randint(1, num_pages)])
        )
        listing = rng.choice([", ", ",", " , ", ",\n"]).join(map(str, ids))
        machine = AnswerMachine(num_pages, constrained=True)
        in_list = 0
        for token in bpe(f"<think>Page 2.</think><answer>[{listing}]</answer>"):
            data = vocabulary()[token]
            if machine.state == "list":
                assert machine.allows(data), (listing, data)
                assert number > 30 or token in mask.allowed(machine)
                in_list += 1
            machine.feed(data)
        assert in_list >= 2 * len(ids)
        assert list(machine.ids) == ids and machine.closed_by_tag and not machine.repaired


def test_equal_keys_allow_the_same() -> None:
    first, second = opened(12, b"3, 1, 2"), opened(12, b" 1,3,\n2")
    assert first.grammar_key == second.grammar_key
    mask = PermutationMask(vocabulary(), CPU)
    assert mask.allowed(first) is mask.allowed(second)
    assert first.grammar_key != opened(12, b"3, 2, 1").grammar_key
    assert first.grammar_key != opened(13, b"3, 1, 2").grammar_key


def test_vocabulary_without_the_comma_is_refused() -> None:
    with pytest.raises(EngineError, match="no token for ','"):
        PermutationMask([data for data in vocabulary() if data != b","], CPU)
