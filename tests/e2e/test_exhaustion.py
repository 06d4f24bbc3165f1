"""Running out of memory in the middle of a request: the message, and an engine that goes on."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.pictures import noise
from helpers.reading import MAX_PIXELS, open_reranker
from helpers.starving import no_memory, starve
from mmr5_bench.random_weights.shapes import spec_of
from mmr5_runtime import OutOfMemoryError, Reranker
from mmr5_runtime.backends import BackendName
from mmr5_runtime.capacity import Need
from mmr5_runtime.cli import main
from mmr5_runtime.engine import Engine
from mmr5_runtime.exhaustion import (
    is_exhaustion,
    memory_errors,
    page_shortage,
    prompt_shortage,
    weights_shortage,
)
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.model import Model
from mmr5_runtime.onnx.model import OnnxModel
from mmr5_runtime.reuse.host_memory import host_block

BACKENDS = ("native", "onnxruntime")
MODELS: dict[str, Any] = {"native": Model, "onnxruntime": OnnxModel}
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PAGES = [noise(56, 56, seed) for seed in range(3)]
BIG = spec_of("7b")
GIB = 1 << 30


@pytest.fixture(params=[1, 2])
def reranker(
    tiny_engine: Callable[[str], Path], backend: BackendName, request: pytest.FixtureRequest
) -> Reranker:
    options = {"max_pixels": MAX_PIXELS, "concurrency": request.param}
    return open_reranker(tiny_engine("int4"), backend, **options)


def test_a_request_whose_arena_does_not_fit(
    reranker: Reranker, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = reranker.rerank("rain?", PAGES, max_new_tokens=4)
    with monkeypatch.context() as patch:
        patch.setattr(MODELS[backend], "new_arena", no_memory)
        with pytest.raises(OutOfMemoryError) as caught:
            reranker.rerank("rain?", PAGES, max_new_tokens=4)
    message = str(caught.value)
    assert "a prompt over 3 pages of up to 4 tokens" in message
    assert "for keys and values" in message
    assert ("kv='int8'" in message) == (backend == "native")  # the only one that has it
    assert caught.value.__context__ is None  # it would keep everything alive that was allocated
    assert reranker.rerank("rain?", PAGES, max_new_tokens=4).text == before.text


def _watch(patch: pytest.MonkeyPatch, backend: str) -> list[weakref.ref[KVArena]]:
    """Every arena that is made from now on."""
    made: list[weakref.ref[KVArena]] = []
    new_arena = MODELS[backend].new_arena

    def watched(model: Any, capacity: int) -> KVArena:
        arena: KVArena = new_arena(model, capacity)
        made.append(weakref.ref(arena))
        return arena

    patch.setattr(MODELS[backend], "new_arena", watched)
    return made


def test_a_request_that_runs_out_in_the_middle_lets_go_of_its_arena(
    reranker: Reranker,
    backend: str,
    tiny_engine: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        made = _watch(patch, backend)
        starve(patch, reranker, "decoder", tiny_engine("int4"))
        with pytest.raises(OutOfMemoryError) as caught:
            reranker.rerank("rain?", PAGES, max_new_tokens=4)
    assert made and all(arena() is None for arena in made), "while the error is still at hand"
    del caught
    assert reranker.rerank("rain?", PAGES, max_new_tokens=4).order


def test_memory_that_runs_out_in_a_decode_step_is_free_when_the_message_is_made(
    reranker: Reranker, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits for the collector of cycles, which may not come by for long."""
    made = _watch(monkeypatch, backend)
    alive: list[int] = []
    step = Engine.step

    def few(engine: Engine, *args: Any) -> Tensor:
        steps.append(1)
        rows = step(engine, *args)
        return rows if len(steps) < 3 else no_memory()

    def look(device: torch.device) -> None:
        alive.append(sum(arena() is not None for arena in made))

    steps: list[int] = []
    monkeypatch.setattr("mmr5_runtime.exhaustion.free_bytes", look)
    gc.collect()
    gc.disable()
    try:
        reranker.rerank("rain?", PAGES, max_new_tokens=4, stop="eos")
        assert made and not any(arena() is not None for arena in made)
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "step", few)
            with pytest.raises(OutOfMemoryError):
                reranker.rerank("other?", PAGES, max_new_tokens=8, stop="eos")
        assert len(steps) == 3 and len(made) == 2 and alive == [0]
    finally:
        gc.enable()


