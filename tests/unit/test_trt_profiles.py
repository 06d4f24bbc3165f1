"""Profiles and build commands: data that a TensorRT user runs, so every character counts."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.exporting import quick_export
from mmr5_export.onnx.build_script import build_json, build_sh
from mmr5_export.onnx.profiles import (
    Limits,
    Range,
    decoder_profiles,
    most_windows,
    vision_profiles,
)
from mmr5_export.options import OptionError
from mmr5_runtime.artifact import read_manifest
from mmr5_runtime.image import MAX_ASPECT_RATIO, smart_resize
from mmr5_runtime.manifest import Manifest, PixelRange
from mmr5_runtime.onnx.windows import window_inputs
from mmr5_runtime.spec import ModelSpec, VisionSpec

MINI = Path(str(resources.files("mmr5_runtime") / "assets" / "mini"))

BUILD_SH = """\
#!/bin/sh
# Builds the engines with trtexec of TensorRT 10.15 or later, on the GPU they are for.
set -eu
cd "$(dirname "$0")"
trtexec \\
  --onnx=vision.onnx \\
  --saveEngine=vision.plan \\
  --stronglyTyped \\
  --minShapes=pixels:4x1176,cos:4x16,sin:4x16,windows:1x4,window_mask:1x4,places:4 \\
  --optShapes=pixels:960x1176,cos:960x16,sin:960x16,windows:16x64,window_mask:16x64,places:960 \\
  --maxShapes=pixels:960x1176,cos:960x16,sin:960x16,windows:50x64,window_mask:50x64,places:960 \\
  --skipInference
trtexec \\
  --onnx=decoder.onnx \\
  --saveEngine=decoder.plan \\
  --stronglyTyped \\
  --profile=0 \\
  --minShapes=embeds:1x256,cos:1x32,sin:1x32,places:1,keys:1,rows:1 \\
  --optShapes=embeds:1000x256,cos:1000x32,sin:1000x32,places:1000,keys:1000,rows:1 \\
  --maxShapes=embeds:1000x256,cos:1000x32,sin:1000x32,places:1000,keys:3000,rows:8 \\
  --profile=1 \\
  --minShapes=embeds:1x256,cos:1x32,sin:1x32,places:1,keys:1,rows:1 \\
  --optShapes=embeds:1x256,cos:1x32,sin:1x32,places:1,keys:1500,rows:1 \\
  --maxShapes=embeds:8x256,cos:8x32,sin:8x32,places:8,keys:3000,rows:8 \\
  --skipInference
"""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("engine") / "mini"
    quick_export(MINI, "bf16", folder)
    return replace(read_manifest(folder), pixel_budget=PixelRange(3136, 240 * 28 * 28))


def test_build_script_and_data(manifest: Manifest) -> None:
    limits = Limits.of(manifest, max_seq_len=3000, max_input_len=1000)
    profiles = {
        "vision": vision_profiles(manifest.spec.vision, limits),
        "decoder": decoder_profiles(manifest.spec.text, limits),
    }
    assert build_sh(profiles) == BUILD_SH
    # The list is what the script runs, word for word.
    commands = BUILD_SH.partition('"$0")"\n')[2].replace("\\\n", "").strip().split("\n")
    data = json.loads(json.dumps(build_json(profiles)))
    assert [*data["trtexec"].values()] == [shlex.split(command) for command in commands]
    assert data["python"] == [["python", "build.py"]] and data["needs"] == "tensorrt>=10.15"


def test_defaults_come_from_the_model(manifest: Manifest) -> None:
    limits = Limits.of(manifest)
    assert (limits.capacity, limits.prefill_tokens) == (4096, 4096)  # all positions of mini
    assert limits.max_patches == 960


def test_a_thin_page_of_a_small_budget_fits(manifest: Manifest) -> None:
    """A budget of 8 tokens still lets a strip of 200 to 1 through, one token high and longer."""
    small = replace(manifest, pixel_budget=PixelRange(28 * 28, 8 * 28 * 28))
    height, width = smart_resize(30, 6000, 28, 28 * 28, 8 * 28 * 28)
    assert 8 * 28 * 28 < height * width <= Limits.of(small).max_patches * 14 * 14


@pytest.mark.parametrize(
    ("max_seq_len", "max_input_len", "said"),
    [
        (5000, None, "4096 positions"),
        (200, None, "page of 240 tokens"),
        (2000, 2001, "cannot both"),
    ],
)
def test_limits_that_cannot_be_are_refused(
    manifest: Manifest, max_seq_len: int, max_input_len: int | None, said: str
) -> None:
    with pytest.raises(OptionError, match=said):
        Limits.of(manifest, max_seq_len, max_input_len)


@given(rows=st.integers(1, 40), columns=st.integers(1, 40))
def test_every_page_fits_its_profile(rows: int, columns: int) -> None:
    """A page within the budget has no more windows, and no longer ones, than the profile allows."""
    spec = read_spec()
    grid = (1, rows * spec.spatial_merge_size, columns * spec.spatial_merge_size)
    patches = grid[1] * grid[2]
    windows, mask, places = window_inputs(grid, spec)
    limits = Limits(8, 8, patches)
    (profile,) = vision_profiles(spec, limits)
    found = {"windows": windows, "window_mask": mask, "places": places}
    for name, tensor in found.items():
        assert inside(tuple(tensor.shape), profile.shapes[name]), name


@pytest.mark.parametrize("tokens", [1, 5, 7, 640, 16384])
def test_the_worst_page_is_really_the_worst(tokens: int) -> None:
    spec = read_spec()
    side = spec.window_size // spec.factor
    counts = [
        -(-rows // side) * -(-(tokens // rows) // side)
        for rows in range(1, tokens + 1)
        if max(rows, tokens // rows) <= MAX_ASPECT_RATIO * min(rows, tokens // rows)
    ]
    assert most_windows(spec, tokens * spec.merge_unit) >= max(counts)


def inside(shape: tuple[int, ...], allowed: Range) -> bool:
    pairs = zip(allowed.min, shape, allowed.max, strict=True)
    return all(least <= size <= most for least, size, most in pairs)


@cache
def read_spec() -> VisionSpec:
    """The tower of mini."""
    return ModelSpec.from_hf_config(json.loads((MINI / "config.json").read_text())).vision
