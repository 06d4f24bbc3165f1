"""Decode steps on a GPU: real kernels, real graphs, the same rows in any company."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.exporting import quick_export
from helpers.reading import png_pages, same_answer
from helpers.stepping import SMALL, WIDE_7B, Pair, copy, random_ids, read, step
from mmr5_kernels.target import Target
from mmr5_runtime import OutOfMemoryError, Reranker
from mmr5_runtime.capacity import KVFormat
from mmr5_runtime.engine import Engine
from mmr5_runtime.reuse.config import CacheConfig
from mmr5_runtime.spec import TextSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BOUND = 2e-2  # of logits, as on a CPU
QUANTS = ["bf16", "int4", "int4-asym", "int8", "int8-weight-only"]
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def mini_int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mini") / "int4"
    quick_export("mini", "int4", folder)
    return folder


def pair(text: TextSpec, quant: str, kv: KVFormat = "bf16", graphs: bool = True) -> Pair:
    return Pair(text, quant, kv, Target.of(GPU, "triton"), GPU, graphs)


@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize("text", [SMALL, WIDE_7B], ids=["small", "7b"])
@pytest.mark.parametrize("quant", QUANTS)
def test_logits_are_those_of_plain_torch(text: TextSpec, quant: str, kv: KVFormat) -> None:
    both = pair(text, quant, kv)
    arena, twin = read(both.plain, 300), read(both.plain, 300)
    ids = random_ids(3, seed=4)[None]
    found, expected = step(both.fused, ids, [arena]), step(both.plain, ids, [twin])
    assert (found - expected).norm() / expected.norm() <= BOUND


@pytest.mark.parametrize("quant", QUANTS)
def test_rows_graphs_and_company_change_no_bit(quant: str) -> None:
    both = pair(WIDE_7B, quant)
    engine = both.fused
    eager = Engine(engine.model, GPU, pair(SMALL, "bf16", graphs=False).fused.compute)
    arenas = [read(both.plain, n, seed) for seed, n in enumerate((7, 126, 300, 513, 90))]
    ids = random_ids(40, seed=9).view(5, 8)
    alone = [copy(arena, engine) for arena in arenas]
    rows = []
    for tokens, arena in zip(ids, alone, strict=True):
        rows.append([step(engine, tokens[i : i + 1][None], [arena])[0, 0] for i in range(8)])
    expected = torch.stack([torch.stack(row) for row in rows])
    for runner in (engine, eager):
        together = [copy(arena, runner) for arena in arenas]
        assert torch.equal(step(runner, ids, together), expected)
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one.k[:, :, : one.length], other.k[:, :, : one.length])


def test_tokens_chosen_on_the_device_and_steps_ahead_of_the_host() -> None:
    """Greedy decoding that never waits gives what waiting for every token gives."""
    engine = pair(SMALL, "int4").fused
    arena, ahead = read(engine, 20), read(engine, 20)
    token, chosen = torch.tensor([[3]]), torch.tensor([[3]], device=GPU)
    waited, queued = [], []
    for _ in range(8):
        token = step(engine, token, [arena]).argmax(-1).cpu()
        waited.append(int(token))
        chosen = step(engine, chosen, [ahead]).argmax(-1)
        queued.append(chosen)
    assert [int(each) for each in queued] == waited


def test_an_id_that_stands_for_no_token_does_not_end_the_process() -> None:
    engine = pair(SMALL, "bf16").fused
    step(engine, torch.tensor([[-1]], device=GPU), [read(engine, 5)])
    torch.cuda.synchronize()


def test_warming_up_records_and_later_steps_only_replay() -> None:
    engine = pair(SMALL, "int4").fused
    recorded = engine.warm_up(sequences=(1, 2), longest=1)
    assert recorded == 6
    step(engine, torch.tensor([[1]]), [read(engine, 20)])
    step(engine, torch.tensor([[1], [2]]), [read(engine, 20), read(engine, 9, seed=1)])
    assert engine._stepper is not None and len(engine._stepper.recordings) == recorded


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_warm_equals_cold_and_drafting_is_token_identical(mini_int4: Path, kv: KVFormat) -> None:
    pages = png_pages(4)
    with Reranker.load(mini_int4, "cuda", kernels="triton", kv=kv) as reranker:
        reranker.warm_up()
        cold = reranker.rerank("rainfall?", pages, max_new_tokens=60)
        warm = reranker.rerank("rainfall?", pages, max_new_tokens=60)
        assert same_answer(cold, warm)
    with Reranker.load(
        mini_int4, "cuda", kernels="triton", kv=kv, cache=CacheConfig.off()
    ) as reranker:
        again = reranker.rerank("rainfall?", pages, max_new_tokens=60)
        drafted = reranker.rerank("rainfall?", pages, max_new_tokens=60, draft=True)
    assert same_answer(cold, again)
    assert drafted.text == cold.text and drafted.order == cold.order


def test_running_out_of_memory_leaves_the_engine_usable(mini_int4: Path) -> None:
    pages = png_pages(4)
    with Reranker.load(mini_int4, "cuda", kernels="triton") as reranker:
        before = reranker.rerank("rainfall?", pages, max_new_tokens=8)
        free, _ = torch.cuda.mem_get_info(GPU)
        torch.cuda.empty_cache()
        hog = torch.empty(free - (8 << 20), dtype=torch.uint8, device=GPU)
        try:
            with pytest.raises(OutOfMemoryError, match="is free"):
                reranker.rerank("another question?", png_pages(20, seed=9))
        finally:
            del hog
            torch.cuda.empty_cache()
        assert same_answer(reranker.rerank("rainfall?", pages, max_new_tokens=8), before)
