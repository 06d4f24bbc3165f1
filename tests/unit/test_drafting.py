"""Drafting: proposals are the model's own way of writing, and change nothing that is decoded."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from threading import Barrier, Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from helpers.bpe import qwen_like_tokenizer
from helpers.qwen_ranks import bpe, vocabulary
from mmr5_runtime.drafting import TAIL_BYTES, Drafter, SuffixIndex
from mmr5_runtime.stopping.machine import AnswerMachine

ASSETS = resources.files("mmr5_runtime") / "assets"
END = 151_645  # `<|im_end|>` of Qwen; more than the small vocabularies have
NextToken = Callable[[Sequence[int]], int]


@cache
def mini_tokenizer() -> Tokenizer:
    return Tokenizer.from_str((ASSETS / "mini" / "tokenizer.json").read_text(encoding="utf-8"))


@cache
def recorded_answers() -> list[tuple[str, int]]:
    """Mini's own answers and how many pages each ranks."""
    lines = (ASSETS / "calibration" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["response"], len(row["pages"])) for row in rows]


@dataclass(frozen=True)
class Codec:
    """How text becomes tokens, and the bytes of one token."""

    encode: Callable[[str], list[int]]
    read: Callable[[int], bytes]


def codec(name: str) -> Codec:
    if name == "qwen":
        return Codec(bpe, lambda token: b"" if token == END else vocabulary()[token])
    tokenizer = mini_tokenizer() if name == "mini" else qwen_like_tokenizer()
    return Codec(
        lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids),
        lambda token: str(tokenizer.decode([token])).encode(),
    )


class Output:
    """What was decoded so far, as a decoder keeps it."""

    def __init__(self, codec: Codec, num_pages: int) -> None:
        self._codec = codec
        self.tokens: list[int] = []
        self.text = b""
        self.machine = AnswerMachine(num_pages)

    def append(self, token: int) -> None:
        data = self._codec.read(token)
        self.tokens.append(token)
        self.text += data
        self.machine.feed(data)

    def draft(self, drafter: Drafter) -> list[int]:
        return drafter.propose(self.tokens, self.machine, self.text)


def decode(choose: NextToken, output: Output, drafter: Drafter | None, limit: int = 2000) -> int:
    """Greedy decoding as the specification of draft and verify; the number of forward passes.

    One pass reads the last token and the draft, so the model's choice is known behind each of
    them; choices are kept up to and including the first that differs from the draft.
    """
    for passes in range(1, limit):
        draft = output.draft(drafter) if drafter else []
        for guess in [*draft, None]:
            token = choose(output.tokens)
            output.append(token)
            if token == END:
                return passes
            if token != guess or len(output.tokens) == limit:
                break
        if len(output.tokens) == limit:
            return passes
    return limit


def replay(ids: Sequence[int]) -> NextToken:
    """A model that writes ``ids`` and the end token."""
    return lambda tokens: [*ids, END][len(tokens)]


def proposal(text: str, num_pages: int, *, constrained: bool = False) -> str:
    """What the format proposes behind ``text``, as text; `$` is the end token."""
    small = codec("qwen-like")
    machine = AnswerMachine(num_pages, constrained=constrained)
    machine.feed(text.encode())
    drafter = Drafter(small.encode, [END], num_pages, None, max_tokens=1000)
    ids = drafter.from_format(machine, text.encode())
    assert ids == drafter.from_format(machine, text.encode()[-TAIL_BYTES:])
    return "".join("$" if i == END else small.read(i).decode() for i in ids)


