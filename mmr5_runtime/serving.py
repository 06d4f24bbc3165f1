"""A request from its plan to its result."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

from mmr5_runtime.cascade import answer, cascade
from mmr5_runtime.exhaustion import within_memory
from mmr5_runtime.ranking import BETWEEN_WINDOWS, STATUSES, Record, run_plan
from mmr5_runtime.request import Request
from mmr5_runtime.types import PlanUse, RerankResult, StreamEvent, Usage, weakest


def serve(request: Request) -> Generator[StreamEvent, None, None]:
    """Yield the reasoning as it is decoded, then the result."""
    # Pages may be in the making when time is over or the caller leaves.
    with closing(request.bank), within_memory(request):
        yield from _served(request)


def _served(request: Request) -> Generator[StreamEvent, None, None]:
    record = Record()
    if len(request.bank) == 1:
        if request.options.answer:
            record.answer = answer(request, [0], record)
        yield _one_page(request, record)
        return
    if request.plan is None:
        order = yield from cascade(request, record)
    else:
        order = yield from run_plan(request, request.plan, record)
    yield _result(request, record, order)


def _one_page(request: Request, record: Record) -> RerankResult:
    """A list of one page has one order; MM-R5 was never trained to answer it."""
    return RerankResult(
        order=(0,),
        status="ok",
        stop_reason="deadline" if record.late else "single_page",
        text="",
        reasoning="",
        usage=Usage(record.prompt_tokens, record.image_tokens, record.other_tokens, 1),
        top_k=request.options.top_k,
        timings_ms=request.timings.total(),
        exactness="approximate" if record.late else "bit_identical",
        reasoning_end="skipped",
        cache=request.counts.total(),
        answer=record.answer,
    )


def _result(request: Request, record: Record, order: tuple[int, ...]) -> RerankResult:
    outcomes, counts = record.outcomes, request.counts
    last = outcomes[-1]
    late = record.late or any(outcome.stop_reason == "deadline" for outcome in outcomes)
    levels = [level for outcome in outcomes for level in outcome.exactness]
    if record.late:
        levels.append("approximate")
    single = request.plan_name == "single"
    return RerankResult(
        order=order,
        status=max((outcome.status for outcome in outcomes), key=STATUSES.index),
        stop_reason="deadline" if late else last.stop_reason,
        text=BETWEEN_WINDOWS.join(outcome.text for outcome in outcomes),
        reasoning=BETWEEN_WINDOWS.join(outcome.reasoning for outcome in outcomes),
        usage=Usage(
            prompt_tokens=record.prompt_tokens,
            image_tokens=record.image_tokens,
            completion_tokens=sum(outcome.completion_tokens for outcome in outcomes)
            + record.other_tokens,
            pages=len(request.bank),
            decode_steps=sum(outcome.decode_steps for outcome in outcomes),
            draft_tokens=sum(outcome.draft_tokens for outcome in outcomes),
            accepted_tokens=sum(outcome.accepted_tokens for outcome in outcomes),
        ),
        top_k=request.options.top_k,
        timings_ms=request.timings.total(),
        first_token_ms=request.timings.first_token_ms,
        exactness=weakest(levels if single else [*levels, "replanned"]),
        reasoning_end=last.reasoning_end,
        tokens_saved=sum(outcome.tokens_saved for outcome in outcomes),
        interventions=sum(outcome.interventions for outcome in outcomes),
        list_logprob=last.list_logprob if single else (),
        cache=counts.total(),
        plan=PlanUse(
            name=request.plan_name,
            rounds=record.rounds,
            page_prefills=counts.page_prefills,
            page_prefills_remembered=counts.page_prefills_remembered,
            windows=tuple(record.windows),
            relevance=record.relevance,
        ),
        stability=record.stability,
        answer=record.answer,
    )
