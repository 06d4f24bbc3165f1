"""Stage 1: teach the vision tower to read.

The tower alone classifies topic and kind from its page embeddings, pooled by attention. Without
this stage nothing downstream starts learning: a decoder gives a tower that cannot read no usable
gradient.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmr5_bench.mini.padded_vision import encode_pages
from mmr5_bench.mini.schedule import Schedule
from mmr5_bench.mini.vision_data import PagePool
from mmr5_bench.minidocs.vocabulary import KINDS, TOPICS

log = logging.getLogger(__name__)


class PageClassifier(nn.Module):
    """Topic and kind logits of pages, each read through an attention pool of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attend = nn.Linear(width, 2)
        self.topic = nn.Linear(width, len(TOPICS))
        self.kind = nn.Linear(width, len(KINDS))

    def forward(self, pages: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Page embeddings [n_i, width] to logits [N, topics] and [N, kinds]."""
        pooled = torch.stack([self.attend(page).softmax(0).T @ page for page in pages])
        return self.topic(pooled[:, 0]), self.kind(pooled[:, 1])


def train_vision(
    tower: Any, pool: PagePool, *, steps: int, batch: int, rate: float, seed: int
) -> None:
    """Train ``tower`` in place on ``steps`` batches of pages of ``pool``."""
    generator = torch.Generator().manual_seed(seed)
    classifier = PageClassifier(tower.config.out_hidden_size)
    schedule = Schedule([*tower.parameters(), *classifier.parameters()], rate=rate, steps=steps)
    topics = torch.tensor([key.topic for key in pool.keys])
    kinds = torch.tensor([key.kind for key in pool.keys])
    for step in range(steps):
        chosen = torch.randint(len(pool.keys), (batch,), generator=generator)
        pages = encode_pages(tower, *pool.batch(chosen.tolist()))
        topic_logits, kind_logits = classifier(pages)
        topic_loss = F.cross_entropy(topic_logits, topics[chosen])
        kind_loss = F.cross_entropy(kind_logits, kinds[chosen])
        schedule.step(topic_loss + kind_loss)
        if step % 25 == 0 or step == steps - 1:
            topic_right = (topic_logits.argmax(-1) == topics[chosen]).float().mean().item()
            kind_right = (kind_logits.argmax(-1) == kinds[chosen]).float().mean().item()
            log.info(
                "vision %5d  loss %.3f %.3f  topic %.2f  kind %.2f",
                step,
                topic_loss.item(),
                kind_loss.item(),
                topic_right,
                kind_right,
            )
