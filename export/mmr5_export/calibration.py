"""Calibration prompts: a sample and its response as the decoder reads them in a rerank.

A prompt is what the engine will really meet: the listwise template over all pages of the sample,
followed by the answer, so that statistics cover the positions of prefill and those of decoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmr5_export.samples import DataError, Sample, of_sample
from mmr5_runtime.image import PixelBudget, planned_sizes, preprocess
from mmr5_runtime.pages import naming, open_page
from mmr5_runtime.planning import plan_context
from mmr5_runtime.prompt import PromptTokenizer
from mmr5_runtime.rope import Grid, mrope_positions
from mmr5_runtime.spec import ModelSpec


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt and its answer as the decoder reads them; all tensors on the CPU.

    ``token_ids`` [T] int64, of which the first ``prompt_tokens`` are the prompt; ``positions``
    [3, T] int64; ``visual`` [T] bool, true where an embedding of a page stands instead of a
    token's. ``grids`` has one (1, rows, columns) in patches per page.
    """

    token_ids: Tensor
    prompt_tokens: int
    grids: tuple[Grid, ...]
    positions: Tensor
    visual: Tensor

    @property
    def counts(self) -> TokenCounts:
        """How many tokens of each kind this prompt holds."""
        visual = int(self.visual.sum())
        response = len(self.token_ids) - self.prompt_tokens
        return TokenCounts(visual, self.prompt_tokens - visual, response)


@dataclass(frozen=True)
class TokenCounts:
    """Tokens by kind: of pages, of the prompt's text, of the answers."""

    visual: int = 0
    text: int = 0
    response: int = 0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(
            self.visual + other.visual, self.text + other.text, self.response + other.response
        )

    @property
    def total(self) -> int:
        return self.visual + self.text + self.response


def encode_prompt(
    sample: Sample,
    response_ids: Sequence[int],
    tokenizer: PromptTokenizer,
    budget: PixelBudget,
    spec: ModelSpec,
) -> Prompt:
    """The prompt of ``sample`` followed by ``response_ids``; no page is resized for it.

    ``response_ids`` end with the end token where the response stopped with it. Raises
    :class:`DataError` naming the sample when a page cannot be read, the query holds a reserved
    token, or the context of the model cannot hold it all.
    """
    vision, context = spec.vision, spec.text.max_position_embeddings
    shape = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    with of_sample(sample):
        sizes = [open_page(page, index=index).size for index, page in enumerate(sample.pages)]
        plan = plan_context(
            tokenizer,
            vision,
            context,
            sample.query,
            sample.pages,
            sizes,
            budget,
            max(1, len(response_ids)),
        )
    grids = []
    for size in sizes:
        _, (width, height) = planned_sizes(*size, budget, **shape)
        grids.append((1, height // vision.patch_size, width // vision.patch_size))
    used = len(plan.token_ids)
    if used + len(response_ids) > context:
        raise DataError(
            f"{sample.name}: prompt and response take {used} and {len(response_ids)} tokens but "
            f"the context holds {context}; shorten the response or lower --max-pixels."
        )
    prompt_ids = torch.tensor(plan.token_ids)
    positions, after = mrope_positions(prompt_ids, grids, spec)
    answered = torch.arange(after, after + len(response_ids)).expand(3, -1)
    # Told by place, not by id: a response may hold the id of an image token, which decoding embeds
    # as the text token it then is.
    visual = torch.zeros(used + len(response_ids), dtype=torch.bool)
    visual[:used] = prompt_ids == spec.image_token_id
    return Prompt(
        token_ids=torch.cat((prompt_ids, torch.tensor(list(response_ids), dtype=torch.int64))),
        prompt_tokens=used,
        grids=tuple(grids),
        positions=torch.cat((positions, answered), dim=1),
        visual=visual,
    )


def pixel_values(
    sample: Sample, budget: PixelBudget, image_settings: Mapping[str, Any]
) -> list[Tensor]:
    """Patches of every page of ``sample``, in order: [P, patch_dim] float32, on the CPU.

    ``image_settings`` are keyword arguments of :func:`mmr5_runtime.image.preprocess`. Raises
    :class:`DataError` naming the sample and the page that cannot be read.
    """
    patches = []
    with of_sample(sample):
        for index, page in enumerate(sample.pages):
            with naming(page, index):
                image = open_page(page)
                patches.append(preprocess(image, budget, **image_settings).pixel_values)
    return patches
