"""Which engine loads a folder with graphs, and what is said when ONNX Runtime cannot."""

from __future__ import annotations

import ast
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mmr5_bench
from helpers.exporting import quick_export
from helpers.reading import (
    MAX_PIXELS,
    QUESTION,
    load,
    open_reranker,
    png_pages,
    same_answer,
)
from mmr5_export.onnx.ort import add_graphs
from mmr5_runtime import CacheConfig, EngineError, RequestError, Reranker, RerankResult
from mmr5_runtime.artifact import read_manifest
from mmr5_runtime.backends import BackendName
from mmr5_runtime.cursor import Cursor
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.loading import LoadedEngine, load_engine
from mmr5_runtime.model import Model, prefill, read_together
from mmr5_runtime.onnx.files import DECODER, GRAPHS, HEAD
from mmr5_runtime.onnx.loading import open_onnx, step_bytes
from mmr5_runtime.onnx.windows import window_inputs
from mmr5_runtime.types import ContextOverflowError

SHORT: dict[str, Any] = {"max_new_tokens": 6}

EngineFactory = Callable[[str], Path]


def _load(folder: Path, backend: str = "auto", **options: Any) -> LoadedEngine:
    given: dict[str, Any] = {"device": "cpu", "dtype": "auto", "check_hashes": False, **options}
    return load_engine(folder, min_pixels=None, max_pixels=None, backend=backend, **given)


def _step(loaded: LoadedEngine, ids: Tensor, arenas: Sequence[KVArena]) -> Tensor:
    """Logits [B, T, V] of ids [B, T], each sequence at the end of its arena."""
    starts = torch.tensor([[arena.length] for arena in arenas])
    return loaded.engine.step(ids, starts + torch.arange(ids.shape[1]), arenas)


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> EngineFactory:
    """Folders with graphs, by quantization."""
    root, made = tmp_path_factory.mktemp("graphs"), dict[str, Path]()

    def make(quant: str) -> Path:
        if quant not in made:
            made[quant] = root / quant
            quick_export(str(tiny_checkpoint), quant, made[quant])
            add_graphs(made[quant])
        return made[quant]

    return make


def test_auto_takes_graphs_for_quantized_engines_on_a_cpu(
    engine: EngineFactory, tiny_engine: EngineFactory
) -> None:
    faster = {"int4": True, "int8": True, "int8-weight-only": False, "bf16": False}
    for quant, known in faster.items():
        expected = "onnxruntime" if known else "native"
        found = _load(engine(quant))
        assert found.backend == found.info.backend == expected
        assert isinstance(found.engine.model, Model) == (expected == "native")
    assert _load(engine("bf16"), "onnxruntime").backend == "onnxruntime"
    assert _load(tiny_engine("int4")).backend == "native"  # has no graphs
    for option in ({"kv": "int8"}, {"dtype": "bfloat16"}, {"prefill": "int8"}):
        assert _load(engine("int4"), **option).backend == "native"
    assert _load(engine("int4"), dtype="float32", kernels="portable").backend == "onnxruntime"


