"""Stages 2 to 5: matching in text, captions, short and long lists; the vision tower stays frozen.

Page embeddings are computed once from the frozen tower (MM-R5 froze its tower as well), so a
training step is a decoder step. The order matters: lists without the matching stage learn to read
and to format, but rank at chance.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from mmr5_bench.mini.examples import ID_WEIGHT, VERDICT_WEIGHT, Example, encode_case
from mmr5_bench.mini.schedule import Schedule
from mmr5_bench.minidocs.lists import TRAIN_SEEDS, PageKey, RerankCase, make_case
from mmr5_runtime.rope import Grid, mrope_positions
from mmr5_runtime.spec import ModelSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedPages:
    """Frozen page embeddings [n_i, hidden] with their grids in patches, found by pair."""

    embeddings: tuple[Tensor, ...]
    grids: tuple[Grid, ...]
    by_pair: dict[tuple[int, int], list[int]]

    @classmethod
    def build(
        cls,
        keys: Sequence[PageKey],
        embeddings: Sequence[Tensor],
        grids: Sequence[Grid],
    ) -> EncodedPages:
        """Index embeddings by (topic, kind)."""
        by_pair: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, key in enumerate(keys):
            by_pair[key.topic, key.kind].append(index)
        return cls(tuple(embeddings), tuple(grids), dict(by_pair))

    def pick(self, case: RerankCase, rng: np.random.Generator) -> list[int]:
        """One stored page for each candidate of ``case``, of the candidate's pair."""
        stored = (self.by_pair[page.topic, page.kind] for page in case.pages)
        return [choices[int(rng.integers(len(choices)))] for choices in stored]


@dataclass(frozen=True)
class DecoderPhase:
    """Steps of one decoder stage: about ``pages`` pages a batch in lists of ``counts`` pages.

    ``captions`` weighs the words that describe a page in the loss; ``short_until`` is the step
    from which prompts carry the fixed instructions, which cost a third of a step and teach little.
    """

    name: str
    steps: int
    rate: float
    pages: int
    counts: tuple[int, ...]
    seed: int
    captions: float = 1.0
    short_until: int = 0


Batch = list[tuple[Example, list[Tensor], list[Grid]]]
Draw = Callable[[int], Batch]
LOG_EVERY = 25  # steps


def train_decoder(model: Any, draw: Draw, phase: DecoderPhase) -> None:
    """Train embeddings, decoder and head of ``model`` on the batches that ``draw(step)`` gives."""
    decoder = model.model.language_model
    spec = ModelSpec.from_hf_config(json.loads(model.config.to_json_string(use_diff=False)))
    schedule = Schedule(decoder.parameters(), rate=phase.rate, steps=phase.steps)
    for step in range(phase.steps):
        batch = draw(step)
        ids = pad_sequence([example.ids for example, _, _ in batch], batch_first=True)
        weights = pad_sequence([example.weights for example, _, _ in batch], batch_first=True)
        embeds = decoder.embed_tokens(ids)
        positions = torch.zeros(3, *ids.shape, dtype=torch.long)
        for row, (example, pages, grids) in enumerate(batch):
            length = len(example.ids)
            positions[:, row, :length] = mrope_positions(example.ids, grids, spec)[0]
            if pages:
                slots = (ids[row] == spec.image_token_id).nonzero().squeeze(1)
                embeds = embeds.index_put(
                    (torch.full_like(slots, row), slots), torch.cat(pages).to(embeds.dtype)
                )
        hidden = decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False)[0]
        chosen = weights[:, 1:] > 0
        logits = model.lm_head(hidden[:, :-1][chosen])
        targets, weight = ids[:, 1:][chosen], weights[:, 1:][chosen]
        losses = F.cross_entropy(logits, targets, reduction="none")
        schedule.step((losses * weight).sum() / weight.sum())
        if step % LOG_EVERY == 0 or step == phase.steps - 1:
            right = (logits.argmax(-1) == targets).float()
            log.info(
                "%s %5d  loss %.4f  tokens %.3f  verdicts %.3f  ids %.3f",
                phase.name,
                step,
                losses.mean().item(),
                right.mean().item(),
                right[weight == VERDICT_WEIGHT].mean().item(),
                right[weight == ID_WEIGHT].mean().item(),
            )


def matching_batches(tokenizer: Tokenizer, phase: DecoderPhase) -> Draw:
    """Text-only lists: captions are given, verdicts and the order are learnt."""

    def draw(step: int) -> Batch:
        return [
            (encode_case(tokenizer, case, (), short=True, captions=phase.captions), [], [])
            for case in _cases(phase, np.random.default_rng([phase.seed, step]))
        ]

    return draw


def list_batches(tokenizer: Tokenizer, pages: EncodedPages, phase: DecoderPhase) -> Draw:
    """Lists with pages: everything in the target is learnt."""

    def draw(step: int) -> Batch:
        rng = np.random.default_rng([phase.seed, step])
        batch: Batch = []
        for case in _cases(phase, rng):
            picked = pages.pick(case, rng)
            grids = [pages.grids[i] for i in picked]
            tokens = tuple(len(pages.embeddings[i]) for i in picked)
            short = step < phase.short_until
            example = encode_case(tokenizer, case, tokens, short=short, captions=phase.captions)
            batch.append((example, [pages.embeddings[i] for i in picked], grids))
        return batch

    return draw


def _cases(phase: DecoderPhase, rng: np.random.Generator) -> list[RerankCase]:
    """Training cases of one length, so that a batch needs little padding."""
    count = int(rng.choice(np.asarray(phase.counts)))
    return [
        make_case(rng, count, held_out=False, seeds=TRAIN_SEEDS)
        for _ in range(max(1, phase.pages // count))
    ]
