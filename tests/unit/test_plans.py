"""Plans driven by judges that are perfect, wrong, or stop early."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmr5_runtime.lists.plans import (
    Order,
    Plan,
    Window,
    anchored,
    choose,
    single,
    sliding,
    tournament,
)
from mmr5_runtime.types import RequestError

Judge = Callable[[Window], Order]
Make = Callable[[int, int | None], Plan]


def drive(plan: Plan, judge: Judge) -> tuple[Order, list[list[Window]]]:
    """Runs a plan to its end: final order, and the windows of every round."""
    rounds = []
    try:
        windows = list(next(plan))
        while True:
            rounds.append(windows)
            windows = list(plan.send([judge(window) for window in windows]))
    except StopIteration as end:
        return end.value, rounds


def oracle(seed: int, n: int) -> tuple[Judge, Order]:
    """A judge that knows the true order of ``n`` candidates, and that order."""
    truth = random.Random(seed).sample(range(n), n)
    return lambda window: tuple(sorted(window.pages, key=truth.index)), tuple(truth)


def erratic(window: Window) -> Order:
    """Repeatable, but neither transitive nor related to any truth."""
    return tuple(random.Random(repr(window.pages)).sample(window.pages, len(window.pages)))


def hasty(window: Window) -> Order:
    """``erratic``, but what lies behind the places asked for stays as shown."""
    known = erratic(window)[: window.top]
    return (*known, *(page for page in window.pages if page not in known))


@st.composite
def plans(draw: st.DrawFn) -> tuple[str, int, Make]:
    """A plan with its window, as a function of the number of candidates and top_k."""
    kind = draw(st.sampled_from(["single", "sliding", "anchored", "tournament"]))
    if kind == "single":
        return kind, 1 << 20, single
    if kind == "sliding":
        window = draw(st.integers(2, 12))
        stride = draw(st.integers(1, window - 1))
        return kind, window, lambda n, k: sliding(n, window, stride, k)
    if kind == "anchored":
        window = draw(st.integers(3, 12))
        anchors = draw(st.integers(1, window - 2))
        return kind, window, lambda n, k: anchored(n, window, anchors, k)
    window = draw(st.integers(2, 12))
    return kind, window, lambda n, k: tournament(n, window, k)


sizes = st.integers(1, 90)
# Windows of two beside two anchors: the best of each go on until two are left.
MANY_ROUNDS = [49, 25, 13, 7, 4, 2, 1]


@given(plans(), sizes, st.none() | st.integers(1, 30))
def test_always_a_permutation_in_windows_of_one_size(
    made: tuple[str, int, Make], n: int, top_k: int | None
) -> None:
    _, size, make = made
    order, rounds = drive(make(n, top_k), erratic)
    assert sorted(order) == list(range(n))
    windows = [window for group in rounds for window in group]
    assert {len(window.pages) for window in windows} == {min(n, size)}
    for window in windows:
        assert len(set(window.pages)) == len(window.pages)
        assert window.top is None or 1 <= window.top < len(window.pages)


@given(plans(), sizes, st.integers(0, 9))
def test_the_true_best_comes_first(made: tuple[str, int, Make], n: int, seed: int) -> None:
    _, _, make = made
    judge, truth = oracle(seed, n)
    assert drive(make(n, None), judge)[0][0] == truth[0]


@given(st.integers(2, 12), st.data(), sizes, st.integers(0, 9))
def test_sliding_carries_the_true_best(window: int, data: st.DataObject, n: int, seed: int) -> None:
    stride = data.draw(st.integers(1, window - 1))
    judge, truth = oracle(seed, n)
    carried = window - stride
    assert drive(sliding(n, window, stride), judge)[0][:carried] == truth[:carried]


@given(st.integers(2, 12), sizes, st.integers(0, 9))
def test_tournament_keeps_the_better_half(window: int, n: int, seed: int) -> None:
    judge, truth = oracle(seed, n)
    half = window // 2
    assert drive(tournament(n, window), judge)[0][:half] == truth[:half]


@given(plans(), sizes, st.integers(1, 30))
def test_places_that_do_not_matter_do_not_matter(
    made: tuple[str, int, Make], n: int, top_k: int
) -> None:
    """A judge that stops at ``Window.top`` gives the first top_k of one that goes on."""
    _, _, make = made
    whole = drive(make(n, None), erratic)[0]
    assert drive(make(n, top_k), hasty)[0][:top_k] == whole[:top_k]


def test_top_k_is_used() -> None:
    _, rounds = drive(sliding(100, 20, 10, 5), hasty)
    assert [window.top for (window,) in rounds] == [10] * 8 + [5]
    _, rounds = drive(anchored(100, 20, 4, 5), hasty)
    assert {window.top for window in rounds[0]} == {None} and rounds[-1][0].top == 5
    _, rounds = drive(tournament(100, 20, 5), hasty)
    assert [{window.top for window in group} for group in rounds] == [{10}, {10}, {None}, {5}]


@pytest.mark.parametrize(
    ("make", "rounds"),
    [
        (lambda: single(100), [1]),
        (lambda: sliding(100, 20, 10), [1] * 9),
        (lambda: anchored(100, 20, 4), [6, 1]),
        (lambda: tournament(100, 20), [5, 3, 2, 1]),
        (lambda: sliding(21, 20, 10), [1, 1]),
        (lambda: anchored(21, 20, 4), [2, 1]),
        (lambda: tournament(21, 20), [2, 1]),
        (lambda: sliding(20, 20, 10), [1]),
        (lambda: anchored(20, 20, 4), [1]),
        (lambda: tournament(20, 20), [1]),
        (lambda: anchored(3, 20, 4), [1]),
    ],
)
def test_number_of_windows(make: Callable[[], Plan], rounds: list[int]) -> None:
    assert [len(group) for group in drive(make(), erratic)[1]] == rounds


@given(st.integers(2, 20), st.data(), st.integers(1, 300))
def test_sliding_windows_by_formula(window: int, data: st.DataObject, n: int) -> None:
    stride = data.draw(st.integers(1, window - 1))
    _, rounds = drive(sliding(n, window, stride), erratic)
    assert len(rounds) == max(0, math.ceil((n - window) / stride)) + 1


@given(st.integers(3, 20), st.data(), st.integers(1, 300))
def test_anchored_windows_by_formula(window: int, data: st.DataObject, n: int) -> None:
    anchors = data.draw(st.integers(1, window - 2))
    _, rounds = drive(anchored(n, window, anchors), erratic)
    if n <= window:
        assert [len(group) for group in rounds] == [1]
        return
    groups = math.ceil((n - anchors) / (window - anchors))
    assert len(rounds[0]) == groups
    assert len(rounds) == 2 or groups > window - anchors


@given(st.integers(3, 12), st.data(), sizes)
def test_every_anchored_window_begins_with_the_anchors(
    window: int, data: st.DataObject, n: int
) -> None:
    anchors = min(n, data.draw(st.integers(1, window - 2)))
    _, rounds = drive(anchored(n, window, anchors), erratic)
    heads = {shown.pages[:anchors] for group in rounds for shown in group}
    assert heads == {tuple(range(anchors))}


def test_sliding_moves_from_the_last_pages_to_the_first() -> None:
    order, rounds = drive(sliding(7, 4, 2), lambda window: window.pages[::-1])
    # The second window would begin at 1, the third at -1: it overlaps more instead.
    assert [window.pages for (window,) in rounds] == [(3, 4, 5, 6), (1, 2, 6, 5), (0, 5, 6, 2)]
    assert order == (2, 6, 5, 0, 1, 4, 3)


def test_anchored_selects_by_the_anchors_and_orders_the_rest_by_place() -> None:
    """Windows of 4 with one anchor (0): (1, 2, 3) and (4, 5, 6), three of them go on."""
    orders: dict[Order, Order] = {(0, 1, 2, 3): (1, 0, 2, 3), (0, 4, 5, 6): (6, 5, 4, 0)}
    shown = []

    def judge(window: Window) -> Order:
        shown.append(window.pages)
        return orders.get(window.pages, window.pages)

    order, _ = drive(anchored(7, 4, 1), judge)
    assert shown[-1] == (0, 1, 6, 5)  # before the anchor: 1 and 6 at place 0, then 5, then 4
    assert order == (0, 1, 6, 5, 2, 4, 3)  # 2 and 4 both at place 2, 3 at place 3


def test_tournament_fills_the_last_window_and_orders_by_round() -> None:
    order, rounds = drive(tournament(7, 4), lambda window: window.pages)
    first, second, *_ = rounds[0]
    assert (first.pages, second.pages) == ((0, 1, 2, 3), (3, 4, 5, 6))
    # 3 belongs to the first group, where it came last; its win in the second does not count.
    assert rounds[1][0].pages == (0, 1, 4, 2)
    assert order == (0, 1, 4, 2, 5, 3, 6)


@pytest.mark.parametrize(
    ("options", "name", "rounds"),
    [
        ({"name": "auto", "n": 30, "fits": 30}, "single", [1]),
        ({"name": "auto", "n": 31, "fits": 30}, "sliding", [1, 1, 1]),
        ({"name": "auto", "n": 31, "fits": 8}, "sliding", [1] * 7),  # windows of 8, half a step
        ({"name": "auto", "n": 30, "fits": 30, "window": 10}, "sliding", [1] * 5),
        ({"name": "auto", "n": 10, "fits": 30, "window": 10}, "single", [1]),
        ({"name": "auto", "n": 40, "fits": 30, "stride": 5}, "sliding", [1] * 5),
        ({"name": "auto", "n": 1, "fits": 1}, "single", [1]),
        ({"name": "single", "n": 50, "fits": 60}, "single", [1]),
        ({"name": "sliding", "n": 50, "fits": 60}, "sliding", [1] * 4),
        ({"name": "sliding", "n": 50, "fits": 60, "window": 50}, "single", [1]),
        ({"name": "anchored", "n": 100, "fits": 60}, "anchored", [6, 1]),
        ({"name": "anchored", "n": 100, "fits": 60, "window": 4}, "anchored", MANY_ROUNDS),
        ({"name": "anchored", "n": 2, "fits": 60}, "single", [1]),
        ({"name": "tournament", "n": 100, "fits": 25}, "tournament", [5, 3, 2, 1]),
    ],
)
def test_choice(options: dict[str, int | str], name: str, rounds: list[int]) -> None:
    chosen, plan = choose(**options)  # type: ignore[arg-type]
    assert chosen == name
    assert [len(group) for group in drive(plan, erratic)[1]] == rounds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "best"}, "plan='best' is unknown; pass auto, single"),
        ({"window": 1}, "window=1 compares nothing"),
        ({"window": 31}, "holds 30 of them; pass window=30 or lower max_pixels"),
        ({"name": "single"}, "shows all 100 pages at once and the context holds 30"),
        ({"fits": 1}, "does not hold two of the 100 pages"),
        ({"stride": 0}, "pass 1 to 19"),
        ({"stride": 20}, "stride=20 with windows of 20 pages"),
        ({"window": 8, "stride": 9}, "pass 1 to 7"),
        ({"name": "anchored", "anchors": 19}, "pass 1 to 18"),
        ({"name": "anchored", "anchors": 0}, "anchors=0"),
        ({"name": "anchored", "window": 2}, "no room for anchors; pass window=3"),
        ({"name": "anchored", "fits": 2}, "lower max_pixels"),
        ({"name": "anchored", "stride": 5}, "stride=5 means nothing to plan='anchored'"),
        ({"name": "sliding", "anchors": 5}, "anchors=5 means nothing to plan='sliding'"),
        ({"name": "tournament", "stride": 5}, "stride=5 means nothing to plan='tournament'"),
        ({"name": "single", "window": 5}, "window=5 means nothing to plan='single'"),
    ],
)
def test_contradictions(options: dict[str, int | str], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        choose(**{"name": "auto", "n": 100, "fits": 30, **options})  # type: ignore[arg-type]
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sliding(9, 4, 4),
        lambda: sliding(9, 4, 0),
        lambda: anchored(9, 4, 3),
        lambda: tournament(9, 1),
    ],
)
def test_plans_refuse_before_they_begin(make: Callable[[], Plan]) -> None:
    with pytest.raises(RequestError):
        make()