OPEN = "<think>Why.</think><answer>["


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("<think>Page 2 fits", ""),
        ("<think>Page 2 <", ""),  # may be "less than"
        ("<think>Page 2 fits.</", "think><answer>["),
        ("<think>Page 2 fits.</thi", "nk><answer>["),
        ("<think>Why.</think>", "<answer>["),
        ("<think>Why.</think>\n", "<answer>["),
        ("<think>Why.</think><", "answer>["),
        ("<think>Why.</think><answer>", "["),
        ("<think>Why.</think>I mean ", ""),
        (OPEN, ""),
        (OPEN + "4", ", 1, 2, 3, 5]</answer>$"),
        (OPEN + "4,", " 1, 2, 3, 5]</answer>$"),
        (OPEN + "4, ", "1, 2, 3, 5]</answer>$"),
        (OPEN + "4, 2", ", 1, 3, 5]</answer>$"),
        (OPEN + "4, 2, 1, 3, 5", "]</answer>$"),
        (OPEN + "4, 2, 1, 3, 5,", ""),
        (OPEN + "4, 4", ""),
        (OPEN + "4, 9", ""),
        (OPEN + "4, 02", ""),
        (OPEN + "4, Image 2", ""),
        (OPEN + "4, 2]", "</answer>$"),
        (OPEN + "4, 2]</", "answer>$"),
        (OPEN + "4, 2]</answer>", "$"),
        (OPEN + "4, 2]</answer>\n", ""),
        (OPEN + "4, 2</answer>", ""),
    ],
)
@pytest.mark.parametrize("constrained", [False, True])
def test_the_format_proposes(text: str, expected: str, constrained: bool) -> None:
    assert proposal(text, 5, constrained=constrained) == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("1", ", 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]</answer>$"),
        ("1, 1", "0, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12]</answer>$"),
        ("1, 1 ", ""),  # repeated, and too late to become another
        ("12, 1", ", 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]</answer>$"),
        ("12, 10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1", "1]</answer>$"),
        ("12, 10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11", "]</answer>$"),
        ("12, 10, 11, 1", ", 2, 3, 4, 5, 6, 7, 8, 9]</answer>$"),
    ],
)
def test_ids_of_two_digits(written: str, expected: str) -> None:
    for constrained in (False, True):
        assert proposal(OPEN + written, 12, constrained=constrained) == expected


@pytest.mark.parametrize("name", ["qwen", "qwen-like", "mini"])
@pytest.mark.parametrize("num_pages", [2, 7, 23])
def test_a_proposal_is_the_tokenization_of_the_whole(name: str, num_pages: int) -> None:
    own = codec(name)
    order = [num_pages, *range(1, num_pages)]
    whole = [*own.encode(f"<think>Page {num_pages} fits.</think><answer>{order}</answer>"), END]
    output = Output(own, num_pages)
    drafter = Drafter(own.encode, [END], num_pages, None)
    proposed = 0
    for place, token in enumerate(whole):
        draft = drafter.from_format(output.machine, output.text)
        # Behind `[2` a 2 is likelier than the 23 of this answer.
        guessed_wrong = num_pages > 9 and output.text.endswith(b"[2")
        assert guessed_wrong or draft == whole[place : place + len(draft)]
        proposed += len(draft) > 0
        output.append(token)
    assert proposed >= 3 * (num_pages - 1)


def test_no_more_than_asked_for() -> None:
    mini = codec("mini")
    for most in (1, 2, 7):
        drafter = Drafter(mini.encode, [END], 9, SuffixIndex(), max_tokens=most)
        output = Output(mini, 9)
        for token in mini.encode(recorded_answers()[0][0] * 2):
            output.append(token)
            assert len(output.draft(drafter)) <= most


def test_asking_twice_gives_the_same() -> None:
    mini = codec("mini")
    output = Output(mini, 9)
    drafter = Drafter(mini.encode, [END], 9, None)
    for token in mini.encode("Image 1 shows a table.\nImage 2 shows a table."):
        output.append(token)
        assert output.draft(drafter) == output.draft(drafter)


