"""One model on one device; knows nothing of prompts, pages or requests."""

from __future__ import annotations

import torch
from torch import Tensor

from mmr5_runtime.model import Model
from mmr5_runtime.rope import Grid


class Engine:
    """Runs one model on one device; holds no state between generations."""

    def __init__(self, model: Model, device: torch.device) -> None:
        self.model = model
        self.spec = model.spec
        self.device = device

    @torch.inference_mode()
    def encode_page(self, pixel_values: Tensor, grid: Grid) -> Tensor:
        """Page embeddings [P / merge^2, hidden] of patches [P, patch_dim] float32."""
        embeddings: Tensor = self.model.visual(pixel_values.to(self.device), grid)
        return embeddings
