"""Limits of what is kept: validation, defaults, and whether a single page fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny import make_hf_model, read_spec, tiny_configs, write_checkpoint
from mmr5_kernels.layout import INT4, INT8
from mmr5_kernels.target import INTERPRETED
from mmr5_runtime.compute import Compute
from mmr5_runtime.manifest import (
    FileEntry,
    ImageSettings,
    Manifest,
    PixelRange,
    Quant,
    Source,
    TemplateRef,
)
from mmr5_runtime.reuse.config import CacheConfig, check_limits, main_memory
from mmr5_runtime.reuse.identity import digest, engine_identity
from mmr5_runtime.types import RequestError

GIB = 1 << 30
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("name", ["embeddings_gib", "kv_gib", "gpu_gib", "disk_gib"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), True, "4"])
def test_a_size_has_to_be_a_size(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"{name}=.* is no size in GiB; pass a number"):
        CacheConfig(**{name: value})


@pytest.mark.parametrize("name", ["gpu_gib", "disk_gib"])
def test_only_main_memory_has_a_default_that_depends_on_the_machine(name: str) -> None:
    with pytest.raises(RequestError, match=rf"{name}=None is no size"):
        CacheConfig(**{name: None})  # type: ignore[arg-type]


@pytest.mark.parametrize("disk", ["", 7, b"folder"])
def test_the_disk_is_a_path(disk: Any) -> None:
    with pytest.raises(RequestError, match="is no folder; pass a path, or None"):
        CacheConfig(disk=disk)


def test_a_folder_without_room_contradicts_itself(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="disk_gib=0 leaves no room in disk=.*; raise it"):
        CacheConfig(disk=tmp_path, disk_gib=0)


def test_sizes_in_bytes() -> None:
    config = CacheConfig(embeddings_gib=1.5, kv_gib=2, gpu_gib=0.5, disk_gib=3)
    assert (config.embedding_bytes, config.kv_bytes) == (3 * GIB // 2, 2 * GIB)
    assert (config.gpu_bytes, config.disk_bytes) == (GIB // 2, 3 * GIB)


def test_defaults_leave_most_memory_to_others() -> None:
    memory = main_memory()
    assert memory is not None and memory > GIB // 4
    assert CacheConfig().embedding_bytes == min(4 * GIB, memory // 8)
    assert CacheConfig().kv_bytes == min(16 * GIB, memory // 4)


def test_off_keeps_nothing() -> None:
    off = CacheConfig.off()
    assert (off.embedding_bytes, off.kv_bytes, off.gpu_bytes, off.disk) == (0, 0, 0, None)


def test_gpu_memory_stands_in_front_of_main_memory_and_never_alone() -> None:
    assert CacheConfig(embeddings_gib=0).gpu_bytes == 0


def test_a_container_has_what_its_limit_says(tmp_path: Path) -> None:
    tight, none = tmp_path / "memory.max", tmp_path / "other"
    tight.write_text("1048576\n")
    none.write_text("max\n")
    assert main_memory([tmp_path / "absent", none, tight]) == 1 << 20
    assert main_memory([none]) == main_memory([])


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A made-up one around the architecture of a tiny checkpoint."""
    folder = tmp_path_factory.mktemp("tiny")
    model = make_hf_model(next(iter(tiny_configs().values())))
    return Manifest(
        created_by={"mmr5-export": "1"},
        source=Source("tiny", None, {}),
        spec=read_spec(write_checkpoint(model, folder)),
        quant=Quant("int4", "rtn", {"lm_head": INT4}),
        template=TemplateRef("mm-r5", "0" * 64),
        pixel_budget=PixelRange(3136, 100352),
        image=ImageSettings((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 14, 2, 2),
        files={"model.safetensors": FileEntry("a" * 64, 7)},
        tensors={"lm_head.weight": "model.safetensors"},
        report={},
    )


def check(config: CacheConfig, device: torch.device = CPU, page: int = 10 << 20) -> None:
    check_limits(config, device, embedding_bytes_per_page=page, kv_bytes_per_page=8 * page)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embeddings_gib": 0.009}, "embeddings_gib=0.009 .* 16 MiB; raise it, lower max_pixels"),
        ({"kv_gib": 0.07}, "kv_gib=0.07 cannot hold one page of this engine, .* 128 MiB"),
        ({"gpu_gib": 0.001}, "gpu_gib=0.001 .* or pass 0 to keep none"),
        ({"disk": "pages", "disk_gib": 0.001}, "disk_gib=0.001 .* or pass None as disk"),
    ],
)
def test_a_limit_below_one_page_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check(CacheConfig(**options), CUDA)


