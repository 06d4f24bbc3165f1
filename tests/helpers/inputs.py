"""Random prompts and pages for a tiny model, for us and for transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmr5_runtime.rope import Grid
from mmr5_runtime.spec import ModelSpec

# Pages in patches: one token, one whole 8 x 8 window, ragged at one or both edges, a thin strip.
GRIDS: tuple[Grid, ...] = ((1, 2, 2), (1, 8, 8), (1, 10, 14), (1, 6, 22), (1, 18, 4))


def random_prompt(spec: ModelSpec, grids: Sequence[Grid], seed: int = 0) -> Tensor:
    """Token ids [T]: text, then every page between its vision tokens, text after each."""
    generator = torch.Generator().manual_seed(seed)

    def text(count: int) -> list[int]:
        return torch.randint(0, 256, (count,), generator=generator).tolist()

    ids = text(7)
    for index, (_, h, w) in enumerate(grids):
        image = [spec.image_token_id] * (h * w // spec.vision.merge_unit)
        ids += [spec.vision_start_token_id, *image, spec.vision_end_token_id, *text(2 + index)]
    return torch.tensor(ids)


def random_pages(spec: ModelSpec, grids: Sequence[Grid], seed: int = 0) -> list[Tensor]:
    """Pixel values [P, patch_dim] fp32 of one page per grid, spread like normalised pixels."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(h * w, spec.vision.patch_dim, generator=generator) for _, h, w in grids]


def hf_inputs(
    spec: ModelSpec, ids: Tensor, pages: Sequence[Tensor], grids: Sequence[Grid]
) -> dict[str, Tensor]:
    """The same prompt as keyword arguments of the transformers model."""
    inputs = {
        "input_ids": ids[None],
        "mm_token_type_ids": (ids == spec.image_token_id).int()[None],
        "attention_mask": torch.ones_like(ids)[None],
    }
    if pages:
        inputs |= {"pixel_values": torch.cat(list(pages)), "image_grid_thw": torch.tensor(grids)}
    return inputs
