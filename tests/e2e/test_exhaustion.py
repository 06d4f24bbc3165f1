"""Running out of memory in the middle of a request: the message, and an engine that goes on."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.pictures import noise
from helpers.reading import MAX_PIXELS
from mmr5_bench.random_weights.shapes import spec_of
from mmr5_runtime import OutOfMemoryError, Reranker
from mmr5_runtime.capacity import Need
from mmr5_runtime.cli import main
from mmr5_runtime.exhaustion import (
    is_exhaustion,
    memory_errors,
    page_shortage,
    prompt_shortage,
    weights_shortage,
)
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.model import Model

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PAGES = [noise(56, 56, seed) for seed in range(3)]
BIG = spec_of("7b")
GIB = 1 << 30


def no_memory(*_: object, **__: object) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def reranker(tiny_engine: Callable[[str], Path]) -> Reranker:
    return Reranker.load(tiny_engine("int4"), "cpu", max_pixels=MAX_PIXELS)


def test_a_request_whose_arena_does_not_fit(
    reranker: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = reranker.rerank("rain?", PAGES, max_new_tokens=4)
    with monkeypatch.context() as patch:
        patch.setattr(Model, "new_arena", no_memory)
        with pytest.raises(OutOfMemoryError) as caught:
            reranker.rerank("rain?", PAGES, max_new_tokens=4)
    message = str(caught.value)
    assert "a prompt over 3 pages of up to 4 tokens" in message
    assert "for keys and values" in message and "kv='int8'" in message
    assert caught.value.__context__ is None  # it would keep everything alive that was allocated
    assert reranker.rerank("rain?", PAGES, max_new_tokens=4).text == before.text


def test_a_request_that_runs_out_in_the_middle_lets_go_of_its_arena(
    reranker: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[KVArena]] = []
    new_arena = Model.new_arena

    def watched(model: Model, capacity: int) -> KVArena:
        arena = new_arena(model, capacity)
        made.append(weakref.ref(arena))
        return arena

    with monkeypatch.context() as patch:
        patch.setattr(Model, "new_arena", watched)
        patch.setattr("mmr5_runtime.model.causal_attention", no_memory)
        with pytest.raises(OutOfMemoryError) as caught:
            reranker.rerank("rain?", PAGES, max_new_tokens=4)
    assert made and all(arena() is None for arena in made), "while the error is still at hand"
    del caught
    assert reranker.rerank("rain?", PAGES, max_new_tokens=4).order


def test_a_page_that_cannot_be_encoded(reranker: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("mmr5_runtime.vision.window_attention", no_memory)
        with pytest.raises(OutOfMemoryError, match="encoding a page of 4 tokens takes about"):
            reranker.open_document(PAGES)
    with monkeypatch.context() as patch:
        patch.setattr("mmr5_runtime.vision.window_attention", no_memory)
        with pytest.raises(OutOfMemoryError, match="encoding a page of 4 tokens takes about"):
            reranker.rerank("rain?", PAGES)  # inside a prompt, whose own message would be vaguer
    with reranker.open_document(PAGES) as document:
        assert document.rerank("rain?", max_new_tokens=4).order


def test_weights_that_do_not_fit(
    tiny_engine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "from_tensors", no_memory)
    with pytest.raises(OutOfMemoryError, match="the weights of this engine take .* MiB; load an"):
        Reranker.load(tiny_engine("int4"), "cpu")


def test_the_command_line_says_it_in_one_line(
    tiny_engine: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = []
    for number, page in enumerate(PAGES):
        page.save(tmp_path / f"{number}.png")
        paths.append(str(tmp_path / f"{number}.png"))
    monkeypatch.setattr(Model, "new_arena", no_memory)
    assert main(["--engine", str(tiny_engine("int4")), "--device", "cpu", "rain?", *paths]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mmr5-rerank: error: cpu ran out of memory: ")
    assert error.count("\n") == 1


def test_what_would_fit_is_named() -> None:
    need = Need.of(BIG, torch.bfloat16, "bf16", pages=20, page_tokens=1280, other_tokens=2000)
    message = prompt_shortage(need, GPU, GIB, BIG.vision.factor, "bf16")
    fitting = need.pages_within(GIB)
    assert 0 < fitting < 20 and f"window={fitting}" in message
    pixels = need.page_tokens_within(GIB) * 28 * 28
    assert f"max_pixels={pixels}" in message and "kv='int8'" in message
    assert "cuda:0" in message and "20 pages of up to 1280 tokens" in message
    assert "1.00 GiB is free" in message
    nothing = prompt_shortage(need, GPU, 0, BIG.vision.factor, "int8")
    assert nothing.endswith("; free memory that other programs hold.")


def test_what_would_fit_of_a_page_and_of_weights() -> None:
    message = page_shortage(BIG.vision, torch.bfloat16, 4 * 1280, GPU, 30 << 20)
    assert "encoding a page of 1280 tokens" in message and "max_pixels=" in message
    assert int(message.rpartition("=")[2].rstrip(".")) < 1280 * 28 * 28
    assert "free memory" in page_shortage(BIG.vision, torch.bfloat16, 4, GPU, 0)
    assert "take 7.00 GiB, and 1.00 GiB is free" in weights_shortage(7 * GIB, GPU, GIB)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_say_that_memory_is_over(error: Exception, expected: bool) -> None:
    assert is_exhaustion(error) == expected


def test_other_errors_pass_and_so_do_results() -> None:
    def explain(free: int | None) -> str:
        raise AssertionError("nothing ran out")

    with pytest.raises(RuntimeError, match="shapes"), memory_errors(CPU, explain):
        raise RuntimeError("shapes do not match")
    with memory_errors(CPU, explain):
        held: list[Tensor] = [torch.ones(1)]
    assert held


def test_what_the_body_held_is_gone_when_the_message_is_made() -> None:
    class Block:
        pass

    made: list[weakref.ref[Block]] = []

    def fill() -> None:
        block = Block()
        made.append(weakref.ref(block))
        no_memory()

    def explain(free: int | None) -> str:
        return f"alive: {made[0]() is not None}, free: {free}"

    with pytest.raises(OutOfMemoryError, match="alive: False, free: None"):
        with memory_errors(CPU, explain):
            fill()
