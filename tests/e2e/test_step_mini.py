"""Mini with its decode steps on the kernels, in Triton's interpreter: the same answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from helpers.exporting import quick_export
from helpers.pictures import noise
from helpers.stepping import copy, step
from mmr5_kernels.target import INTERPRETED
from mmr5_runtime import Reranker
from mmr5_runtime.compute import Compute
from mmr5_runtime.decoder import DecoderLayer
from mmr5_runtime.engine import Engine
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.loading import LoadedEngine, load_engine
from mmr5_runtime.memory import Memory
from mmr5_runtime.model import embed_prompt, native_model, prefill
from mmr5_runtime.pages import DEFAULT_MAX_IMAGE_PIXELS
from mmr5_runtime.reuse.config import CacheConfig
from mmr5_runtime.types import EngineError

CPU = torch.device("cpu")
PAGES = [noise(56, 56, seed) for seed in range(3)]
BOUND = 2e-2  # relative error of logits against the portable kernels of the same format

Exported = Callable[[str], Path]


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    made: dict[str, Path] = {}

    def export(quant: str) -> Path:
        if quant not in made:
            made[quant] = tmp_path_factory.mktemp("mini") / quant
            quick_export("mini", quant, made[quant])
        return made[quant]

    return export


def load(folder: Path, interpreted: bool) -> LoadedEngine:
    return load_engine(
        folder,
        device="cpu",
        dtype="bfloat16",
        min_pixels=None,
        max_pixels=None,
        check_hashes=False,
        target=INTERPRETED if interpreted else None,
    )


def text_arena(engine: Engine, prompt: Sequence[int]) -> tuple[KVArena, int]:
    """An arena that holds the prompt, and the greedy token behind it."""
    ids = torch.tensor(prompt)
    arena = engine.model.new_arena(len(ids) + 8)
    with torch.inference_mode():
        places = torch.arange(len(ids)).expand(3, -1)
        logits = prefill(engine.model, embed_prompt(engine.model, ids, []), places, arena)
    return arena, int(logits.argmax())


@pytest.mark.slow
def test_greedy_tokens_of_whole_layers_on_kernels(mini: Exported) -> None:
    plain, fused = (load(mini("int4"), interpreted) for interpreted in (False, True))
    assert fused.info.kernels == "triton" and plain.info.kernels == "portable"
    assert fused.identity != plain.identity
    prompt = plain.tokenizer.segments("Which page shows the rainfall?", [4]).head
    twin, token = text_arena(plain.engine, prompt)
    arena = copy(twin, fused.engine)
    ids = torch.tensor([[token]])
    found, expected = step(fused.engine, ids, [arena]), step(plain.engine, ids, [twin])
    assert (found - expected).norm() / expected.norm() <= BOUND
    assert found.argmax() == expected.argmax()


def test_a_rerank_with_attention_on_kernels(mini: Exported) -> None:
    """Pages, decoding, drafts; linears in plain torch, for the interpreter's sake."""
    plain = load(mini("bf16"), False)
    compute = Compute(CPU, torch.bfloat16, INTERPRETED)
    fused = dataclasses.replace(plain, engine=Engine(plain.engine.model, CPU, compute))
    answers = []
    for loaded, draft in ((plain, False), (fused, True)):
        memory = Memory(CacheConfig.off(), loaded, DEFAULT_MAX_IMAGE_PIXELS)
        with Reranker(loaded, memory) as reranker:
            result = reranker.rerank("rainfall?", PAGES, max_new_tokens=4, draft=draft)
        answers.append((result.text, result.order))
    assert answers[0] == answers[1]


def test_warming_up_leaves_no_trace(mini: Exported) -> None:
    with Reranker.load(mini("bf16"), "cpu", dtype="bfloat16") as reranker:
        assert reranker.warm_up() == 0  # nothing to record in plain torch
        stats = reranker.cache.stats()
        assert stats.segments.entries == stats.encoder.host.entries == 0
        result = reranker.rerank("rainfall?", PAGES, max_new_tokens=2)
        assert result.cache.pages_encoded == 3 and result.cache.pages_remembered == 0


def test_damaged_weights_are_named_in_a_request(mini: Exported) -> None:
    with Reranker.load(mini("bf16"), "cpu") as reranker:
        assert reranker._loaded is not None
        layer = native_model(reranker._loaded.engine.model).decoder.layers[2]
        assert isinstance(layer, DecoderLayer)
        layer.mlp.down.prepared.operands["dense"]["weight"][3, 5] = float("nan")
        with pytest.raises(EngineError, match="not finite, first in layer 2, down_proj"):
            reranker.rerank("rainfall?", PAGES, max_new_tokens=4)
