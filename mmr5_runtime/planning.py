"""Will the request fit? Answered from page sizes alone, before any pixel is resized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmr5_runtime.image import PixelBudget, fitting_max_pixels, planned_tokens
from mmr5_runtime.pages import Page, naming
from mmr5_runtime.prompt import PromptTokenizer
from mmr5_runtime.spec import VisionSpec
from mmr5_runtime.types import ContextOverflowError

# Room the answer needs at the least: a line of reasoning and an id per page, tags, end token.
REPLY_TOKENS, REPLY_TOKENS_PER_PAGE = 32, 24

Size = tuple[int, int]


@dataclass(frozen=True)
class ContextPlan:
    """Prompt ids, and how many tokens may follow them."""

    token_ids: list[int]
    max_new_tokens: int


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
    """Tokenize the prompt for pages of (width, height) ``sizes`` and check it against ``context``.

    ``max_new_tokens`` is cut to what the context leaves, but never below what a reply about all
    pages needs: then ContextOverflowError gives the tokens per page and the ``max_pixels`` that
    would fit. Raises PageError for a size that cannot be resized, RequestError for a bad query.
    """
    shape = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    per_page = []
    for index, (page, (width, height)) in enumerate(zip(pages, sizes, strict=True)):
        with naming(page, index):
            per_page.append(planned_tokens(width, height, budget, **shape))
    token_ids = tokenizer.encode(query, per_page)
    reply = min(max_new_tokens, REPLY_TOKENS + REPLY_TOKENS_PER_PAGE * len(sizes))
    room = context - len(token_ids)
    if room < reply:
        allowance = context - reply - (len(token_ids) - sum(per_page))
        fitting = fitting_max_pixels(sizes, allowance, budget, **shape) if allowance > 0 else None
        if fitting:
            remedy = f"pass max_pixels={fitting} or fewer pages"
        else:
            remedy = "pass fewer pages" if len(sizes) > 1 else "shorten the question"
        raise ContextOverflowError(
            f"the prompt needs {len(token_ids)} tokens and {reply} for the reply, but the context "
            f"holds {context} (visual tokens per page: {_abridged(per_page)}); {remedy}."
        )
    return ContextPlan(token_ids, min(max_new_tokens, room))


def _abridged(counts: Sequence[int]) -> str:
    shown = ", ".join(str(count) for count in counts[:12])
    return shown if len(counts) <= 12 else f"{shown}, … {len(counts)} pages"
