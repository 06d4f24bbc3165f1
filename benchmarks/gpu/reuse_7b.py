"""Times reading and decoding at the true 7B shape: cold, from memory, segment by segment, drafted.

    PYTHONPATH=.:kernels:export:benchmarks python benchmarks/gpu/reuse_7b.py --out results

Weights are random and dense in bf16 (16.6 GB), pages are random pixels; nothing is downloaded. What
is timed are the calls that a rerank makes. ``results/reuse-7b.json`` is written after every step,
so that a run which is cut off keeps what it had; ``--seconds`` ends it after the step it is in.
``--dry-run`` runs every step on a tiny model on the CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mmr5_bench.files import write_json
from mmr5_bench.random_weights.shapes import spec_of
from mmr5_bench.random_weights.tensors import RandomTensors
from mmr5_bench.runbook.steps import EARLY
from mmr5_runtime.cursor import Cursor
from mmr5_runtime.deadline import Deadline
from mmr5_runtime.engine import Engine
from mmr5_runtime.model import MAX_DECODE_TOKENS, Model, native_model
from mmr5_runtime.prompt import Segments
from mmr5_runtime.reading import Prompt, PromptPage, UseCounts, read_prompt
from mmr5_runtime.reuse.config import CacheConfig
from mmr5_runtime.reuse.encoder_cache import EncoderCache
from mmr5_runtime.reuse.ledger import MissLedger
from mmr5_runtime.reuse.relocate import PageSegment, Recompute, capture_pages, read_relocated
from mmr5_runtime.reuse.relocate_store import RelocatableStore
from mmr5_runtime.reuse.segments import SegmentStore
from mmr5_runtime.rope import Grid
from mmr5_runtime.spec import ModelSpec
from mmr5_runtime.timing import Timings

HEAD_TOKENS, LABEL_TOKENS, TAIL_TOKENS, QUESTION_TOKENS = 330, 5, 40, 20
GRIDS: dict[int, Grid] = {616: (1, 44, 56), 1280: (1, 64, 80)}  # by tokens of a page
LISTS = (5, 10, 20)
SHARES = (0.05, 0.15)
KEPT_BYTES = 16 << 30  # nothing may be evicted: this is about time
GREATEST_TOKEN = 900  # of the words, below every special token of both shapes


@dataclass
class Bench:
    """A random engine and what has been measured; every result goes to disk at once."""

    engine: Engine
    grids: dict[int, Grid]
    lists: tuple[int, ...]
    repeats: int
    step_seconds: float
    path: Path
    about: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def time(self, call: Callable[[], Any]) -> float:
        """Median ms of up to ``repeats`` calls after one untimed, fewer when they take too long."""
        found: list[float] = []
        self._once(call)
        began = time.perf_counter()
        while len(found) < self.repeats:
            found.append(self._once(call))
            if time.perf_counter() - began > self.step_seconds:
                break
        return median(found)

    def _once(self, call: Callable[[], Any]) -> float:
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return 1e3 * (time.perf_counter() - start)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def add(self, what: str, **values: Any) -> None:
        self.rows.append({"what": what, **values})
        write_json({**self.about, "rows": self.rows}, self.path)
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}
        print(what, shown, flush=True)


def random_model(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Model:
    """Dense in ``dtype``, drawn on the device."""
    return Model.from_tensors(spec, RandomTensors(spec, {}, device).get, {}, dtype, device)


def words(count: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, GREATEST_TOKEN, (count,), generator=generator).tolist())


def cut_prompt(spec: ModelSpec, num_pages: int, tokens: int) -> Segments:
    """A prompt of random words about ``num_pages`` pages of ``tokens`` each."""
    pads = [spec.image_token_id] * tokens
    shown = (spec.vision_start_token_id, *pads, spec.vision_end_token_id)
    labels = [() if page == 0 else words(LABEL_TOKENS, page) for page in range(num_pages)]
    pages = tuple((*label, *shown) for label in labels)
    return Segments(words(HEAD_TOKENS, 1000), pages, words(TAIL_TOKENS, 2000))


def digest(number: int) -> bytes:
    return number.to_bytes(32, "little")


def measure(bench: Bench) -> Iterator[None]:
    """Every step; a caller may stop between any two."""
    for tokens, grid in bench.grids.items():
        patches = torch.randn(grid[1] * grid[2], bench.engine.spec.vision.patch_dim)
        bench.add("encode", page=tokens, ms=bench.time(partial(_encode, bench, patches, grid)))
        yield
        for count in bench.lists:
            yield from measure_list(bench, count, tokens, grid, patches)


def _encode(bench: Bench, patches: Tensor, grid: Grid) -> Tensor:
    return bench.engine.encode_page(patches, grid)


def measure_list(
    bench: Bench, count: int, tokens: int, grid: Grid, patches: Tensor
) -> Iterator[None]:
    """One list of ``count`` equal pages of ``tokens``, in every way."""
    engine, spec = bench.engine, bench.engine.spec
    segments = cut_prompt(spec, count, tokens)
    shape = {"pages": count, "page": tokens, "prompt": len(segments.ids)}
    cursor = Cursor(engine, len(segments.ids) + 8 * MAX_DECODE_TOKENS)
    empty = cursor.mark
    encoder = EncoderCache(CacheConfig(gpu_gib=0), bench.device, digest(1))
    embeddings = engine.encode_page(patches, grid)
    for page in range(count):
        encoder.put(digest(page), embeddings, grid)

    def seen(page: int) -> Tensor:
        found = encoder.get(digest(page), grid, tokens)
        assert found is not None
        return found

    def read(store: SegmentStore, page: Callable[[int], Tensor]) -> dict[str, float]:
        cursor.rewind(empty)
        timings = Timings(bench.device)
        shown = tuple(
            PromptPage(digest(i), digest(i), grid, partial(page, i)) for i in range(count)
        )
        prompt = Prompt(segments, shown, "", digest(1), "")
        read_prompt(
            prompt, prompt.keys(), cursor, store, MissLedger(), UseCounts(), timings, Deadline(None)
        )
        return timings.total()

    def nothing() -> SegmentStore:
        return SegmentStore(0, bench.device)

    cold = bench.time(lambda: read(nothing(), lambda _: _encode(bench, patches, grid)))
    bench.add("cold", **shape, ms=cold)
    yield
    hit = bench.time(lambda: read(nothing(), seen))
    bench.add("pages seen", **shape, ms=hit, ratio=hit / cold)
    yield
    segmented = bench.time(lambda: read(nothing(), lambda _: embeddings))
    pages, grids = [embeddings] * count, [grid] * count

    def at_once() -> Tensor:
        cursor.rewind(empty)
        return cursor.logits(cursor.read(segments.ids, pages, grids))

    whole = bench.time(at_once)
    bench.add("segments", **shape, ms=segmented, at_once_ms=whole, ratio=segmented / whole)
    yield
    yield from _from_memory(bench, shape, cold, read, lambda _: embeddings)
    at_once()
    yield from _decode(bench, shape, cursor)
    cursor.rewind(empty)
    yield from _relocate(bench, shape, cold, cursor, segments, grid, seen)


def _from_memory(
    bench: Bench,
    shape: dict[str, int],
    cold: float,
    read: Callable[[SegmentStore, Callable[[int], Tensor]], dict[str, float]],
    page: Callable[[int], Tensor],
) -> Iterator[None]:
    store = SegmentStore(KEPT_BYTES, bench.device)
    saved = read(store, page)
    used = bench.engine.model.new_arena(1)
    size = 2 * used.k.numel() * used.k.element_size() * (shape["prompt"] - TAIL_TOKENS)
    hit = bench.time(lambda: read(store, page))
    loads = median(read(store, page)["kv_load"] for _ in range(3))
    bench.add(
        "prompt seen",
        **shape,
        ms=hit,
        ratio=hit / cold,
        kv_load_ms=loads,
        kv_load_gb_s=size / loads / 1e6,
        kv_save_ms=saved["kv_save"],
    )
    yield


def _decode(bench: Bench, shape: dict[str, int], cursor: Cursor) -> Iterator[None]:
    end = cursor.mark

    def step(tokens: Sequence[int]) -> None:
        cursor.rewind(end)
        cursor.step(tokens)

    made = {}
    for count in range(1, MAX_DECODE_TOKENS + 1):
        made[str(count)] = bench.time(partial(step, words(count, 3000)))
    bench.add("decode step, ms by tokens", **shape, ms=made)
    yield


def _relocate(
    bench: Bench,
    shape: dict[str, int],
    cold: float,
    cursor: Cursor,
    segments: Segments,
    grid: Grid,
    seen: Callable[[int], Tensor],
) -> Iterator[None]:
    model, empty = native_model(bench.engine.model), cursor.mark
    store = RelocatableStore(KEPT_BYTES, bench.device)
    wanted = [PageSegment(ids, seen(i), grid) for i, ids in enumerate(segments.pages)]

    def capture() -> None:
        for number, page in enumerate(capture_pages(model, segments.head, wanted)):
            assert store.put(digest(number), page), "a page was refused: KEPT_BYTES is too small"

    bench.add("capture", **shape, ms=bench.time(capture))
    yield
    for share in SHARES:

        def read(share: float = share) -> None:
            cursor.rewind(empty)
            captured = [page for i in range(len(wanted)) if (page := store.get(digest(i)))]
            assert len(captured) == len(wanted), "a page was evicted: KEPT_BYTES is too small"
            pages = [PageSegment(w.token_ids, seen(i), grid) for i, w in enumerate(wanted)]
            cursor.read(segments.head)
            read_relocated(
                model,
                cursor.arena,
                cursor.position,
                pages,
                captured,
                segments.tail,
                words(QUESTION_TOKENS, 4000),
                Recompute(share),
            )

        ms = bench.time(read)
        bench.add("relocate", **shape, share=share, ms=ms, ratio=ms / cold)
        yield


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per list: ms where it says so, else shares of the cold time (of reading at once)."""
    head = ["pages", "tokens", "cold ms", "seen", "prompt", "GB/s", "segments", "T=1 ms", "T=8 ms"]
    head += [f"moved {share:.0%}" for share in SHARES]
    lines = ["  ".join(f"{cell:>9}" for cell in head)]
    for cold in (row for row in rows if row["what"] == "cold"):
        own = [r for r in rows if all(r.get(k) == cold[k] for k in ("pages", "page"))]
        by_name = {f"{r['what']} {r.get('share', '')}".strip(): r for r in own}
        hit, step = by_name.get("prompt seen"), by_name.get("decode step, ms by tokens")
        cells = [
            str(cold["pages"]),
            str(cold["page"]),
            f"{cold['ms']:.1f}",
            _ratio(by_name.get("pages seen")),
            _ratio(hit),
            f"{hit['kv_load_gb_s']:.1f}" if hit else "-",
            _ratio(by_name.get("segments")),
            f"{step['ms']['1']:.2f}" if step else "-",
            f"{step['ms']['8']:.2f}" if step else "-",
            *(_ratio(by_name.get(f"relocate {share}")) for share in SHARES),
        ]
        lines.append("  ".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)


