"""What the machine knows of an answer at each point of it."""

from __future__ import annotations

import pytest

from mmr5_runtime.stopping.machine import AnswerMachine, State

OPENED = b"<think>a</think><answer>["


def fed(data: bytes, num_pages: int, constrained: bool = False) -> AnswerMachine:
    machine = AnswerMachine(num_pages, constrained=constrained)
    machine.feed(data)
    return machine


@pytest.mark.parametrize(
    ("text", "state"),
    [
        (b"", "before"),
        (b"Well, <thi", "before"),
        (b"<think>Page 2", "think"),
        (b"<think>a<think>b", "think"),
        (b"<think>a</think", "think"),
        (b"<think>a</think>", "between"),
        (b"no opening tag</think>", "between"),
        (b"<think>a</think>\n<answer>", "between"),
        (b"<think>a</think><answer>\n \t", "between"),
        (b"<think>a</think><answer>3, 1</answer>", "between"),
        (b"<think>a</think><Answer>[3", "between"),
        (b"<think>a</think><answer>[", "list"),
        (b"<think>a</think><answer>\r\n [", "list"),
        (b"<think>a</think><answer> see <answer>[", "list"),
        (b"<think>a</think></think>b<answer>[3, <think>", "list"),
        (b"<think>a</think><answer>[3]", "closed"),
        (b"<think>a</think><answer>[3</answer>", "closed"),
        (b"<answer>[3]</answer>", "before"),
        (b"<think>a<answer>[3]</answer></think><answer>[3", "between"),
    ],
)
def test_state(text: bytes, state: State) -> None:
    assert fed(text, 5).state == state


@pytest.mark.parametrize(
    ("text", "held"),
    [
        (b"<think>a <", 1),
        (b"<think>a </", 2),
        (b"a</think", 7),
        (b"<think>a </thing", 0),
        (b"<think>a <</th", 4),
        (b"</thi</", 2),
        (b"<think", 0),
        (b"<think>a</think>b</th", 0),
        (b"<think>a</think><answer>[</", 0),
    ],
)
def test_pending_close_counts_the_bytes_of_a_tag_that_may_be_coming(text: bytes, held: int) -> None:
    assert fed(text, 5).pending_close == held


@pytest.mark.parametrize(
    ("listing", "ids", "repaired"),
    [
        (b"", (), False),
        (b"3", (), False),
        (b"3,", (3,), False),
        (b"3, 1, 2", (3, 1), False),
        (b"3, 1, 2]", (3, 1, 2), False),
        (b"3, 1, 2</answer>", (3, 1, 2), False),
        (b"3, , 2,]", (3, 2), False),
        (b" +3 , 0_1, \xd9\xa2 ]", (3, 1, 2), False),
        (b"3, 3, 1,", (3, 1), True),
        (b"3, 13, 0, -1, 1,", (3, 1), True),
        (b"Image 3, Image 1.5, Image 2,", (3, 2), True),
        (b"3 > 1 > 2]", (3, 1, 2), True),
        (b"[3], [1]", (3,), True),
        (b"\xff3, \xe2\x82, 1,", (3, 1), True),
        (b"1" * 5000 + b", 2,", (2,), True),
    ],
)
def test_pieces_are_read_at_their_delimiters(
    listing: bytes, ids: tuple[int, ...], repaired: bool
) -> None:
    machine = fed(OPENED + listing, 12)
    assert (machine.ids, machine.repaired) == (ids, repaired)


@pytest.mark.parametrize(
    ("listing", "num_pages", "ids"),
    [
        (b"3, 2", 5, (3, 2)),
        (b"3, 2", 20, (3,)),
        (b"3, 2 ", 20, (3, 2)),
        (b"3, 2", 19, (3, 2)),
        (b"20, 2", 20, (20,)),  # `20` again, or 2
        (b"3, Image 1", 12, (3,)),
        (b"3, Image 1 ", 12, (3, 1)),
        (b"3, 2</ans", 20, (3, 2)),
        (b"3, 2\xe2", 20, (3, 2)),
    ],
)
def test_the_last_piece_counts_at_the_end_unless_it_may_go_on(
    listing: bytes, num_pages: int, ids: tuple[int, ...]
) -> None:
    machine = fed(OPENED + listing, num_pages)
    machine.finish()
    assert machine.ids == ids
    machine.finish()
    assert machine.ids == ids


