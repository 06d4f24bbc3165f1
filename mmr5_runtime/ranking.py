"""Windows of a request, one after the other, and the record of what they came to.

A plan yields rounds of windows; each window is one prompt, read and answered here, and its order
goes back into the plan. Most requests are one window.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from mmr5_runtime.agreement import kendall_tau
from mmr5_runtime.lists.plans import Plan, Window
from mmr5_runtime.request import Request
from mmr5_runtime.trtllm.answering import BundleRun
from mmr5_runtime.trtllm.model import BundleModel
from mmr5_runtime.types import ReasoningDelta, Stability, Status, WindowResult
from mmr5_runtime.window import Outcome, WindowRun

STATUSES: tuple[Status, ...] = ("ok", "repaired", "fallback")  # best first
BETWEEN_WINDOWS = "\n\n"


@dataclass
class Record:
    """What the windows of a request came to, in the order they ran."""

    outcomes: list[Outcome] = field(default_factory=list)
    windows: list[WindowResult] = field(default_factory=list)
    rounds: int = 0
    prompt_tokens: int = 0
    image_tokens: int = 0
    other_tokens: int = 0  # generated outside windows
    late: bool = False  # something outside windows was cut short by the deadline
    stability: Stability | None = None
    relevance: tuple[float | None, ...] | None = None
    answer: str | None = None


def run_plan(
    request: Request, plan: Plan, record: Record, pages: Sequence[int] | None = None
) -> Generator[ReasoningDelta, None, tuple[int, ...]]:
    """Run every window of ``plan``; its candidates are ``pages`` of the request, by default all.

    Returns the order as candidates of the request.
    """
    chosen = range(len(request.bank)) if pages is None else pages
    try:
        windows = next(plan)
        while True:
            orders = []
            for window in windows:
                shown = tuple(chosen[index] for index in window.pages)
                order = yield from run_window(request, Window(shown, window.top), record)
                orders.append(tuple(window.pages[place] for place in order))
            record.rounds += 1
            windows = plan.send(orders)
    except StopIteration as end:
        return tuple(chosen[index] for index in end.value)


def run_window(
    request: Request, window: Window, record: Record
) -> Generator[ReasoningDelta, None, tuple[int, ...]]:
    """Rank the pages of one prompt; returns their places in the window, best first."""
    if record.outcomes:
        yield ReasoningDelta(BETWEEN_WINDOWS)
    count = len(window.pages)
    if request.deadline.passed():
        outcome = Outcome.out_of_time(count)
    else:
        run = _open(request, window)
        record.prompt_tokens += len(run.token_ids)
        record.image_tokens += sum(request.bank.planned[index].tokens for index in window.pages)
        if not run.read():
            outcome = Outcome.out_of_time(count)
        elif request.options.samples is None:
            outcome = yield from run.answer()
        else:
            outcome = yield from _sample(
                run, request.options.samples, record, request.deadline.passed
            )
    record.outcomes.append(outcome)
    record.windows.append(
        WindowResult(
            pages=window.pages,
            order=tuple(window.pages[place] for place in outcome.order),
            round=record.rounds + 1,
            status=outcome.status,
            stop_reason=outcome.stop_reason,
            completion_tokens=outcome.completion_tokens,
        )
    )
    return outcome.order


def _open(request: Request, window: Window) -> WindowRun | BundleRun:
    """One prompt, for whoever reads and answers it."""
    kind = BundleRun if isinstance(request.loaded.engine.model, BundleModel) else WindowRun
    return kind(request, window.pages, window.top)


def _sample(
    run: WindowRun | BundleRun, count: int, record: Record, late: Callable[[], bool]
) -> Generator[ReasoningDelta, None, Outcome]:
    """Several answers to one prompt; the one nearest to their mean order speaks for them."""
    drawn = [_last(run.answer(0))]
    for seed_offset in range(1, count):
        if late():
            record.late = True
            break
        drawn.append(_last(run.answer(seed_offset)))
    pages = range(len(drawn[0].order))
    mean_place = [fmean(outcome.order.index(page) + 1 for outcome in drawn) for page in pages]
    order = tuple(sorted(pages, key=lambda page: (mean_place[page], page)))
    taus = [kendall_tau(order, outcome.order) for outcome in drawn]
    record.stability = Stability(
        orders=tuple(outcome.order for outcome in drawn),
        first=fmean(outcome.order[0] == order[0] for outcome in drawn),
        kendall_tau=fmean(taus),
        mean_place=tuple(mean_place),
    )
    speaker = drawn[taus.index(max(taus))]
    if speaker.reasoning:
        yield ReasoningDelta(speaker.reasoning)
    exact = speaker.list_logprob if speaker.order == order else ()
    return Outcome(
        order=order,
        status=max((outcome.status for outcome in drawn), key=STATUSES.index),
        stop_reason=speaker.stop_reason,
        text=speaker.text,
        reasoning=speaker.reasoning,
        reasoning_end=speaker.reasoning_end,
        exactness=[level for outcome in drawn for level in outcome.exactness],
        tokens_saved=sum(outcome.tokens_saved for outcome in drawn),
        interventions=sum(outcome.interventions for outcome in drawn),
        list_logprob=exact,
        completion_tokens=sum(outcome.completion_tokens for outcome in drawn),
        decode_steps=sum(outcome.decode_steps for outcome in drawn),
        draft_tokens=sum(outcome.draft_tokens for outcome in drawn),
        accepted_tokens=sum(outcome.accepted_tokens for outcome in drawn),
    )


def _last(answer: Generator[ReasoningDelta, None, Outcome]) -> Outcome:
    """Run an answer to its end without passing its reasoning on."""
    events: Iterator[ReasoningDelta] = answer
    while True:
        try:
            next(events)
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome
