"""Greedy answers remembered step by step: what is recalled is what was decoded, with its KV."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from helpers.tiny import tiny_pair
from mmr5_runtime.cursor import Cursor, Mark
from mmr5_runtime.engine import Engine
from mmr5_runtime.replies import Replay, Replies, Step
from mmr5_runtime.reuse.segments import SegmentStore

CPU = torch.device("cpu")
HEAD, PROMPT = b"h" * 32, b"p" * 32
HEAD_IDS, TAIL_IDS = [5, 6, 7, 8], [9, 10]
GIB = 1 << 30


@pytest.fixture
def engine() -> Engine:
    return Engine(tiny_pair("three_heads")[1], CPU)


@pytest.fixture
def store(engine: Engine) -> SegmentStore:
    return _store(engine, GIB)


def _store(engine: Engine, limit: int) -> SegmentStore:
    """A store with the last page of a prompt in it, behind which replies hang."""
    store = SegmentStore(limit, CPU)
    cursor = Cursor(engine, 16)
    cursor.read(HEAD_IDS)
    store.insert(HEAD, None, *cursor.arena.view(0, len(HEAD_IDS)), cost_ms=1.0)
    return store


def _behind_prompt(engine: Engine) -> tuple[Cursor, Mark]:
    cursor = Cursor(engine, 64)
    cursor.read(HEAD_IDS)
    cursor.read(TAIL_IDS)
    return cursor, cursor.mark


def _write(cursor: Cursor, steps: Sequence[Step], done: int = 0) -> None:
    """Read all of ``steps`` but the last, as decoding does, from the ``done``-th on."""
    for step in steps[done:-1]:
        cursor.step([step.token])


def _steps(count: int, first: int = 20) -> list[Step]:
    return [Step(first + i, -0.1 * i if i % 2 else None, i == 3) for i in range(count)]


def _remember(engine: Engine, replies: Replies, steps: Sequence[Step]) -> None:
    cursor, prompt = _behind_prompt(engine)
    _write(cursor, steps)
    replies.remember(steps, cursor, prompt, cost_ms=10.0)


def _recalled(replies: Replies) -> Replay:
    replay = replies.recall()
    assert replay is not None
    return replay


def test_nothing_is_recalled_of_nothing(store: SegmentStore) -> None:
    assert Replies(store, PROMPT, HEAD, "greedy").recall() is None


def test_steps_come_back_as_they_were(engine: Engine, store: SegmentStore) -> None:
    replies, steps = Replies(store, PROMPT, HEAD, "greedy"), _steps(6)
    _remember(engine, replies, steps)
    assert list(_recalled(replies).steps) == steps


def test_going_on_gives_the_bits_of_one_run(engine: Engine, store: SegmentStore) -> None:
    """An answer in three requests, each of which loads what the others left."""
    replies, steps = Replies(store, PROMPT, HEAD, "greedy"), _steps(12)
    once, prompt = _behind_prompt(engine)
    rows = [once.step([step.token]) for step in steps]
    for end in (4, 5, 12):
        cursor, start = _behind_prompt(engine)
        done = 0
        if replay := replies.recall():
            replay.load(cursor)
            done = len(replay.steps) - 1
            assert cursor.mark == Mark(start.length + done, start.position + done)
        _write(cursor, steps[:end], done)
        replies.remember(steps[:end], cursor, start, cost_ms=10.0)
    assert len(_recalled(replies).nodes) == 3
    cursor, start = _behind_prompt(engine)
    _recalled(replies).load(cursor)
    assert torch.equal(cursor.step([steps[-1].token]), rows[-1])
    for ours, whole in zip(
        cursor.arena.view(start.length, cursor.mark.length),
        once.arena.view(prompt.length, once.mark.length),
        strict=True,
    ):
        assert torch.equal(ours, whole)


def test_a_draft_read_too_far_is_not_kept(engine: Engine, store: SegmentStore) -> None:
    replies, steps = Replies(store, PROMPT, HEAD, "draft"), _steps(4)
    cursor, prompt = _behind_prompt(engine)
    cursor.step([step.token for step in steps])
    cursor.step([1, 2, 3])  # guesses that were not chosen
    replies.remember(steps, cursor, prompt, cost_ms=1.0)
    [node] = _recalled(replies).nodes
    assert node.k.shape[2] == 3
    assert torch.equal(node.k, cursor.arena.view(prompt.length, prompt.length + 3)[0])


def test_an_answer_of_one_token_leaves_nothing(engine: Engine, store: SegmentStore) -> None:
    replies = Replies(store, PROMPT, HEAD, "greedy")
    _remember(engine, replies, _steps(1))  # it was never read
    assert replies.recall() is None


def test_less_than_is_known_adds_nothing(engine: Engine, store: SegmentStore) -> None:
    replies = Replies(store, PROMPT, HEAD, "greedy")
    _remember(engine, replies, _steps(6))
    _remember(engine, replies, _steps(6))
    _remember(engine, replies, _steps(3))
    assert len(_recalled(replies).nodes) == 1
    # A request that ended inside the replay never loaded anything.
    cursor, prompt = _behind_prompt(engine)
    replies.remember(_steps(2), cursor, prompt, cost_ms=1.0)
    assert list(_recalled(replies).steps) == _steps(6)


@pytest.mark.parametrize(
    "other",
    [
        lambda store: Replies(store, PROMPT, HEAD, "greedy constrain=False"),
        lambda store: Replies(store, b"q" * 32, HEAD, "greedy"),
    ],
    ids=["way of decoding", "prompt"],
)
def test_answers_are_kept_apart(
    engine: Engine, store: SegmentStore, other: Callable[[SegmentStore], Replies]
) -> None:
    _remember(engine, Replies(store, PROMPT, HEAD, "greedy"), _steps(5))
    assert other(store).recall() is None
    _remember(engine, other(store), _steps(5, first=40))
    assert _recalled(other(store)).steps[0].token == 40
    assert _recalled(Replies(store, PROMPT, HEAD, "greedy")).steps[0].token == 20


def test_two_streams_of_the_same_answer(engine: Engine, store: SegmentStore) -> None:
    """Both began before either had anything to recall; the longer one adds the rest."""
    replies, steps = Replies(store, PROMPT, HEAD, "greedy"), _steps(9)
    cursors = [_behind_prompt(engine) for _ in range(2)]
    for (cursor, prompt), end in zip(cursors, (5, 9), strict=True):
        _write(cursor, steps[:end])
        replies.remember(steps[:end], cursor, prompt, cost_ms=1.0)
    assert list(_recalled(replies).steps) == steps
    cursor, _ = _behind_prompt(engine)
    _recalled(replies).load(cursor)
    assert torch.equal(
        cursor.arena.view(0, cursor.mark.length)[0],
        cursors[1][0].arena.view(0, cursor.mark.length)[0],
    )


def test_answers_that_differ_are_not_joined(engine: Engine, store: SegmentStore) -> None:
    """With drafts, two runs may part at a tie: no answer is made of one's start and other's end."""
    replies, one = Replies(store, PROMPT, HEAD, "draft"), _steps(5)
    other = [*_steps(3), *_steps(6, first=60)]
    _remember(engine, replies, one)
    _remember(engine, replies, other)
    recalled = list(_recalled(replies).steps)
    assert recalled in (one, other)


def test_looking_for_more_of_an_answer_is_no_miss(engine: Engine, store: SegmentStore) -> None:
    replies = Replies(store, PROMPT, HEAD, "greedy")
    before = store.stats()
    assert replies.recall() is None
    for end in (4, 8):
        _remember(engine, replies, _steps(end))
        assert len(_recalled(replies).steps) == end
    after = store.stats()
    assert after.entries == before.entries + 2
    assert (after.hits, after.misses) == (before.hits, before.misses)


def test_no_room_is_no_error(engine: Engine) -> None:
    replies = Replies(SegmentStore(0, CPU), PROMPT, HEAD, "greedy")
    _remember(engine, replies, _steps(5))
    assert replies.recall() is None


def test_the_last_part_leaves_first(engine: Engine) -> None:
    text = engine.spec.text
    token = 2 * text.num_layers * text.num_kv_heads * text.head_dim * 4
    store = _store(engine, 24 * token)
    replies, steps = Replies(store, PROMPT, HEAD, "greedy"), _steps(12)
    for end in (5, 9, 12):  # 4 + 4 + 4 + 3 tokens with the head
        _remember(engine, replies, steps[:end])
    cursor = Cursor(engine, 16)
    cursor.read(list(range(11)))
    store.insert(b"x" * 32, None, *cursor.arena.view(0, 11), cost_ms=1e9)
    recalled = list(_recalled(replies).steps)
    assert len(recalled) < 12 and recalled == steps[: len(recalled)]