def test_limits_of_just_one_page_and_limits_that_play_no_part_are_fine() -> None:
    one = CacheConfig(embeddings_gib=10 / 1024, kv_gib=80 / 1024, gpu_gib=10 / 1024)
    check(one, CPU)
    # Page-locked memory comes in powers of two; GPU memory does not.
    check(CacheConfig(embeddings_gib=16 / 1024, kv_gib=128 / 1024, gpu_gib=10 / 1024), CUDA)
    with pytest.raises(RequestError, match="embeddings_gib"):
        check(one, CUDA)
    check(CacheConfig.off(), CUDA)
    check(CacheConfig(embeddings_gib=0, gpu_gib=0.001), CUDA)
    check(CacheConfig(gpu_gib=0.001, disk_gib=0.001))  # on a CPU, and no folder
    check(CacheConfig(), page=1 << 60)  # what a small machine's default leaves out is not kept


def test_the_engine_identity_changes_with_whatever_may_change_a_bit(
    manifest: Manifest,
) -> None:
    first = engine_identity(manifest, torch.float32, CPU)
    assert len(first) == 32 and first == engine_identity(manifest, torch.float32, CPU)
    others = [
        replace(manifest, files={"model.safetensors": FileEntry("b" * 64, 7)}),
        replace(manifest, image=replace(manifest.image, mean=(0.5, 0.5, 0.25))),
        replace(manifest, quant=replace(manifest.quant, layers={"lm_head": INT8})),
        replace(manifest, tensors={}),
    ]
    keys = {engine_identity(other, torch.float32, CPU) for other in others}
    keys.add(engine_identity(manifest, torch.bfloat16, CPU))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        keys.add(engine_identity(manifest, torch.float32, CPU))
    finally:
        torch.set_num_threads(threads)
    assert len(keys | {first}) == 7


def test_the_engine_identity_changes_with_how_it_computes(manifest: Manifest) -> None:
    plain = Compute.plain(CPU, torch.bfloat16)
    computes = [
        plain,
        replace(plain, target=INTERPRETED),
        replace(plain, target=replace(INTERPRETED, interpreted=False)),
        replace(plain, kv="int8"),
        replace(plain, prefill="int8"),
        replace(plain, prefill="fp8"),
    ]
    keys = {engine_identity(manifest, torch.bfloat16, CPU, one.to_json()) for one in computes}
    assert len(keys) == len(computes)
    graphs = replace(plain, graphs=True)  # the same kernels, launched otherwise
    assert engine_identity(manifest, torch.bfloat16, CPU, graphs.to_json()) in keys


def test_what_people_read_of_an_engine_does_not_matter(manifest: Manifest) -> None:
    again = replace(manifest, report={"time": "later"}, created_by={"mmr5-export": "9"})
    first = engine_identity(manifest, torch.float32, CPU)
    assert engine_identity(again, torch.float32, CPU) == first


def test_the_identity_can_be_read_whichever_precision_switch_was_used(
    manifest: Manifest,
) -> None:
    first = engine_identity(manifest, torch.float32, CPU)
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"  # reading the older switch raises from here on
        assert engine_identity(manifest, torch.float32, CPU) != first
    finally:
        matmul.fp32_precision = before
    assert engine_identity(manifest, torch.float32, CPU) == first


def test_digests_tell_documents_apart_that_run_together() -> None:
    documents: list[dict[str, Any]] = [
        {"a": "b", "c": ""},
        {"a": "bc"},
        {"a": ["b", "c"]},
        {"a": 'b","c":"'},
        {"ab": ""},
        {"a": 1},
        {"a": "1"},
        {"a": [1, 23]},
        {"a": [12, 3]},
    ]
    assert len({digest(document) for document in documents}) == len(documents)
    assert digest({"x": 1, "y": (2, 3)}) == digest({"y": [2, 3], "x": 1})
