"""Only the same is used again: forged pages, other engines, altered files, small limits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.pictures import noise
from helpers.reading import (
    MAX_PIXELS,
    QUESTION,
    Fresh,
    forgetful,
    load,
    open_reranker,
    png_pages,
    read,
    remember,
    same_answer,
    skip_unless_native,
)
from mmr5_runtime import (
    CacheConfig,
    EngineError,
    PageError,
    RequestError,
    RerankResult,
)
from mmr5_runtime.backends import BackendName
from mmr5_runtime.image import planned_sizes
from mmr5_runtime.request import open_bank, open_sources

EngineFactory = Callable[[str], Path]
BACKENDS = ("native", "onnxruntime")
SHORT: dict[str, Any] = {"max_new_tokens": 12}


# Never the wrong page.


def _forgeries() -> list[tuple[Image.Image, Image.Image]]:
    """Pairs that a careless key would take for one another."""
    data = np.random.default_rng(3).integers(0, 256, 56 * 57 * 3, dtype=np.uint8)
    # The same bytes, and both are resized to 56 x 56.
    wide, tall = (Image.fromarray(data.reshape(*size, 3)) for size in ((56, 57), (57, 56)))
    page = noise(84, 84, 1)
    values = np.array(page)
    values[-1, -1, -1] ^= 1
    touched = Image.fromarray(values)
    swapped = Image.fromarray(np.asarray(page)[..., ::-1].copy())
    doubled = page.resize((168, 168), Image.Resampling.NEAREST)
    return [(wide, tall), (page, touched), (page, swapped), (page, doubled)]


@pytest.mark.parametrize("number", range(4))
def test_near_collisions_are_different_pages(fresh: Fresh, tmp_path: Path, number: int) -> None:
    one, other = _forgeries()[number]
    disk = CacheConfig(disk=tmp_path / "pages")
    ballast = noise(56, 56, 9)
    plain = fresh(CacheConfig.off())
    cold = [plain.rerank(QUESTION, [page, ballast], **SHORT) for page in (one, other)]
    for _ in range(2):  # from memory, then from disk
        reranker = fresh(disk)
        for pages, expected in (((one, other), cold), ((other, one), cold[::-1])):
            warm = [reranker.rerank(QUESTION, [page, ballast], **SHORT) for page in pages]
            assert all(same_answer(*pair) for pair in zip(warm, expected, strict=True))
    assert reranker.cache.stats().encoder.rejected == 0
    assert reranker.cache.stats().encoder.disk.entries == 3


def test_the_forgeries_are_told_apart_by_their_embeddings(
    tiny_engine: EngineFactory, backend: str
) -> None:
    """What the test above would not notice if the model were blind to the difference."""
    loaded = load(tiny_engine("int4"), backend=backend)
    memory = remember(loaded)
    for pair in _forgeries():
        bank = open_bank(loaded, memory, open_sources(memory, pair), loaded.budget)
        one, other = bank.embeddings(0), bank.embeddings(1)
        assert one.shape != other.shape or not torch.equal(one, other)


def test_the_same_resize_of_another_budget_is_the_same_page(fresh: Fresh) -> None:
    """Keys hold the sizes as resolved: a budget that changes nothing misses nothing."""
    reranker, pages = fresh(), png_pages(3)
    first = reranker.rerank(QUESTION, pages, **SHORT)
    same = reranker.rerank(QUESTION, pages, **SHORT, max_pixels=MAX_PIXELS - 784)
    assert not same.cache.misses and same_answer(same, first)


def test_one_page_in_every_resolution(fresh: Fresh) -> None:
    """Every size a budget can give is a page of its own, found again when it is asked for."""
    page, shape = noise(150, 230, 2), {"patch_size": 14, "merge_size": 2}
    reranker, plain, ballast = fresh(), fresh(CacheConfig.off()), noise(56, 56)
    loaded = reranker._require_loaded()
    grids: dict[Any, int] = {}
    for limit in range(4 * 784, MAX_PIXELS, 50):
        budget = loaded.budget.replaced(None, limit)
        grids.setdefault(planned_sizes(*page.size, budget, **shape)[1], limit)
    limits = [*grids.values(), *grids.values()]
    for limit in limits:
        warm = reranker.rerank(QUESTION, [page, ballast], **SHORT, max_pixels=limit)
        cold = plain.rerank(QUESTION, [page, ballast], **SHORT, max_pixels=limit)
        assert same_answer(warm, cold)
    assert len(grids) >= 4
    stats = reranker.cache.stats()
    reasons = {reason: count for reason, count in stats.misses.pages.items() if count}
    assert reasons == {"page": 2, "parameters": len(grids) - 1}


def test_the_same_pages_in_every_order(fresh: Fresh) -> None:
    reranker, (one, two, three) = fresh(), png_pages(3)
    for shown in ([one, two, three], [three, one, two], [two, one, three], [one, one, two]):
        warm = reranker.rerank(QUESTION, shown, **SHORT)
        assert same_answer(warm, fresh(CacheConfig.off()).rerank(QUESTION, shown, **SHORT))
        assert warm.cache.pages_encoded == (3 if shown == [one, two, three] else 0)


# The disk tier.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", ["bf16", "int8", "int4"])
def test_a_restart_finds_the_same_bits_on_disk(
    tiny_engine: EngineFactory, backend: str, tmp_path: Path, quant: str, dtype: str
) -> None:
    if dtype == "bfloat16":
        skip_unless_native(backend, "dtype='bfloat16'")
    loaded, pages = load(tiny_engine(quant), dtype, backend=backend), png_pages(4)
    config = CacheConfig(disk=tmp_path)
    before = read(loaded, remember(loaded, config), pages)
    restarted = load(tiny_engine(quant), dtype, backend=backend)
    memory = remember(restarted, config)
    after = read(restarted, memory, pages)
    assert (after.counts.pages_encoded, after.counts.pages_remembered) == (0, 4)
    assert after.equals(before) and after.equals(read(loaded, forgetful(loaded), pages))
    bank = open_bank(restarted, memory, open_sources(memory, pages), restarted.budget)
    cold = open_bank(loaded, forgetful(loaded), open_sources(memory, pages), loaded.budget)
    for index in range(4):
        assert torch.equal(bank.embeddings(index), cold.embeddings(index))
    assert memory.stats().encoder.disk.hits == 4


def test_engines_that_share_a_folder_never_share_a_page(
    fresh: Fresh, tiny_engine: EngineFactory, backend: str, tmp_path: Path
) -> None:
    config, pages = CacheConfig(disk=tmp_path), png_pages(3)
    expected = {
        quant: fresh(CacheConfig.off(), quant).rerank(QUESTION, pages, **SHORT)
        for quant in ("int4", "int8", "bf16")
    }
    for restart in range(2):
        for quant, cold in expected.items():
            warm = fresh(config, quant).rerank(QUESTION, pages, **SHORT)
            assert warm.cache.pages_encoded == (0 if restart else 3)
            assert same_answer(warm, cold)
    # The same weights in another arithmetic.
    dtype = "bfloat16" if backend == "native" else "float32"
    with open_reranker(
        tiny_engine("int4"), "native", dtype=dtype, max_pixels=MAX_PIXELS, cache=config
    ) as other:
        assert other.rerank(QUESTION, pages, **SHORT).cache.pages_encoded == 3
    assert len(list(tmp_path.glob("*.page"))) == 12


def test_altered_and_foreign_files_are_never_served(fresh: Fresh, tmp_path: Path) -> None:
    config, pages = CacheConfig(disk=tmp_path), png_pages(4)
    expected = fresh(config).rerank(QUESTION, pages, **SHORT)
    one, two, three, four = sorted(tmp_path.glob("*.page"))
    broken = bytearray(one.read_bytes())
    broken[-5] ^= 1
    one.write_bytes(broken)
    swapped = two.read_bytes(), three.read_bytes()
    two.write_bytes(swapped[1])
    three.write_bytes(swapped[0])
    four.write_bytes(four.read_bytes()[:-1])
    foreign = {"notes.txt": b"mine", f"{'0' * 64}.page": b"mine too", "x.page": b""}
    for name, content in foreign.items():
        (tmp_path / name).write_bytes(content)
    again = fresh(config)
    result = again.rerank(QUESTION, pages, **SHORT)
    assert same_answer(result, expected)
    assert result.cache.pages_encoded == 4
    assert again.cache.stats().encoder.rejected == 4
    assert {name: (tmp_path / name).read_bytes() for name in foreign} == foreign
    # What was damaged has been written again, good this time.
    assert fresh(config).rerank(QUESTION, pages, **SHORT).cache.pages_encoded == 0


def test_a_folder_that_goes_away_fails_no_request(fresh: Fresh, tmp_path: Path) -> None:
    folder, pages = tmp_path / "pages", png_pages(2)
    reranker = fresh(CacheConfig(disk=folder, embeddings_gib=0))
    expected = reranker.rerank(QUESTION, pages, **SHORT)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    reranker.cache.clear()
    again = reranker.rerank(QUESTION, pages, **SHORT)
    assert same_answer(again, expected) and again.cache.pages_encoded == 2
    assert reranker.cache.stats().encoder.write_failures == 2


def test_limits_that_hold_no_page(
    tiny_engine: EngineFactory, backend: BackendName, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    cases: list[tuple[CacheConfig, type[Exception], str]] = [
        (CacheConfig(kv_gib=1e-6), RequestError, "kv_gib=.*raise it, lower max_pixels"),
        (CacheConfig(embeddings_gib=1e-9), RequestError, "embeddings_gib=.*0 to keep none"),
        (CacheConfig(disk=tmp_path, disk_gib=1e-8), RequestError, "disk_gib=.*None as disk"),
        (CacheConfig(disk=tmp_path / "file"), EngineError, "cache folder.*file"),
    ]
    for config, kind, message in cases:
        with pytest.raises(kind, match=message):
            open_reranker(tiny_engine("int4"), backend, cache=config)


def test_a_file_that_changes_is_another_page(fresh: Fresh, tmp_path: Path) -> None:
    reranker, (old, new, other) = fresh(), png_pages(3)
    file = tmp_path / "page.png"
    file.write_bytes(old)
    reranker.rerank(QUESTION, [file, other], **SHORT)
    file.write_bytes(new)
    changed = reranker.rerank(QUESTION, [file, other], **SHORT)
    assert changed.cache.pages_encoded == 1
    assert same_answer(changed, fresh(CacheConfig.off()).rerank(QUESTION, [new, other], **SHORT))
    file.write_bytes(b"no picture")
    with pytest.raises(PageError, match="page 1"):
        reranker.rerank(QUESTION, [file, other], **SHORT)


def test_a_picture_drawn_on_meanwhile_is_ranked_as_it_was_given(
    fresh: Fresh,
) -> None:
    reranker, picture, other = fresh(), noise(84, 84, 5), noise(56, 56, 6)
    expected = fresh().rerank(QUESTION, [picture.copy(), other], **SHORT)
    events = reranker.stream(QUESTION, [picture, other], **SHORT)
    picture.paste((0, 0, 0), (0, 0, 84, 84))
    *_, result = events
    assert isinstance(result, RerankResult) and same_answer(result, expected)
    assert reranker.rerank(QUESTION, [picture, other], **SHORT).cache.pages_encoded == 1
