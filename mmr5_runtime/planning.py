"""Will the request fit? Answered from page sizes alone, before any pixel is resized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmr5_runtime.image import PixelBudget, fitting_max_pixels, planned_sizes
from mmr5_runtime.pages import Page, naming
from mmr5_runtime.prompt import PromptTokenizer, Segments
from mmr5_runtime.rope import Grid
from mmr5_runtime.spec import VisionSpec
from mmr5_runtime.types import ContextOverflowError

# Room the answer needs at the least: a line of reasoning and an id per page, tags, end token.
REPLY_TOKENS, REPLY_TOKENS_PER_PAGE = 32, 24

Size = tuple[int, int]


@dataclass(frozen=True)
class PlannedPage:
    """What a page will be: (width, height) after each resize, patches, tokens in the prompt."""

    sizes: tuple[Size, Size]
    grid: Grid
    tokens: int


@dataclass(frozen=True)
class PromptLimits:
    """What an engine was built for beside its context, in tokens; None where nothing was settled.

    ``prompt`` are those of one prompt, ``images`` those of its pages. ``again`` is how much of the
    answer may have to be read as part of a prompt.
    """

    prompt: int | None = None
    images: int | None = None
    again: int = 0

    def for_pages(self, context: int, text: int, reply: int) -> tuple[int, str]:
        """Most tokens of pages beside ``text`` and ``reply``, and which limit that comes from."""
        found = [(context - text - reply, "context")]
        if self.prompt is not None:
            found.append((self.prompt - text - self.again, "max_input_len"))
        if self.images is not None:
            found.append((self.images, "max_multimodal_len"))
        return min(found, key=lambda one: one[0])


@dataclass(frozen=True)
class ContextPlan:
    """A prompt cut into segments, and how many tokens may follow it."""

    segments: Segments
    max_new_tokens: int

    @property
    def token_ids(self) -> list[int]:
        """The whole prompt."""
        return self.segments.ids


def plan_pages(
    pages: Sequence[Page], sizes: Sequence[Size], vision: VisionSpec, budget: PixelBudget
) -> list[PlannedPage]:
    """What pages of (width, height) ``sizes`` become; PageError for one that cannot be resized."""
    patch, merge = vision.patch_size, vision.spatial_merge_size
    planned = []
    for index, (page, (width, height)) in enumerate(zip(pages, sizes, strict=True)):
        with naming(page, index):
            resized = planned_sizes(width, height, budget, patch_size=patch, merge_size=merge)
        columns, rows = resized[1][0] // patch, resized[1][1] // patch
        planned.append(PlannedPage(resized, (1, rows, columns), rows * columns // merge**2))
    return planned


def plan_prompt(
    tokenizer: PromptTokenizer,
    vision: VisionSpec,
    context: int,
    query: str,
    sizes: Sequence[Size],
    planned: Sequence[PlannedPage],
    budget: PixelBudget,
    max_new_tokens: int,
    limits: PromptLimits | None = None,
) -> ContextPlan:
    """Tokenize the prompt for ``planned`` pages and check it against ``context`` and ``limits``.

    ``max_new_tokens`` is cut to what the context leaves, but never below what a reply about all
    pages needs: then ContextOverflowError gives the tokens per page and the ``max_pixels`` that
    would fit. Raises RequestError for a bad query.
    """
    limits = limits or PromptLimits()
    per_page = [page.tokens for page in planned]
    segments = tokenizer.segments(query, per_page)
    total = len(segments.ids)
    reply = reply_tokens(len(planned), max_new_tokens)
    images = sum(per_page)
    allowance, limit = limits.for_pages(context, total - images, reply)
    if images > allowance:
        shape = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
        fitting = fitting_max_pixels(sizes, allowance, budget, **shape) if allowance > 0 else None
        if fitting:
            remedy = f"pass max_pixels={fitting} or fewer pages"
        else:
            remedy = "pass fewer pages" if len(sizes) > 1 else "shorten the question"
        if limit == "context":
            needs = f"the prompt needs {total} tokens and {reply} for the reply, but the context "
            needs += f"holds {context}"
        elif limit == "max_input_len":
            behind = f" and {limits.again} of the answer behind it" if limits.again else ""
            needs = f"the prompt needs {total} tokens{behind}, but the engine was built for prompts"
            needs += f" of {limits.prompt} ({limit})"
        else:
            needs = f"the pages have {images} tokens together, but the engine was built for "
            needs += f"{limits.images} ({limit})"
        raise ContextOverflowError(
            f"{needs} (visual tokens per page: {_abridged(per_page)}); {remedy}."
        )
    return ContextPlan(segments, min(max_new_tokens, context - total))


def plan_context(
    tokenizer: PromptTokenizer,
    vision: VisionSpec,
    context: int,
    query: str,
    pages: Sequence[Page],
    sizes: Sequence[Size],
    budget: PixelBudget,
    max_new_tokens: int,
) -> ContextPlan:
    """:func:`plan_pages` and :func:`plan_prompt` in one, for a prompt of all ``pages``."""
    planned = plan_pages(pages, sizes, vision, budget)
    return plan_prompt(tokenizer, vision, context, query, sizes, planned, budget, max_new_tokens)


def reply_tokens(num_pages: int, max_new_tokens: int) -> int:
    """Tokens that have to be left for the reply to a prompt of ``num_pages``."""
    return min(max_new_tokens, REPLY_TOKENS + REPLY_TOKENS_PER_PAGE * num_pages)


def most_pages(
    tokenizer: PromptTokenizer,
    context: int,
    query: str,
    planned: Sequence[PlannedPage],
    max_new_tokens: int,
    limits: PromptLimits | None = None,
) -> int:
    """How many of the pages fit one prompt, whichever they are: counted with the largest ones."""
    largest = sorted((page.tokens for page in planned), reverse=True)
    limits = limits or PromptLimits()

    def fits(count: int) -> bool:
        images = sum(largest[:count])
        text = len(tokenizer.segments(query, largest[:count]).ids) - images
        return images <= limits.for_pages(context, text, reply_tokens(count, max_new_tokens))[0]

    low, high = 0, len(largest)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _abridged(counts: Sequence[int]) -> str:
    shown = ", ".join(str(count) for count in counts[:12])
    return shown if len(counts) <= 12 else f"{shown}, … {len(counts)} pages"
