"""Goals that one engine answers for: a decode step, reading a prompt, the vision tower.

All of it through the calls that a rerank makes.
"""

from __future__ import annotations

import time

import torch

from mmr5_bench.peers.names import CELLS
from mmr5_bench.targets.clock import Sizes, timed_ms, wait
from mmr5_bench.targets.results import Figure, figure
from mmr5_bench.targets.work import ModelWork, floor_ms
from mmr5_runtime.cursor import Cursor
from mmr5_runtime.engine import Engine
from mmr5_runtime.loading import LoadedEngine
from mmr5_runtime.model import MAX_DECODE_TOKENS

_WORDS = 900  # ids below it are words in both shapes


def decode_step(
    loaded: LoadedEngine,
    configuration: str,
    work: ModelWork,
    ceilings: dict[str, float],
    sizes: Sizes,
    *,
    dry_run: bool,
) -> Figure:
    """Milliseconds per step of one token behind ``sizes.cached``, steps queued one after another.

    That is how a decode loop runs that does not wait for its tokens. ``details`` have the same with
    the host waiting for every step, and steps of 4 and 8 tokens.
    """
    engine = loaded.engine
    cursor = _read(engine, sizes.cached, sizes.cached + 2 * MAX_DECODE_TOKENS)
    samples = [_steps(engine, cursor, 1, sizes.steps) for _ in range(sizes.rounds)]
    details = {
        f"{tokens}_tokens_ms": _steps(engine, cursor, tokens, sizes.steps) for tokens in (4, 8)
    }
    end = cursor.mark

    def waited() -> None:
        cursor.step([1])
        cursor.rewind(end)

    details["waited_ms"] = min(timed_ms(waited, engine.device, sizes.steps))
    floor = floor_ms(work.decode_step(sizes.cached), ceilings)
    return figure(
        "decode-step", configuration, samples, dry_run=dry_run, floor=floor, details=details
    )


def _steps(engine: Engine, cursor: Cursor, tokens: int, count: int) -> float:
    """Milliseconds per step of ``tokens``, of ``count`` that are launched without waiting."""
    end, words = cursor.mark, [1] * tokens
    cursor.step(words)  # compiles and records what has not been
    cursor.rewind(end)
    wait(engine.device)
    start = time.perf_counter()
    for _ in range(count):
        cursor.step(words)
        cursor.rewind(end)
    wait(engine.device)
    return 1e3 * (time.perf_counter() - start) / count


def prefill(
    loaded: LoadedEngine,
    configuration: str,
    work: ModelWork,
    ceilings: dict[str, float],
    sizes: Sizes,
    *,
    dry_run: bool,
) -> Figure:
    """Milliseconds to read a fresh prompt of ``sizes.prompt`` tokens and predict what follows."""
    engine = loaded.engine
    cursor = Cursor(engine, sizes.prompt)
    ids, empty = _words(sizes.prompt), cursor.mark

    def read() -> None:
        cursor.rewind(empty)
        cursor.logits(cursor.read(ids))

    samples = timed_ms(read, engine.device, sizes.rounds)
    floor = floor_ms(work.prefill_tokens(sizes.prompt), ceilings)
    return figure("prefill-13k", configuration, samples, dry_run=dry_run, floor=floor)


def vision(
    loaded: LoadedEngine,
    configuration: str,
    work: ModelWork,
    ceilings: dict[str, float],
    sizes: Sizes,
    *,
    dry_run: bool,
) -> Figure:
    """Milliseconds for the vision tower over ``sizes.pages`` pages, their pixels on the device."""
    engine, vision_spec = loaded.engine, loaded.engine.spec.vision
    columns, rows = (2 * side for side in CELLS[sizes.workload])  # type: ignore[index]
    grid = (1, rows, columns)
    pixels = torch.randn(rows * columns, vision_spec.patch_dim).to(engine.device)

    def encode() -> None:
        for _ in range(sizes.pages):
            engine.encode_page(pixels, grid)

    samples = timed_ms(encode, engine.device, sizes.rounds)
    floor = sizes.pages * floor_ms(work.vision(rows, columns), ceilings)
    return figure("vision-20", configuration, samples, dry_run=dry_run, floor=floor)


def _read(engine: Engine, tokens: int, capacity: int) -> Cursor:
    cursor = Cursor(engine, capacity)
    cursor.read(_words(tokens))
    return cursor


def _words(count: int) -> list[int]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, _WORDS, (count,), generator=generator).tolist()