@pytest.mark.parametrize(
    ("listing", "num_pages", "ids"),
    [
        (b"3", 9, (3,)),
        (b"1", 9, (1,)),
        (b"1", 10, ()),
        (b"1 ", 10, ()),
        (b"1,", 10, (1,)),
        (b"10", 10, (10,)),
        (b"10, 1", 10, (10, 1)),
        (b"10, 11, 1", 12, (10, 11)),
        (b"10, 11, 12, 1", 12, (10, 11, 12, 1)),
        (b"1", 100, ()),
        (b"10", 100, ()),
        (b"100, 10", 100, (100, 10)),
        (b"2", 12, (2,)),
        (b"2, 2,", 12, (2,)),
    ],
)
def test_constrained_ids_count_once_nothing_unused_is_longer(
    listing: bytes, num_pages: int, ids: tuple[int, ...]
) -> None:
    assert fed(OPENED + listing, num_pages, constrained=True).ids == ids


@pytest.mark.parametrize(
    ("listing", "ids"),
    [
        (b'"3", 1,', (3, 1)),
        (b"Image 3, 1,", (3, 1)),
        (b"-3, 1,", (1,)),
        (b"25, 1,", (2, 1)),  # no mask lets a 5 follow
        (b"2x, 1,", (2, 1)),
    ],
)
def test_constrained_machine_survives_what_no_mask_lets_through(
    listing: bytes, ids: tuple[int, ...]
) -> None:
    machine = fed(OPENED + listing, 9, constrained=True)
    assert (machine.ids, machine.repaired) == (ids, True)


@pytest.mark.parametrize(
    ("listing", "num_pages", "determined"),
    [
        (b"", 2, False),
        (b"2", 2, False),  # 20 would be dropped
        (b"2,", 2, True),
        (b"4, 2, 1,", 5, False),
        (b"4, 2, 1, 5,", 5, True),
        (b"4, 2, 1, 1,", 5, False),
        (b"4, 2]", 5, True),
        (b"4, 2</answer>", 5, True),
        (b"]", 5, False),  # nothing was read, so another list may be
        (b"x]", 5, False),
        (b"", 1, True),
        (b"]", 1, True),
    ],
)
def test_determined(listing: bytes, num_pages: int, determined: bool) -> None:
    assert fed(OPENED + listing, num_pages).determined is determined


def test_constrained_list_is_determined_before_the_delimiter() -> None:
    assert fed(OPENED + b"2", 2, constrained=True).determined
    assert not fed(OPENED + b"4, 1, 2", 5, constrained=True).determined


@pytest.mark.parametrize(
    ("tail", "closed_by_tag"),
    [
        (b"]", False),
        (b"]</answer", False),
        (b"]</answer>", True),
        (b"] \n</answer>", True),
        (b"</answer>", True),
        (b"] done, see </answer> above", True),
        (b", </answer", False),
    ],
)
def test_closed_by_tag(tail: bytes, closed_by_tag: bool) -> None:
    assert fed(OPENED + b"2, 1" + tail, 3).closed_by_tag is closed_by_tag


def test_quoted_answer_leaves_everything_open() -> None:
    machine = fed(b"<think>say <answer>[3, 1, 2]</answer> then</think><answer>[1, 2, 3]", 3)
    assert machine.quoted
    assert machine.ids == () and not machine.determined and not machine.closed_by_tag
    assert not fed(b"<think>say <answer> [3]</think><answer>[1", 3).quoted
    assert not fed(b"</think><answer>[1</answer><answer>[1]", 3).quoted


def test_what_follows_the_list_is_ignored() -> None:
    machine = fed(OPENED + b"2, 1]</answer><answer>[3, 2, 1]</answer>", 3)
    assert machine.ids == (2, 1) and not machine.repaired


def test_a_copy_goes_its_own_way() -> None:
    machine = fed(OPENED + b"2, 1", 12)
    other = machine.copy()
    other.feed(b"1, 3]")
    machine.feed(b", 3,")
    assert other.ids == (2, 11, 3) and other.state == "closed"
    assert machine.ids == (2, 1, 3) and machine.state == "list"
