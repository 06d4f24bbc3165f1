"""Exports for another prompt: what is asked in calibration is what the engine will ask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.exporting import quick_export, write_samples
from mmr5_export.cli import parser
from mmr5_export.job import Job, prepare
from mmr5_export.options import ExportOptions, OptionError
from mmr5_runtime.artifact import read_manifest
from mmr5_runtime.prompt import load_template

OTHER = "mm-r5-images-first"


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    pass


def job(checkpoint: Path, data: Path, **options: Any) -> Job:
    given = ExportOptions(calib_data=data, calib_samples=2, held_out=2, device="cpu", **options)
    return prepare(checkpoint, "int4", Path("engine"), given, silent)


@pytest.mark.parametrize("profile", ["mm-r5", OTHER, "mmrag"])
def test_the_manifest_names_the_profile(
    profile: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    quick_export(tiny_checkpoint, "bf16", tmp_path / "engine", profile=profile)
    template = read_manifest(tmp_path / "engine").template
    assert load_template(template.name) == load_template(profile)
    assert template.sha256 == load_template(profile).sha256


@pytest.mark.parametrize("profile", ["pointwise", "mm_r5", "other"])
def test_profiles_that_rank_no_list(profile: str) -> None:
    with pytest.raises(OptionError, match="give one of mm-r5, mm-r5-images-first, mmrag"):
        ExportOptions(profile=profile)


def test_the_command_repeats_the_profile() -> None:
    options = ExportOptions(profile=OTHER)
    assert options.arguments() == ["--profile", OTHER]
    parsed = parser().parse_args(["--output", "e", *options.arguments()])
    assert ExportOptions(profile=parsed.profile) == options
    assert ExportOptions().arguments() == []


def test_calibration_and_answers_follow_the_profile(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = write_samples(tmp_path / "data", 5)
    default, other = (job(tiny_checkpoint, data, profile=name) for name in ("mm-r5", OTHER))
    assert default.tokenizer().encode("what?", [2, 1]) != other.tokenizer().encode("what?", [2, 1])
    assert default.generator("bf16").identity() != other.generator("bf16").identity()
    assert default.identity()["template"] != other.identity()["template"]
    changed = {k for k in default.identity() if default.identity()[k] != other.identity()[k]}
    assert changed == {"template"}
    assert other.generator("bf16").load().tokenizer.template == load_template(OTHER)
    assert default.generator("bf16") == replace(other.generator("bf16"), profile="mm-r5")


def test_answers_to_the_default_prompt_are_not_taken_for_another(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    own = write_samples(tmp_path / "own", 5, own_of=tiny_checkpoint)
    assert all(sample.own for sample in job(tiny_checkpoint, own).samples)
    for sample in job(tiny_checkpoint, own, profile=OTHER).samples:
        assert not sample.own and sample.response is None
    # What a person wrote is a text to calibrate on whatever the prompt.
    given = write_samples(tmp_path / "given", 5, responses=True)
    assert all(s.response for s in job(tiny_checkpoint, given, profile=OTHER).calibration)
