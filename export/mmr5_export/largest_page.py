"""How many tokens the largest page has that a pixel budget lets through."""

from __future__ import annotations

import math

from mmr5_runtime.image import MAX_ASPECT_RATIO
from mmr5_runtime.manifest import PixelRange
from mmr5_runtime.spec import VisionSpec


def largest_page_tokens(spec: VisionSpec, budget: PixelRange) -> int:
    """An upper bound, in tokens, for pages resized as :mod:`mmr5_runtime.image` does it.

    The budget alone is none. The thinnest page is kept one token high however small the budget,
    and a page that is made larger is rounded up on both sides: to (h + 1) x (w + 1) tokens at most,
    where h x w is the least and w is no more than 200 h.
    """
    least = -(-budget.min_pixels // spec.factor**2)
    most = budget.max_pixels // spec.factor**2
    thin = math.isqrt(budget.max_pixels * MAX_ASPECT_RATIO) // spec.factor
    grown = least + 1 + math.isqrt(least * MAX_ASPECT_RATIO) + 1 + math.isqrt(least)
    return max(1, most, thin, grown)
