"""Options against the checkpoint at hand: what is unknown, out of range or would be ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmr5_export.options import ExportOptions, OptionError
from mmr5_export.resolve import (
    refuse_requantizing,
    refuse_threshold,
    resolve_pixels,
    resolve_place,
    resolve_recipe,
)
from mmr5_runtime.artifact import PixelRange
from mmr5_runtime.types import CheckpointError

PROCESSOR = {"min_pixels": 3136, "max_pixels": 50176}


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"method": "awq"}, "--method"),
        ({"group_size": 64}, "--group-size"),
        ({"symmetric": False}, "--asym"),
        ({"symmetric": True}, "--sym"),
        ({"lm_head": "bf16"}, "--lm-head"),
        ({"quantize_vision": "fp8"}, "--quantize-vision"),
        ({"bits": 5.0}, "--bits"),
        ({"damp": 0.1}, "--damp"),
        ({"calib_data": Path("lists.jsonl")}, "--calib-data"),
        ({"calib_samples": 7}, "--calib-samples"),
        ({"seed": 3}, "--seed"),
        ({"visual_weight": 2.0}, "--visual-weight"),
        ({"max_new_tokens": 9}, "--max-new-tokens"),
        ({"response_cache": Path("answers")}, "--response-cache"),
        ({"held_out": 5}, "--held-out"),
        ({"min_top1_agreement": 0.9}, "--min-top1-agreement"),
    ],
)
def test_a_quantized_checkpoint_ignores_no_option(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(OptionError, match=f"mine is quantized already.*; leave out {flag}, or"):
        refuse_requantizing("mine", None, ExportOptions(**options))


def test_a_quantized_checkpoint_takes_what_still_means_something() -> None:
    refuse_requantizing("mine", None, ExportOptions())
    kept = ExportOptions(verify=False, device="cpu", max_pixels=5000, force=True, resume=True)
    refuse_requantizing("mine", None, kept)
    with pytest.raises(OptionError, match="leave out --quant and --damp and --held-out, or"):
        refuse_requantizing("mine", "int4", ExportOptions(damp=0.5, held_out=1))


def test_a_threshold_needs_something_to_measure() -> None:
    refuse_threshold(ExportOptions(), "nothing is quantized")
    refuse_threshold(ExportOptions(min_top1_agreement=0.9), None)
    with pytest.raises(OptionError, match="nothing to measure because nothing is quantized; leave"):
        refuse_threshold(ExportOptions(min_top1_agreement=0.9), "nothing is quantized")


@pytest.mark.parametrize(
    ("quant", "options", "words"),
    [
        ("int4", {"bits": 5.0}, "--bits is a budget for mixed recipes but int4 is none; use"),
        ("int4", {"group_size": 48}, "group size 48 is not one of"),
        ("int8", {"symmetric": False}, "only int4 can be asymmetric"),
        ("int3", {}, "there is no recipe 'int3'; choose one of bf16"),
        ("int4", {"lm_head": "fp8"}, "lm_head is 'fp8'"),
    ],
)
def test_recipes_that_options_make_meaningless(
    quant: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        resolve_recipe(quant, ExportOptions(**options))


def test_options_replace_what_a_recipe_says() -> None:
    recipe = resolve_recipe("int4-mixed", ExportOptions(bits=6.0, damp=0.5, group_size=64))
    assert recipe.mixed is not None and recipe.mixed.bits_per_weight == 6.0
    assert recipe.damp == 0.5 and recipe.group_size == 64


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "tpu"}, "--device='tpu' is unknown; pass auto, cpu"),
        ({"device": "cuda:99"}, "--device='cuda:99' is not there"),
        ({"dtype": "float16"}, "--dtype='float16' is unknown; pass auto"),
    ],
)
def test_places_that_are_unknown_or_not_there(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        resolve_place(ExportOptions(**options))


def test_the_place_of_a_cpu() -> None:
    found = resolve_place(ExportOptions(device="cpu", dtype="bfloat16"))
    assert found == (torch.device("cpu"), torch.bfloat16)


def test_a_pixel_budget_is_the_users_fault_only_where_he_gave_one() -> None:
    assert resolve_pixels(PROCESSOR, ExportOptions(max_pixels=9000)) == PixelRange(3136, 9000)
    with pytest.raises(OptionError, match="are no pixel budget; pass"):
        resolve_pixels(PROCESSOR, ExportOptions(max_pixels=1000))
    with pytest.raises(CheckpointError, match="are no pixel budget; pass"):
        resolve_pixels({"min_pixels": 5000, "max_pixels": 4000}, ExportOptions())
    with pytest.raises(CheckpointError, match="gives no min_pixels and max_pixels"):
        resolve_pixels({}, ExportOptions())
