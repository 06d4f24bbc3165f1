"""The vision tower with kernels and padding for a GPU against itself without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.tiny import make_hf_model, read_spec, read_tensors, tiny_configs, write_checkpoint
from mmr5_kernels.target import INTERPRETED, Target
from mmr5_runtime.rope import Grid
from mmr5_runtime.spec import ModelSpec
from mmr5_runtime.vision import MLP_MULTIPLE, VisionTower, plan_windows
from mmr5_runtime.weights import Weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = Target("cpu")
PADDED = Target("cuda", (9, 0), interpreted=True)  # no kernels, but what a GPU likes to load


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_hf_model(tiny_configs()["int4"], seed=6)
    return write_checkpoint(model, tmp_path_factory.mktemp("checkpoint"), dtype=torch.bfloat16)


def tower(checkpoint: Path, target: Target, dtype: torch.dtype = torch.bfloat16) -> VisionTower:
    weights = Weights(
        read_spec(checkpoint), read_tensors(checkpoint).__getitem__, {}, dtype, DEVICE
    )
    return VisionTower(read_spec(checkpoint).vision, weights, target=target)


def page(spec: ModelSpec, grid: Grid, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(grid[1] * grid[2], spec.vision.patch_dim, generator=generator)


@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 8, 8), (1, 18, 4), (1, 22, 20)])
def test_a_table_has_every_window(checkpoint: Path, grid: Grid) -> None:
    plan = plan_windows(grid, read_spec(checkpoint).vision)
    assert plan.table.dtype == torch.int32 and plan.table.is_contiguous()
    start = 0
    lengths = [length for count, length in plan.sizes for _ in range(count)]
    for (first, length), expected in zip(plan.table.tolist(), lengths, strict=True):
        assert (first, length) == (start, expected)
        start += length
    assert start == grid[1] * grid[2] and plan.longest == max(lengths)


@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 8, 8), (1, 10, 14)])
def test_the_window_kernel_changes_rounding_only(checkpoint: Path, grid: Grid) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    plain, fused = tower(checkpoint, PLAIN), tower(checkpoint, INTERPRETED)
    exact = tower(checkpoint, PLAIN, torch.float32)
    pixels = page(read_spec(checkpoint), grid)
    with torch.no_grad():
        wanted, found = plain(pixels, grid), fused(pixels, grid)
        truth = exact(pixels, grid)
    noise = (wanted.float() - truth).norm()  # what bf16 costs anyway
    assert (found.float() - truth).norm() <= 1.1 * noise
    assert len(found) == 1 or not torch.equal(found, wanted)  # it was the kernel that ran


@pytest.mark.parametrize("grid", [(1, 8, 8), (1, 10, 14)])
def test_zeros_in_the_mlp_change_nothing(checkpoint: Path, grid: Grid) -> None:
    inner = read_spec(checkpoint).vision.intermediate_size
    assert inner % MLP_MULTIPLE
    plain, padded = tower(checkpoint, PLAIN), tower(checkpoint, PADDED)
    widths = [block.mlp.down.prepared.k for block in padded.blocks]  # type: ignore[union-attr]
    assert set(widths) == {inner + -inner % MLP_MULTIPLE}
    pixels = page(read_spec(checkpoint), grid)
    with torch.no_grad():
        wanted, found = plain(pixels, grid), padded(pixels, grid)
    # The same sums in another order, at most: a last bit of bf16 here and there.
    assert (found.float() - wanted.float()).norm() <= 2e-3 * wanted.float().norm()


def test_zeros_change_nothing_in_fp32(checkpoint: Path) -> None:
    spec, tensors = read_spec(checkpoint), read_tensors(checkpoint)
    weights = Weights(spec, tensors.__getitem__, {}, torch.float32, "cpu")
    name = "visual.blocks.0.mlp."
    both = (f"{name}gate_proj", f"{name}up_proj")
    x = page(spec, (1, 4, 4))[:, : spec.vision.hidden_size]
    plain = weights.linear(*both)(x).chunk(2, dim=-1)
    padded = weights.linear(*both, zero_rows=20)(x).chunk(2, dim=-1)
    for found, wanted in zip(padded, plain, strict=True):
        assert not found[:, wanted.shape[1] :].any()
        torch.testing.assert_close(found[:, : wanted.shape[1]], wanted, atol=1e-6, rtol=1e-6)
    wide = torch.cat((plain[0], torch.ones(len(x), 20)), dim=1)  # poison meets the zeros
    found = weights.linear(f"{name}down_proj", zero_columns=20)(wide)
    wanted = weights.linear(f"{name}down_proj")(plain[0])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_only_dense_bf16_on_a_gpu_is_padded(checkpoint: Path) -> None:
    inner = read_spec(checkpoint).vision.intermediate_size
    for target, dtype in ((PLAIN, torch.bfloat16), (PADDED, torch.float32)):
        blocks = tower(checkpoint, target, dtype).blocks
        assert {block.mlp.down.prepared.k for block in blocks} == {inner}  # type: ignore[union-attr]
