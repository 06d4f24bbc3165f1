"""Profiles and build commands: data that a TensorRT user runs, so every character counts."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st

from helpers.exporting import quick_export
from mmr5_export.onnx.build_script import build_json, build_sh
from mmr5_export.onnx.profiles import (
    Limits,
    Range,
    decoder_profiles,
    vision_profiles,
)
from mmr5_export.options import OptionError
from mmr5_runtime.artifact import read_manifest
from mmr5_runtime.image import CELL_PIXELS, PixelBudget, planned_sizes
from mmr5_runtime.manifest import Manifest, PixelRange
from mmr5_runtime.onnx.windows import window_inputs
from mmr5_runtime.types import PageError

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
  --maxShapes=pixels:960x1176,cos:960x16,sin:960x16,windows:60x64,window_mask:60x64,places:960 \\
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


@pytest.mark.parametrize(
    ("max_seq_len", "max_input_len", "said"),
    [
        (5000, None, "4096 positions"),
        (200, None, "page of up to 240 tokens"),
        (2000, 2001, "cannot both"),
    ],
)
def test_limits_that_cannot_be_are_refused(
    manifest: Manifest, max_seq_len: int, max_input_len: int | None, said: str
) -> None:
    with pytest.raises(OptionError, match=said):
        Limits.of(manifest, max_seq_len, max_input_len)


SIDES = st.integers(1, 400), st.integers(1, 12_000)


@settings(max_examples=200)
@given(
    patch=st.sampled_from([14, 16]),
    tokens=st.tuples(st.integers(1, 400), st.integers(0, 400)),
    rest=st.tuples(st.integers(0, 783), st.integers(0, 783)),
    sides=st.one_of(st.tuples(*SIDES), st.tuples(*reversed(SIDES))),
)
@example(patch=14, tokens=(283, 0), rest=(564, 564), sides=(5471, 28))
@example(patch=14, tokens=(325, 52), rest=(284, 641), sides=(8659, 49))
@example(patch=14, tokens=(1, 0), rest=(0, 783), sides=(5600, 28))
def test_every_page_fits_its_profile(
    manifest: Manifest,
    patch: int,
    tokens: tuple[int, int],
    rest: tuple[int, int],
    sides: tuple[int, int],
) -> None:
    """Whatever the page and the budget: its patches and windows, as the image code resizes it."""
    vision = replace(manifest.spec.vision, patch_size=patch, window_size=8 * patch)
    least = tokens[0] * CELL_PIXELS + rest[0]
    budget = PixelBudget(least, max(least, sum(tokens) * CELL_PIXELS + rest[1]))
    try:
        _, (width, height) = planned_sizes(*sides, budget, patch_size=patch)
    except PageError:
        reject()
    windows, mask, places = window_inputs((1, height // patch, width // patch), vision)
    limits = Limits.of(
        replace(
            manifest,
            spec=replace(manifest.spec, vision=vision),
            pixel_budget=PixelRange(budget.min_pixels, budget.max_pixels),
        )
    )
    (profile,) = vision_profiles(vision, limits)
    found = {"windows": windows, "window_mask": mask, "places": places}
    for name, tensor in found.items():
        assert inside(tuple(tensor.shape), profile.shapes[name]), name


def inside(shape: tuple[int, ...], allowed: Range) -> bool:
    pairs = zip(allowed.min, shape, allowed.max, strict=True)
    return all(least <= size <= most for least, size, most in pairs)
