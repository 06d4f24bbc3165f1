"""Which engine loads a folder with graphs, and what is said when ONNX Runtime cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.exporting import add_graphs, quick_export
from helpers.reading import QUESTION, load, png_pages
from mmr5_runtime import CacheConfig, EngineError, RequestError, Reranker
from mmr5_runtime.artifact import read_manifest
from mmr5_runtime.backends import BackendName
from mmr5_runtime.loading import LoadedEngine, load_engine
from mmr5_runtime.model import Model
from mmr5_runtime.onnx import session
from mmr5_runtime.onnx.files import DECODER, GRAPHS
from mmr5_runtime.onnx.loading import step_bytes
from mmr5_runtime.onnx.model import OnnxModel
from mmr5_runtime.onnx.windows import window_inputs
from mmr5_runtime.types import ContextOverflowError

SHORT: dict[str, Any] = {"max_new_tokens": 6}

EngineFactory = Callable[[str], Path]


def _load(folder: Path, backend: str = "auto", **options: Any) -> LoadedEngine:
    given: dict[str, Any] = {"device": "cpu", "dtype": "auto", "check_hashes": False, **options}
    return load_engine(folder, min_pixels=None, max_pixels=None, backend=backend, **given)


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
    for quant, expected in (("int4", "onnxruntime"), ("int8", "onnxruntime"), ("bf16", "native")):
        found = _load(engine(quant))
        assert found.backend == found.info.backend == expected
        assert isinstance(found.engine.model, Model) == (expected == "native")
    assert _load(engine("bf16"), "onnxruntime").backend == "onnxruntime"
    assert _load(tiny_engine("int4")).backend == "native"  # has no graphs
    for option in ({"kv": "int8"}, {"dtype": "bfloat16"}, {"prefill": "int8"}):
        assert _load(engine("int4"), **option).backend == "native"
    assert _load(engine("int4"), dtype="float32", kernels="portable").backend == "onnxruntime"


def test_auto_without_the_package_is_native_and_says_so(
    engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "PACKAGE", "no_such_onnxruntime")
    with pytest.warns(RuntimeWarning, match=r"install mmr5-runtime\[onnxruntime\]"):
        assert _load(engine("int4")).backend == "native"


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


def test_a_package_without_the_provider() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    with pytest.raises(EngineError, match="has no CUDAExecutionProvider .* onnxruntime-gpu"):
        session.provider(torch.device("cuda"))


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
    loaded = load(engine("int4"))
    model = loaded.engine.model
    assert isinstance(model, OnnxModel)
    arena = model.new_arena(6)
    place = arena.k.data_ptr()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    loaded.engine.step(ids, torch.arange(5)[None], [arena])
    assert arena.length == 5 and arena.k.data_ptr() == place
    assert bool(arena.k[:, :, :5].any(-1).all()) and not arena.k[:, :, 5].any()
    with pytest.raises(ContextOverflowError):
        loaded.engine.step(ids[:, :2], torch.arange(5, 7)[None], [arena])
    assert arena.length == 5 and not arena.k[:, :, 5].any()


def test_sequences_of_one_step_do_not_touch_each_other(engine: EngineFactory) -> None:
    loaded = load(engine("int4"))
    model, ids = loaded.engine.model, torch.tensor([[5, 6], [7, 8], [9, 10]])
    positions = torch.arange(2).expand(3, 2)
    together = [model.new_arena(4 + i) for i in range(3)]
    rows = loaded.engine.step(ids, positions, together)
    for i in range(3):
        alone = model.new_arena(9)
        logits = loaded.engine.step(ids[i : i + 1], positions[:1], [alone])
        assert torch.equal(logits[0], rows[i])
        assert torch.equal(alone.view(0, 2)[0], together[i].view(0, 2)[0])
    assert loaded.engine.independent_sequences


def test_logits_that_are_no_numbers_name_a_layer(engine: EngineFactory) -> None:
    loaded = load(engine("int4"))
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
    assert dense == 4 * (text.num_layers * layer + text.vocab_size * text.hidden_size)
    assert 0 < step_bytes(int4.spec, int4.formats) < dense / 5


def test_graphs_are_named_in_the_manifest(engine: EngineFactory) -> None:
    manifest = read_manifest(engine("int4"))
    assert set(manifest.backends["onnxruntime"].files) == set(GRAPHS)
    assert not set(GRAPHS) & set(manifest.native_files)
