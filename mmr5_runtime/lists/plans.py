"""Which pages are ranked together when a list is longer than one prompt.

A plan is a generator: it yields rounds of windows, is sent the order that the model gave each
window of the round, and returns the final order of all candidates. It never sees a page or a score.

Every window of a plan shows the same number of pages. That number stands in the prompt in front of
the pages, so another one would change every token after it, and the model would be asked lists of
different lengths; the last window of a row overlaps its neighbour more instead of being shorter.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mmr5_runtime.types import PlanName, RequestError

DEFAULT_WINDOW = 20
DEFAULT_ANCHORS = 4

Order = tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """Candidates (0-based) of one prompt, in the order shown.

    ``top`` is how many of the best places decide anything: the order behind them may be whatever is
    at hand and the first ``top_k`` of the final order stay the same. None: all of them matter.
    """

    pages: Order
    top: int | None = None


# Yields windows that do not depend on each other, is sent their orders (each a permutation of its
# window's pages), returns the order of all candidates.
Plan = Generator[Sequence[Window], Sequence[Order], Order]


def choose(
    name: str,
    n: int,
    fits: int,
    window: int | None = None,
    stride: int | None = None,
    anchors: int | None = None,
    top_k: int | None = None,
) -> tuple[PlanName, Plan]:
    """The plan for ``n`` candidates of which ``fits`` at a time fit the context.

    ``name`` is auto, single, sliding, anchored or tournament. ``window`` is the most pages of one
    prompt; by default 20, or as many as fit. "auto" ranks all pages in one prompt where they fit
    (and ``window``, if given, allows it), and slides otherwise. ``stride`` (for sliding; default:
    half the window) and ``anchors`` (for anchored; default: 4, fewer in windows under 6) are
    refused elsewhere.

    Returns the plan and what it is: "single" whenever one window holds all candidates.
    Raises RequestError for an unknown name, a number out of range and options that contradict.
    """
    if name not in ("auto", "single", "sliding", "anchored", "tournament"):
        raise RequestError(
            f"plan={name!r} is unknown; pass auto, single, sliding, anchored or tournament."
        )
    _refuse_strangers(name, window, stride, anchors)
    if window is not None and window < 2:
        raise RequestError(f"window={window} compares nothing; pass 2 or more pages per window.")
    if fits < 2 <= n:
        raise RequestError(
            f"the context does not hold two of the {n} pages, so nothing can be compared; lower "
            "max_pixels."
        )
    if window is not None and window > fits and n > fits:
        raise RequestError(
            f"window={window} pages do not fit the context, which holds {fits} of them; pass "
            f"window={fits} or lower max_pixels."
        )
    if name == "single" and n > fits:
        raise RequestError(
            f"plan='single' shows all {n} pages at once and the context holds {fits} of them; "
            "pass plan='auto' or lower max_pixels."
        )
    size = window if window is not None else min(DEFAULT_WINDOW, fits)
    if stride is not None:
        _check_stride(size, stride)
    if name == "anchored" and (anchors is not None or n > size):
        anchors = anchors if anchors is not None else min(DEFAULT_ANCHORS, size - 2)
        _check_anchors(size, anchors)
    everything_fits = name in ("auto", "single") and n <= fits and (window is None or n <= window)
    if n <= size or everything_fits:
        return "single", single(n, top_k)
    if name == "anchored":
        assert anchors is not None
        return "anchored", anchored(n, size, anchors, top_k)
    if name == "tournament":
        return "tournament", tournament(n, size, top_k)
    return "sliding", sliding(n, size, stride if stride is not None else size // 2, top_k)


def _refuse_strangers(
    name: str, window: int | None, stride: int | None, anchors: int | None
) -> None:
    used: Mapping[str, tuple[str, ...]] = {
        "auto": ("window", "stride"),
        "single": (),
        "sliding": ("window", "stride"),
        "anchored": ("window", "anchors"),
        "tournament": ("window",),
    }
    given = {"window": window, "stride": stride, "anchors": anchors}
    for option, value in given.items():
        if value is not None and option not in used[name]:
            raise RequestError(f"{option}={value} means nothing to plan={name!r}; leave it out.")


def _check_stride(window: int, stride: int) -> None:
    if not 1 <= stride < window:
        raise RequestError(
            f"stride={stride} with windows of {window} pages carries nothing from one window to "
            f"the next; pass 1 to {window - 1}."
        )


def _check_anchors(window: int, anchors: int) -> None:
    if window < 3:
        raise RequestError(
            f"windows of {window} pages have no room for anchors; pass window=3 or more (lower "
            "max_pixels if they do not fit) or plan='sliding'."
        )
    if not 1 <= anchors < window - 1:
        raise RequestError(
            f"anchors={anchors} in windows of {window} pages leave no two other pages to compare; "
            f"pass 1 to {window - 2}."
        )


def single(n: int, top_k: int | None = None) -> Plan:
    """All candidates in one window."""
    (order,) = yield [_window(range(n), top_k)]
    return order


def sliding(n: int, window: int = 20, stride: int = 10, top_k: int | None = None) -> Plan:
    """A window that moves from the last candidates to the first (RankGPT, arXiv 2304.09542).

    Each round is one window; its best ``window - stride`` are carried into the next, so that many
    of the true best come first when every window is ordered rightly. ceil((n - window) / stride) +
    1 windows. Raises RequestError for a stride out of 1..window - 1.
    """
    _check_stride(window, stride)
    return _sliding(n, min(window, n), stride, top_k)


def _sliding(n: int, window: int, stride: int, top_k: int | None) -> Plan:
    order = list(range(n))
    starts = [*range(n - window, 0, -stride), 0]
    for position, start in enumerate(starts):
        carried = starts[position + 1] + window - start if start else 0
        # Places that no later window shows again count only where they are among the top_k.
        top = None if top_k is None else max(carried, min(top_k - start, window))
        (ranked,) = yield [_window(order[start : start + window], top)]
        order[start : start + window] = ranked
    return tuple(order)


def anchored(n: int, window: int = 20, anchors: int = 4, top_k: int | None = None) -> Plan:
    """Windows that all begin with the same pages, then one with the best of each.

    The first ``anchors`` candidates head every window in the same order: their keys and values
    are computed once, the windows do not wait for each other, and the places next to the anchors
    make windows comparable. The last window shows the anchors and the pages that stood best by
    (anchors before it, place in its window, input order); what is left out follows by (place in
    its window, input order). ceil((n - anchors) / (window - anchors)) + 1 windows in 2 rounds.

    Lists so long that the last window cannot show the best of every window take another round of
    windows over the best of each. Raises RequestError for anchors out of 1..window - 2.
    """
    _check_anchors(window, anchors)
    return _anchored(n, window, anchors, top_k)


def _anchored(n: int, window: int, anchors: int, top_k: int | None) -> Plan:
    heads, room = tuple(range(min(anchors, n))), window - anchors
    pool = list(range(len(heads), n))  # never holds an anchor
    rest: list[int] = []
    while len(pool) > room:
        groups = [heads + group for group in _groups(pool, room)]
        orders = yield [Window(group) for group in groups]
        place = _first_places(orders)
        ahead = {
            page: sum(order.index(head) < order.index(page) for head in heads)
            for order in reversed(orders)
            for page in order
        }
        # Candidates before all anchors and first of their window: any of them may be the best.
        keep = max(len(groups), room)
        pool.sort(key=lambda page: (ahead[page], place[page], page))
        pool, left = pool[:keep], pool[keep:]
        rest = sorted(left, key=lambda page: (place[page], page)) + rest
        if len(pool) > room:
            pool.sort()
    (order,) = yield [_window((*heads, *pool), top_k)]
    return (*order, *rest)


def tournament(n: int, window: int = 20, top_k: int | None = None) -> Plan:
    """Groups whose better half goes on, until one window is left.

    The last window is filled up with the best of those that dropped out in the round before. Who
    is left out follows by the round reached, the place in the group, and input order. About
    2 n / window windows in log2(n / window) + 1 rounds. Raises RequestError for window < 2.
    """
    if window < 2:
        raise RequestError(f"window={window} compares nothing; pass 2 or more pages per window.")
    return _tournament(n, window, top_k)


def _tournament(n: int, window: int, top_k: int | None) -> Plan:
    half = window // 2
    pool, rest = list(range(n)), list[int]()
    while len(pool) > window:
        groups = _groups(pool, window)
        # Losers' places do not reach the top_k unless they fill up the last window.
        fills = (len(groups) - 1) * half < window
        top = None if top_k is None or top_k > window or fills else half
        place = _first_places((yield [_window(group, top) for group in groups]))
        standing = sorted(pool, key=lambda page: (place[page], page))
        count = sum(place[page] < half for page in pool)
        if count <= window:
            pool, rest = standing[:window], standing[window:] + rest
        else:
            pool, rest = sorted(standing[:count]), standing[count:] + rest
    (order,) = yield [_window(pool, top_k)]
    return (*order, *rest)


def _window(pages: Iterable[int], top: int | None) -> Window:
    shown = tuple(pages)
    return Window(shown, top if top is not None and top < len(shown) else None)


def _groups(pool: Sequence[int], size: int) -> list[Order]:
    """Consecutive groups of exactly ``size``; the last one overlaps the one before it."""
    starts = [*range(0, len(pool) - size, size), len(pool) - size]
    return [tuple(pool[start : start + size]) for start in starts]


def _first_places(orders: Sequence[Order]) -> dict[int, int]:
    """Place of every page in its own window: the first that shows it."""
    return {page: place for order in reversed(orders) for place, page in enumerate(order)}