def _ratio(row: dict[str, Any] | None) -> str:
    return f"{row['ratio']:.3f}" if row else "-"


def open_bench(out: Path, dry_run: bool) -> Bench:
    """Raises ValueError without a CUDA device, unless it is a dry run."""
    if not dry_run and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device; run it where there is one, or with --dry-run")
    device = torch.device("cpu" if dry_run else "cuda")
    spec = spec_of("tiny" if dry_run else "7b")
    model = random_model(spec, torch.float32 if dry_run else torch.bfloat16, device)
    name = "cpu" if dry_run else torch.cuda.get_device_name(device)
    about = {"device": name, "torch": torch.__version__, "dry_run": dry_run}
    return Bench(
        engine=Engine(model, device),
        grids={48: (1, 12, 16)} if dry_run else GRIDS,
        lists=(2, 3) if dry_run else LISTS,
        repeats=1 if dry_run else 5,
        step_seconds=10.0,
        path=out / "reuse-7b.json",
        about={**about, "cores": os.cpu_count(), "dtype": str(model.dtype)},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; 0 when every step was run, 75 when time was over before, 1 for errors."""
    parser = argparse.ArgumentParser(description="Time reuse at the 7B shape.")
    parser.add_argument("--out", type=Path, required=True, help="folder for reuse-7b.json")
    parser.add_argument("--seconds", type=float, default=540.0, help="no new step after this")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    options = parser.parse_args(argv)
    began = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        bench = open_bench(options.out, options.dry_run)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    bench.add("load", seconds=time.perf_counter() - began)
    over = False
    for _ in measure(bench):
        over = time.perf_counter() - began > options.seconds
        if over:
            break
    print(table(bench.rows))
    return EARLY if over else 0


if __name__ == "__main__":
    raise SystemExit(main())