def test_the_tail_is_written_in_a_few_passes() -> None:
    qwen = codec("qwen")
    order = [17, *range(1, 17), 18, 19, 20]
    whole = qwen.encode(f"<think>Why.</think><answer>{order}</answer>")
    output = Output(qwen, 20)
    passes = decode(replay(whole), output, Drafter(qwen.encode, [END], 20, None))
    assert output.tokens == [*whole, END]
    # `<think>Why`, the tags, `1`, wrongly continued `, 2`, then eight tokens a pass.
    begun = len(qwen.encode("<think>Why.</"))
    tail = len(whole) + 1 - len(qwen.encode("<think>Why.</think><answer>[17"))
    assert passes <= begun + 3 + -(-tail // 8)


PIECES = ["<think>", "</think>", "<answer>", "[", "]", "</answer>", ", ", ",", " ", "1", "2", "3"]
PIECES += ["Image ", "fits.", "<", "</", "\n", "x"]


@given(st.integers(0, 1 << 32), st.integers(1, 9), st.integers(1, 25), st.booleans())
@settings(max_examples=60)
def test_drafts_never_change_what_is_decoded(
    seed: int, most: int, num_pages: int, shared: bool
) -> None:
    small = codec("qwen-like")
    tokens_of_pieces = sorted({token for piece in PIECES for token in small.encode(piece)})

    def choose(tokens: Sequence[int]) -> int:
        """Depends on the last three tokens, so that it runs in circles; ends now and then."""
        chance = random.Random(hash((seed, *tokens[-3:])))
        if len(tokens) > 150 or chance.random() < 0.01:
            return END
        return chance.choice(tokens_of_pieces)

    plain = Output(small, num_pages)
    assert decode(choose, plain, None) == len(plain.tokens)
    history = SuffixIndex(100) if shared else None
    for _ in range(2):
        drafted = Output(small, num_pages)
        passes = decode(choose, drafted, Drafter(small.encode, [END], num_pages, history, most))
        assert drafted.tokens == plain.tokens
        assert passes <= len(plain.tokens)
        if history is not None:
            history.add(drafted.tokens)


def test_a_repeated_output_is_drafted_from_the_past() -> None:
    mini = codec("mini")
    text, num_pages = recorded_answers()[-1]
    ids = mini.encode(text)

    def passes(history: SuffixIndex) -> int:
        drafter = Drafter(mini.encode, [END], num_pages, history)
        return decode(replay(ids), Output(mini, num_pages), drafter)

    history = SuffixIndex()
    alone = passes(history)
    history.add([*ids, END])
    again = passes(history)
    assert again < alone < len(ids)
    # Two tokens are written before the past is asked, and drafts end with the tags and the list.
    assert again <= len(ids) // 8 + 4


def test_recorded_answers_take_a_third_of_the_passes() -> None:
    mini = codec("mini")
    history = SuffixIndex()
    tokens = passes = 0
    for text, num_pages in recorded_answers()[:60]:
        output = Output(mini, num_pages)
        drafter = Drafter(mini.encode, [END], num_pages, history)
        passes += decode(replay(mini.encode(text)), output, drafter)
        assert output.text.decode() == text
        tokens += len(output.tokens)
        history.add(output.tokens)
    assert passes * 3 < tokens


class Past:
    """What a SuffixIndex must answer, found by looking at every place."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.tokens = capacity, list[int]()

    def append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if len(self.tokens) >= self.capacity:
                self.tokens = self.tokens[len(self.tokens) - self.capacity // 2 :]
            self.tokens.append(token)

    def find(self, suffix: Sequence[int], count: int) -> tuple[int, list[int]]:
        for length in range(min(8, len(suffix)), 1, -1):
            for end in range(len(self.tokens) - 1, length - 1, -1):
                following = self.tokens[end : end + count]
                if self.tokens[end - length : end] == list(suffix[-length:]) and following[0] >= 0:
                    cut = following.index(-1) if -1 in following else count
                    return length, following[:cut]
        return 0, []


outputs = st.lists(st.integers(0, 3), max_size=14)


@given(st.lists(st.tuples(st.booleans(), outputs), max_size=8), outputs, st.integers(1, 40))
@settings(max_examples=150)
def test_the_index_finds_the_longest_and_newest(
    added: list[tuple[bool, list[int]]], suffix: list[int], capacity: int
) -> None:
    index, past = SuffixIndex(capacity), Past(capacity)
    for whole, tokens in added:
        if whole:
            index.add(tokens)
            past.append([-1, *tokens])
        else:
            index.extend(tokens)
            past.append(tokens)
    for count in (1, 3, 7):
        assert index.find(suffix, count) == past.find(suffix, count)
    assert index.find(suffix, 0) == (0, [])


def test_eight_tokens_are_compared() -> None:
    index = SuffixIndex()
    index.add([1, 2, 3, 4, 5, 6, 7, 8, 100])
    index.add([0, 2, 3, 4, 5, 6, 7, 8, 200])
    assert index.find([1, 2, 3, 4, 5, 6, 7, 8], 1) == (8, [100])
    assert index.find([2, 3, 4, 5, 6, 7, 8], 1) == (7, [200])
    index.add([0, 1, 2, 3, 4, 5, 6, 7, 8, 300])
    assert index.find([9, 1, 2, 3, 4, 5, 6, 7, 8], 1) == (8, [300])


def test_outputs_do_not_run_into_each_other() -> None:
    index = SuffixIndex()
    index.add([1, 2, 3])
    index.add([4, 5])
    assert index.find([2, 3], 5) == (0, [])
    assert index.find([3, 4], 5) == (0, [])
    assert index.find([1, 2], 5) == (2, [3])
    index.clear()
    assert index.find([1, 2], 5) == (0, [])


def test_the_index_is_shared_by_threads() -> None:
    index = SuffixIndex(200)
    failures: list[str] = []
    together = Barrier(4)

    def work(number: int) -> None:
        mine = [number * 100 + i for i in range(50)]
        together.wait()
        for _ in range(2000):
            try:
                index.add(mine)
                found = index.find(mine[:2], 3)
            except Exception as error:
                failures.append(repr(error))
                return
            # The beginning of the oldest output may be forgotten, never its middle.
            if found not in ((2, mine[2:5]), (0, [])):
                failures.append(f"{number}: {found}")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns within every call
    try:
        threads = [Thread(target=work, args=(number,)) for number in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
