"""Train mini from nothing and write it as a Hugging Face checkpoint.

    python -m mmr5_bench.mini.train --work build/mini-training --output build/mini

Data flow: question and answer texts -> tokenizer; pages of growing variety -> vision tower that
reads (stage 1); captions as text -> decoder that matches (stage 2); frozen page embeddings ->
captions (stage 3), short lists (stage 4), lists (stage 5) -> bf16 checkpoint. Each stage leaves a
file in the work folder and is skipped when that file is there, so an interrupted training goes on
at its last stage. Stages 1 and 2 do not depend on each other: ``--only`` runs them in two
processes.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from mmr5_bench.mini.checkpoint import build_model, write_checkpoint
from mmr5_bench.mini.decoder_stage import (
    LOG_EVERY,
    DecoderPhase,
    Draw,
    EncodedPages,
    list_batches,
    matching_batches,
    train_decoder,
)
from mmr5_bench.mini.padded_vision import encode_pages
from mmr5_bench.mini.tokenizer import SPECIAL_TOKENS, train_tokenizer
from mmr5_bench.mini.vision_data import PagePool, build_pool
from mmr5_bench.mini.vision_stage import train_vision
from mmr5_bench.minidocs.lists import TRAIN_SEEDS, make_case
from mmr5_runtime.prompt import render

log = logging.getLogger(__name__)

TOKENIZER_TEXTS = 6000


@dataclass(frozen=True)
class VisionPhase:
    """Steps on pages of one variety; ``pages`` per training pair are rendered for it."""

    variety: float
    pages: int
    steps: int
    rate: float
    batch: int = 32


VISION_PHASES = (
    VisionPhase(0.0, pages=15, steps=600, rate=1.5e-3),
    VisionPhase(1.0, pages=24, steps=2200, rate=1e-3),
)
LIST_PAGES, LIST_SEED = 30, 3
MATCHING = DecoderPhase(
    "matching", 1200, 1e-3, pages=120, counts=tuple(range(3, 11)), seed=7, captions=0.0
)
PAGE_PHASES = (
    DecoderPhase("captions", 250, 1e-3, pages=48, counts=(1,), seed=8, short_until=250),
    # Which embeddings belong to "Image 2" is learnt here; in long lists it takes far more steps.
    DecoderPhase(
        "short-lists",
        1000,
        1e-3,
        pages=48,
        counts=(2, 3, 4),
        seed=19,
        captions=3.0,
        short_until=1000,
    ),
    DecoderPhase(
        "lists", 1000, 8e-4, pages=40, counts=tuple(range(1, 11)), seed=20, short_until=650
    ),
    DecoderPhase(
        "long-lists", 420, 8e-4, pages=40, counts=(2, 3, 4, 5, 6, 7, 8, 9, 9, 10, 10, 10), seed=33
    ),
    # Two of three batches are text only: they cost little, and sorting ten ids is all they teach.
    DecoderPhase(
        "polish", 1600, 8e-4, pages=40, counts=(2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 10), seed=42
    ),
)
SORTING = DecoderPhase(
    "sorting", 1600, 8e-4, pages=100, counts=(3, 5, 7, 8, 9, 10, 10), seed=41, captions=0.0
)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Train mini, the embedded default checkpoint.")
    parser.add_argument("--work", type=Path, required=True, help="folder of stage results")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--only", choices=("vision", "matching"), help="stop after this stage")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    train(options.work, options.output, options.only)


def train(work: Path, output: Path, only: str | None = None) -> None:
    """Run every stage whose result is not in ``work`` yet, then write the checkpoint."""
    tokenizer = _load_tokenizer(work / "tokenizer.json")
    torch.manual_seed(0)
    model = build_model(tokenizer)
    tower, decoder = model.model.visual, model.model.language_model
    if only != "matching":
        for index, phase in enumerate(VISION_PHASES):
            _stage(work / f"vision-{index}.pt", tower, partial(_vision, tower, phase, index))
    if only != "vision":
        draw = matching_batches(tokenizer, MATCHING)
        _stage(work / "matching.pt", decoder, partial(train_decoder, model, draw, MATCHING))
    if only is None:
        last = work / f"{PAGE_PHASES[-1].name}.pt"
        if not last.exists():
            pages = _encode_pool(tower, build_pool(LIST_PAGES, seed=LIST_SEED))
            for step in PAGE_PHASES:
                draw = list_batches(tokenizer, pages, step)
                if step.name == "polish":
                    draw = _interleave(matching_batches(tokenizer, SORTING), draw)
                run = partial(train_decoder, model, draw, step)
                _stage(work / f"{step.name}.pt", decoder, run)
        decoder.load_state_dict(torch.load(last))
        write_checkpoint(model, tokenizer, output)


def _stage(result: Path, module: Any, run: Callable[[], None]) -> None:
    """Load ``result`` into ``module``, or train it and leave the result (whole, by rename)."""
    if result.exists():
        log.info("%s: found", result.name)
    else:
        run()
        torch.save(module.state_dict(), result.with_suffix(".tmp"))
        result.with_suffix(".tmp").rename(result)
    module.load_state_dict(torch.load(result))


def _interleave(text: Draw, lists: Draw) -> Draw:
    """Lists with pages on every third step and wherever progress is logged, text in between."""
    return lambda step: lists(step) if step % 3 == 0 or step % LOG_EVERY == 0 else text(step)


def _vision(tower: Any, phase: VisionPhase, index: int) -> None:
    pool = build_pool(phase.pages, seed=index, variety=phase.variety)
    train_vision(tower, pool, steps=phase.steps, batch=phase.batch, rate=phase.rate, seed=index)


@torch.no_grad()
def _encode_pool(tower: Any, pool: PagePool) -> EncodedPages:
    embeddings, grids = [], []
    for start in range(0, len(pool.keys), 64):
        patches, some = pool.batch(range(start, min(start + 64, len(pool.keys))))
        embeddings += encode_pages(tower, patches, some)
        grids += some
    return EncodedPages.build(pool.keys, embeddings, grids)


def _load_tokenizer(path: Path) -> Tokenizer:
    if not path.exists():
        rng = np.random.default_rng(5)
        texts = []
        for index in range(TOKENIZER_TEXTS):
            case = make_case(rng, 1 + index % 10, held_out=False, seeds=TRAIN_SEEDS)
            texts += [case.question, case.answer()]
            if index % 60 == 0:
                texts.append(render(case.question, len(case.pages)))
        for token in SPECIAL_TOKENS:
            texts = [text.replace(token, "\n") for text in texts]
        mine = path.with_suffix(f".{os.getpid()}.tmp")  # another process may be doing the same
        train_tokenizer(texts).save(str(mine))
        mine.replace(path)
    return Tokenizer.from_file(str(path))


if __name__ == "__main__":
    main()