@pytest.mark.parametrize(
    ("there", "remedy"),
    [(None, r"install mmr5-runtime\[onnxruntime\]"), ("1.30.2", "1.30.2 is too old .*>=1.31")],
)
def test_without_a_package_that_can_auto_is_native_and_says_so(
    engine: EngineFactory, monkeypatch: pytest.MonkeyPatch, there: str | None, remedy: str
) -> None:
    if there is None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as where it is not installed
    else:
        monkeypatch.setattr("onnxruntime.__version__", there)
    with pytest.warns(RuntimeWarning, match=remedy) as caught:
        with Reranker.load(engine("int4"), "cpu") as reranker:
            assert reranker.info.backend == "native"
    assert caught[0].filename == __file__
    with pytest.raises(EngineError, match=f"{remedy}.* backend='native'"):
        Reranker.load(engine("int4"), "cpu", backend="onnxruntime")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorflow"}, "backend='tensorflow' is unknown; pass auto, native"),
        ({"backend": "onnxruntime", "kv": "int8"}, "kv='int8' is for the native engine"),
        ({"backend": "onnxruntime", "dtype": "bfloat16"}, "dtype='bfloat16' is for the native"),
        ({"backend": "onnxruntime", "prefill": "int8"}, "prefill='int8' is for the native"),
        ({"backend": "onnxruntime", "graphs": True}, "graphs=True is for the native"),
    ],
)
def test_options_it_does_not_have(
    engine: EngineFactory, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        _load(engine("int4"), **options)


def test_a_folder_without_graphs(tiny_engine: EngineFactory) -> None:
    with pytest.raises(EngineError, match="has no graphs .* --backend onnxruntime"):
        _load(tiny_engine("int4"), "onnxruntime")


def test_a_graph_that_is_damaged(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    quick_export(str(tiny_checkpoint), "int4", folder)
    add_graphs(folder)
    content = bytearray((folder / DECODER).read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    (folder / DECODER).write_bytes(content)
    with pytest.raises(EngineError, match=r"decoder.onnx was altered"):
        _load(folder, "onnxruntime", check_hashes=True)
    with pytest.raises(EngineError, match=r"decoder.onnx cannot be loaded by onnxruntime"):
        _load(folder, "onnxruntime")


def test_another_device(engine: EngineFactory) -> None:
    folder = engine("int4")
    with pytest.raises(EngineError, match="float32 on a CPU, and cuda was asked for"):
        open_onnx(folder, read_manifest(folder), torch.device("cuda"))


def test_engines_of_one_folder_do_not_share_what_they_computed(
    engine: EngineFactory, tiny_engine: EngineFactory, tmp_path: Path
) -> None:
    by = {backend: _load(engine("int4"), backend) for backend in ("native", "onnxruntime")}
    assert by["native"].identity != by["onnxruntime"].identity
    assert by["native"].identity == _load(tiny_engine("int4")).identity  # graphs change nothing
    cache = CacheConfig(disk=tmp_path / "pages")
    pages = png_pages(2)
    names: tuple[BackendName, ...] = ("native", "onnxruntime")
    for backend in names:
        with Reranker.load(engine("int4"), "cpu", cache=cache, backend=backend) as reranker:
            encoded = [reranker.rerank(QUESTION, pages, **SHORT).cache.pages_encoded]
            reranker.cache.clear()
            encoded.append(reranker.rerank(QUESTION, pages, **SHORT).cache.pages_encoded)
            assert encoded == [2, 0]  # the second time from this backend's own files


def test_the_arena_is_written_in_place_and_overflows_as_ever(engine: EngineFactory) -> None:
    loaded = load(engine("int4"), backend="onnxruntime")
    arena = loaded.engine.model.new_arena(6)
    place = arena.k.data_ptr()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    _step(loaded, ids, [arena])
    assert arena.length == 5 and arena.k.data_ptr() == place
    assert bool(arena.k[:, :, :5].any(-1).all()) and not arena.k[:, :, 5].any()
    with pytest.raises(ContextOverflowError):
        _step(loaded, ids[:, :2], [arena])
    assert arena.length == 5 and not arena.k[:, :, 5].any()


@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize("quant", ["int4", "int8", "bf16"])
def test_sequences_of_one_step_do_not_touch_each_other(
    engine: EngineFactory, quant: str, tokens: int
) -> None:
    loaded = load(engine(quant), backend="onnxruntime")
    assert loaded.engine.independent_sequences
    generator = torch.Generator().manual_seed(tokens)
    behind = (0, 1, 5, 6)
    ids = torch.randint(5, 400, (len(behind), tokens), generator=generator)

    def started(length: int, capacity: int) -> KVArena:
        arena = loaded.engine.model.new_arena(capacity)
        if length:
            _step(loaded, torch.arange(20, 20 + length)[None], [arena])
        return arena

    together = [started(length, 14 + i) for i, length in enumerate(behind)]
    rows = _step(loaded, ids, together)
    for i, length in enumerate(behind):
        alone = started(length, 30)
        assert torch.equal(_step(loaded, ids[i : i + 1], [alone])[0], rows[i])
        ours, others = (arena.view(0, length + tokens) for arena in (alone, together[i]))
        assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize("quant", ["int4", "int8", "bf16"])
def test_prompts_read_together_are_those_read_alone(engine: EngineFactory, quant: str) -> None:
    model = load(engine(quant), backend="onnxruntime").engine.model
    lengths = (9, 1, 17)
    embeds = [model.embed(torch.arange(7, 7 + length)) for length in lengths]
    places = [torch.arange(length).expand(3, -1) for length in lengths]
    rows = read_together(model, embeds, places, [model.new_arena(20) for _ in lengths])
    for i, row in enumerate(rows):
        assert torch.equal(prefill(model, embeds[i], places[i], model.new_arena(40)), row)


def test_a_step_that_fails_for_its_second_sequence(engine: EngineFactory) -> None:
    """The first has been run by then; arenas and their bindings are usable as before."""
    loaded = load(engine("int4"), backend="onnxruntime")
    model = loaded.engine.model
    one, twin, full = (model.new_arena(capacity) for capacity in (9, 9, 3))
    foreign = KVArena(replace(model.spec.text, num_layers=1), 9)  # of another model
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    for arena in (one, twin, full):
        _step(loaded, ids[:1], [arena])
    with pytest.raises(ContextOverflowError):
        _step(loaded, ids, [one, full])
    with pytest.raises(EngineError, match="onnxruntime failed in a graph .*past_key.1"):
        _step(loaded, ids + 20, [one, foreign])
    with pytest.raises(IndexError):  # an id that the model does not have
        _step(loaded, ids[:1] + model.spec.text.vocab_size, [one])
    assert (one.length, full.length, foreign.length) == (3, 3, 0)
    for _ in range(2):
        assert torch.equal(_step(loaded, ids[1:], [one]), _step(loaded, ids[1:], [twin]))
    assert torch.equal(one.k, twin.k) and torch.equal(one.v, twin.v)


@pytest.mark.parametrize("quant", ["int4", "int8", "bf16"])
def test_answers_of_the_model_itself_in_company(
    engine: EngineFactory, quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model begins no list by itself; told to, it goes on by its own logits."""
    asked: list[dict[str, Any]] = [
        {"think": "off", "stop": "tag"},
        {"think": "off", "stop": "tag", "temperature": 0.7, "seed": 3},
        {"stop": "eos", "constrain": False},
        {"think": 6, "stop": "tag"},
    ]
    options: dict[str, Any] = {"max_pixels": MAX_PIXELS, "cache": CacheConfig.off()}

    def ask(reranker: Reranker, n: int) -> RerankResult:
        return reranker.rerank(f"Question {n}?", png_pages(4, n), max_new_tokens=24, **asked[n])

    with open_reranker(engine(quant), "onnxruntime", **options) as single:
        alone = [ask(single, n) for n in range(len(asked))]
    everyone, together = threading.Barrier(len(asked)), Cursor.together

    def wait(cursor: Cursor) -> Any:
        everyone.wait(60.0)
        return together(cursor)

    monkeypatch.setattr(Cursor, "together", wait)
    many = open_reranker(engine(quant), "onnxruntime", concurrency=len(asked), **options)
    with many, ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda n: ask(many, n), range(len(asked)), timeout=60.0))
        assert many._batcher is not None and many._batcher.passes < many._batcher.steps / 2
    for n, (one, other) in enumerate(zip(found, alone, strict=True)):
        assert same_answer(one, other) and one.exactness == other.exactness
        assert bool(one.list_logprob) == (n != 2)
    assert found[2].exactness == "bit_identical"


def test_logits_that_are_no_numbers_name_a_layer(engine: EngineFactory) -> None:
    loaded = load(engine("int4"), backend="onnxruntime")
    arena = loaded.engine.model.new_arena(8)
    loaded.engine.step(torch.tensor([[5, 6]]), torch.arange(2)[None], [arena])
    arena.v[1, 0, 1, 3] = float("nan")
    error = loaded.engine.not_finite(6, 1, arena)
    assert "first in layer 0, or the keys and values of layer 1;" in str(error)
    arena.v[1, 0, 1, 3], arena.k[0, 0, 0, 0] = 0, float("inf")
    error = loaded.engine.not_finite(6, 1, arena)
    assert "first in the embeddings, or the keys and values of layer 0;" in str(error)


def test_windows_hold_every_patch_once(engine: EngineFactory) -> None:
    vision = read_manifest(engine("int4")).spec.vision
    for grid in ((1, 2, 2), (1, 8, 8), (1, 26, 18), (1, 10, 40)):
        windows, mask, places = window_inputs(grid, vision)
        assert windows.shape == mask.shape and mask.dtype == torch.int32
        shown = windows.flatten()[mask.flatten().bool()]
        assert sorted(shown.tolist()) == list(range(grid[1] * grid[2]))
        assert torch.equal(windows.flatten()[places], torch.arange(grid[1] * grid[2]))
        assert not windows[mask == 0].any()


def test_weights_that_a_step_reads(engine: EngineFactory) -> None:
    manifest = read_manifest(engine("int4"))
    counted = step_bytes(manifest.spec, manifest.formats)
    assert counted == _load(engine("int4")).info.step_bytes
    int4, bf16 = (read_manifest(engine(quant)) for quant in ("int4", "bf16"))
    dense = step_bytes(bf16.spec, bf16.formats)
    text = bf16.spec.text
    layer = text.hidden_size * (2 * text.q_size + 2 * text.kv_size + 3 * text.intermediate_size)
    layer += text.q_size + 2 * text.kv_size  # biases
    assert dense == 4 * (text.num_layers * layer + text.vocab_size * text.hidden_size)
    assert 0 < step_bytes(int4.spec, int4.formats) < dense / 5


def test_graphs_are_named_in_the_manifest(engine: EngineFactory) -> None:
    manifest = read_manifest(engine("int4"))
    assert set(manifest.backends["onnxruntime"].files) == set(GRAPHS)
    assert not set(GRAPHS) & set(manifest.native_files)


def test_benchmarks_say_which_engine_they_measure() -> None:
    """A folder with graphs would give them other numbers under the native engine's name."""
    calls = [
        (path.name, call)
        for path in Path(mmr5_bench.__path__[0]).rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("Reranker.load")
    ]
    assert len(calls) > 4
    for name, call in calls:
        assert "backend" in [keyword.arg for keyword in call.keywords], name


def test_others_in_the_process_can_still_open_sessions(engine: EngineFactory) -> None:
    """A retriever in the same service, with options of its own, before and after ours."""
    import onnxruntime

    load(engine("int4"), backend="onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    theirs = onnxruntime.InferenceSession(str(engine("int4") / HEAD), options)
    assert [given.name for given in theirs.get_inputs()] == ["hidden"]


def test_threads_may_change_between_two_loads(engine: EngineFactory) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            loaded = load(engine("int4"), backend="onnxruntime")
            arena = loaded.engine.model.new_arena(4)
            logits = loaded.engine.step(torch.tensor([[5]]), torch.tensor([[0]]), [arena])
            assert bool(torch.isfinite(logits).all())
    finally:
        torch.set_num_threads(before)