def test_a_page_that_cannot_be_encoded(
    reranker: Reranker, tiny_engine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        starve(patch, reranker, "vision", tiny_engine("int4"))
        with pytest.raises(OutOfMemoryError, match="encoding a page of 4 tokens takes about"):
            reranker.open_document(PAGES)
        with pytest.raises(OutOfMemoryError, match="encoding a page of 4 tokens takes about"):
            reranker.rerank("rain?", PAGES)  # inside a prompt, whose own message would be vaguer
    with reranker.open_document(PAGES) as document:
        assert document.rerank("rain?", max_new_tokens=4).order


def test_weights_that_do_not_fit(
    tiny_engine: Callable[[str], Path], backend: BackendName, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "native":
        monkeypatch.setattr(Model, "from_tensors", no_memory)
        message = "the weights of this engine take .* MiB; load an"
    else:
        monkeypatch.setattr("mmr5_runtime.onnx.model.open_session", no_memory)
        message = "the weights do not fit .*; free memory, or load with backend='native'"
    with pytest.raises(OutOfMemoryError, match=message):
        open_reranker(tiny_engine("int4"), backend)


def test_the_command_line_says_it_in_one_line(
    tiny_engine: Callable[[str], Path],
    backend: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = []
    for number, page in enumerate(PAGES):
        page.save(tmp_path / f"{number}.png")
        paths.append(str(tmp_path / f"{number}.png"))
    monkeypatch.setattr(MODELS[backend], "new_arena", no_memory)
    options = ["--engine", str(tiny_engine("int4")), "--device", "cpu", "--backend", backend]
    assert main([*options, "rain?", *paths]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mmr5-rerank: error: cpu ran out of memory: ")
    assert error.count("\n") == 1


def test_what_would_fit_is_named() -> None:
    need = Need.of(BIG, torch.bfloat16, "bf16", pages=20, page_tokens=1280, other_tokens=2000)
    message = prompt_shortage(need, GPU, GIB, BIG.vision.factor, True)
    fitting = need.pages_within(GIB)
    assert 0 < fitting < 20 and f"window={fitting}" in message
    pixels = need.page_tokens_within(GIB) * 28 * 28
    assert f"max_pixels={pixels}" in message and "kv='int8'" in message
    assert "cuda:0" in message and "20 pages of up to 1280 tokens" in message
    assert "1.00 GiB is free" in message
    nothing = prompt_shortage(need, GPU, 0, BIG.vision.factor, False)
    assert nothing.endswith("; free memory that other programs hold.")


def test_what_would_fit_of_a_page_and_of_weights() -> None:
    message = page_shortage(BIG.vision, torch.bfloat16, 4 * 1280, GPU, 30 << 20)
    assert "encoding a page of 1280 tokens" in message and "max_pixels=" in message
    assert int(message.rpartition("=")[2].rstrip(".")) < 1280 * 28 * 28
    assert "free memory" in page_shortage(BIG.vision, torch.bfloat16, 4, GPU, 0)
    assert "take 7.00 GiB, and 1.00 GiB is free" in weights_shortage(7 * GIB, GPU, GIB)


def test_options_that_keep_weights_twice_are_named() -> None:
    message = weights_shortage(12 * GIB, GPU, GIB, prefill="fp8", kernels="cuda")
    assert "with the second copy that prefill='fp8' makes" in message
    assert "; load with prefill='exact', or load with kernels='triton'" in message
    plain = weights_shortage(12 * GIB, GPU, GIB, kernels="triton")
    assert "prefill" not in plain and "kernels=" not in plain


def test_main_memory_is_named_where_the_device_has_enough() -> None:
    need = Need.of(BIG, torch.bfloat16, "bf16", pages=2, page_tokens=1280, other_tokens=2000)
    enough = need.total
    messages = [
        prompt_shortage(need, GPU, enough, BIG.vision.factor, True),
        page_shortage(BIG.vision, torch.bfloat16, 4 * 1280, GPU, enough),
        weights_shortage(GIB, GPU, GIB),
    ]
    for message in messages:
        assert message.startswith("main memory probably ran out: ")
        assert "lower embeddings_gib and kv_gib" in message and "cuda:0 ran" not in message
    assert messages[0].count("iB is free on cuda:0") == 1
    assert "main memory" not in prompt_shortage(need, GPU, enough - 1, BIG.vision.factor, True)


def no_host_memory(*_: object, **__: object) -> Any:
    raise RuntimeError("CUDA error: out of memory")  # as page-locked memory has it


def test_caches_that_get_no_memory_refuse_and_serving_goes_on(
    reranker: Reranker, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = reranker.rerank("rain?", PAGES, max_new_tokens=4)
    reranker.cache.clear()
    before = reranker.cache.stats()
    for store in ("encoder_cache", "segments", "relocate_store"):
        monkeypatch.setattr(f"mmr5_runtime.reuse.{store}.host_block", lambda *_: None)
    found = reranker.rerank("rain?", PAGES, max_new_tokens=4)
    assert (found.text, found.order) == (wanted.text, wanted.order)
    if backend == "native":  # no other moves pages
        moved = reranker.rerank("rain?", PAGES, max_new_tokens=4, image_kv="relocate")
        assert moved.order
        after = reranker.cache.stats().relocatable
        assert after.refused > before.relocatable.refused
    stats = reranker.cache.stats()
    assert stats.encoder.refused - before.encoder.refused >= len(PAGES)
    assert stats.segments.refused > before.segments.refused
    assert stats.encoder.host.entries == stats.segments.entries == stats.relocatable.entries == 0
    with pytest.raises(OutOfMemoryError, match="main memory has no .* one more pinned page"):
        reranker.open_document(PAGES)


def test_host_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host_block((2, 3), torch.int8, CPU).shape == (2, 3)  # type: ignore[union-attr]
    monkeypatch.setattr("mmr5_runtime.reuse.host_memory.torch.empty", no_host_memory)
    assert host_block((2, 3), torch.int8, CPU) is None

    def broken(*_: object, **__: object) -> Any:
        raise RuntimeError("no such dtype")

    monkeypatch.setattr("mmr5_runtime.reuse.host_memory.torch.empty", broken)
    with pytest.raises(RuntimeError, match="no such dtype"):
        host_block((2, 3), torch.int8, CPU)


def test_an_engine_whose_tables_do_not_fit(
    tiny_engine: Callable[[str], Path], backend: BackendName, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "loading" if backend == "native" else "onnx.loading"
    monkeypatch.setattr(f"mmr5_runtime.{module}.Engine", no_memory)
    with pytest.raises(OutOfMemoryError, match="the weights (of this engine take|do not fit)"):
        open_reranker(tiny_engine("int4"), backend)


def test_steps_that_cannot_be_recorded(reranker: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "warm_up", no_memory)
        with pytest.raises(OutOfMemoryError, match="recording decode steps .* graphs=False"):
            reranker.warm_up()
    assert reranker.warm_up() == 0 and reranker.rerank("rain?", PAGES, max_new_tokens=4).order


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
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
