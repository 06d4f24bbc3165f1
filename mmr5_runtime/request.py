"""A request whose inputs have been checked and opened: everything that can be wrong with it is.

Opening runs before the model does, so that bad input raises where the caller stands and never in
the middle of a stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from mmr5_runtime.bank import PageBank
from mmr5_runtime.batching import Seat
from mmr5_runtime.deadline import Deadline
from mmr5_runtime.image import PixelBudget
from mmr5_runtime.lists.plans import Plan, choose
from mmr5_runtime.loading import LoadedEngine
from mmr5_runtime.memory import Memory
from mmr5_runtime.options import RerankOptions
from mmr5_runtime.pages import Page
from mmr5_runtime.planning import (
    ContextPlan,
    PromptLimits,
    most_pages,
    plan_pages,
    plan_prompt,
)
from mmr5_runtime.prompt import PromptTokenizer, check_query
from mmr5_runtime.reading import Prompt, UseCounts
from mmr5_runtime.reuse.page_source import PageSource
from mmr5_runtime.sampler import SamplingParams
from mmr5_runtime.timing import Timings
from mmr5_runtime.trtllm.model import prompt_limits
from mmr5_runtime.types import ContextOverflowError, PlanName, RequestError


@dataclass
class Request:
    """One question over opened pages, and what serving it has used so far."""

    loaded: LoadedEngine
    memory: Memory
    query: str
    options: RerankOptions
    sources: Sequence[PageSource]
    bank: PageBank
    budget: PixelBudget
    tokenizer: PromptTokenizer
    params: SamplingParams
    plan_name: PlanName
    plan: Plan | None
    counts: UseCounts
    timings: Timings
    deadline: Deadline
    seat: Seat | None = None  # among requests that run at the same time

    def turn(self) -> AbstractContextManager[None]:
        """Has the model alone, where several requests run at the same time."""
        return nullcontext() if self.seat is None else self.seat.turn()

    @property
    def limits(self) -> PromptLimits:
        """What the engine was built for beside its context."""
        return prompt_limits(self.loaded.engine.model, self.options, self.tokenizer.text_ids)

    def plan_prompt(
        self, pages: Sequence[int], tokenizer: PromptTokenizer | None = None
    ) -> ContextPlan:
        """The prompt over candidates ``pages``, checked against context and limits."""
        return plan_prompt(
            tokenizer or self.tokenizer,
            self.loaded.engine.spec.vision,
            self.loaded.context,
            self.query,
            [self.sources[index].size for index in pages],
            [self.bank.planned[index] for index in pages],
            self.budget,
            self.options.max_new_tokens,
            self.limits,
        )

    def prompt(
        self, plan: ContextPlan, pages: Sequence[int], tokenizer: PromptTokenizer | None = None
    ) -> Prompt:
        """A planned prompt with its pages and keys."""
        return Prompt(
            segments=plan.segments,
            pages=self.bank.pages(pages),
            query=self.query,
            engine=self.loaded.identity,
            profile=(tokenizer or self.tokenizer).template.sha256,
        )


def open_sources(memory: Memory, pages: Sequence[Page] | Sequence[PageSource]) -> list[PageSource]:
    """Open every page; RequestError for what is no list of pages, PageError for a bad one."""
    if isinstance(pages, str | bytes) or not isinstance(pages, Sequence):
        raise RequestError(
            f"pages is a {type(pages).__name__}; pass a list of pages, even for a single one."
        )
    if not pages:
        raise RequestError("no pages were given; pass at least one page to rank.")
    opened = [page for page in pages if isinstance(page, PageSource)]
    if len(opened) == len(pages):
        return opened
    return memory.reader.open_all([page for page in pages if not isinstance(page, PageSource)])


def open_bank(
    loaded: LoadedEngine,
    memory: Memory,
    sources: Sequence[PageSource],
    budget: PixelBudget,
    counts: UseCounts | None = None,
    timings: Timings | None = None,
) -> PageBank:
    """The pages of one request, their sizes planned; PageError for one that cannot be resized."""
    planned = plan_pages(
        [source.page for source in sources],
        [source.size for source in sources],
        loaded.engine.spec.vision,
        budget,
    )
    counts, timings = counts or UseCounts(), timings or Timings(loaded.engine.device)
    return PageBank(loaded, memory, sources, planned, budget, counts, timings)


def open_request(
    loaded: LoadedEngine,
    memory: Memory,
    query: str,
    pages: Sequence[Page] | Sequence[PageSource],
    options: RerankOptions,
    seat: Seat | None = None,
) -> Request:
    """Check and open everything. ``pages`` that are opened already are taken as they are.

    ``seat`` is the request's among those that run at the same time.

    Raises RequestError (PageError, ContextOverflowError) naming the input and the remedy.
    """
    deadline = Deadline(options.deadline_ms)
    timings, counts = Timings(loaded.engine.device), UseCounts()
    check_query(query)
    if options.image_kv == "relocate" and loaded.backend != "native":
        raise RequestError(
            "image_kv='relocate' runs parts of the model that only the native engine has; load the "
            "engine with backend='native', or leave image_kv out."
        )
    budget = loaded.budget.replaced(options.min_pixels, options.max_pixels)
    params = SamplingParams.from_generation_config(
        loaded.generation_config, temperature=options.temperature, seed=options.seed
    )
    tokenizer = loaded.prompts(options.layout)
    with timings.span("load_pages"):
        sources = open_sources(memory, pages)
    counts.pages_decoded = sum(
        source.decoded for source, page in zip(sources, pages, strict=True) if source is not page
    )
    bank = open_bank(loaded, memory, sources, budget, counts, timings)
    request = Request(
        loaded, memory, query, options, sources, bank, budget, tokenizer, params,
        "single", None, counts, timings, deadline, seat,
    )  # fmt: skip
    if len(sources) == 1:
        tokenizer.segments(query, [1])  # never read, but a question must be one that can be asked
        return request
    name, plan = _choose_plan(request)
    return replace(request, plan_name=name, plan=plan)


def _choose_plan(request: Request) -> tuple[PlanName, Plan | None]:
    options, count = request.options, len(request.bank)
    everything = range(count)
    fits = most_pages(
        request.tokenizer,
        request.loaded.context,
        request.query,
        request.bank.planned,
        options.max_new_tokens,
        request.limits,
    )
    if fits < count:
        try:
            request.plan_prompt(everything)
        except ContextOverflowError:
            if fits < 2 or options.plan == "single" or options.samples is not None:
                raise  # with the tokens of every page, and what would help
        else:
            fits = count
    if options.plan == "cascade":
        if options.stride is not None or options.anchors is not None:
            raise RequestError("stride and anchors mean nothing to plan='cascade'; leave them out.")
        choose("auto", count, fits, options.window)
        return "cascade", None
    name, plan = choose(
        options.plan,
        count,
        fits,
        options.window,
        options.stride,
        options.anchors,
        options.top_k,
    )
    if name != "single" and options.samples is not None:
        raise RequestError(
            f"samples={options.samples} draws from one prompt, but window={options.window} makes "
            f"several of {count} pages; leave out one of the two."
        )
    return name, plan
