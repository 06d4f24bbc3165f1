"""Options of an export: ranges, contradictions, and the command that repeats it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmr5_export.cli import parser
from mmr5_export.options import ExportOptions, OptionError
from mmr5_runtime.options import DEFAULT_MAX_NEW_TOKENS


def test_answers_may_be_as_long_as_those_of_a_rerank() -> None:
    assert ExportOptions().max_new_tokens == DEFAULT_MAX_NEW_TOKENS


def test_the_command_does_not_say_where_the_data_lies(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        data = tmp_path / folder / "lists.jsonl"
        given = ExportOptions(calib_data=data, held_out=8, symmetric=False).arguments()
        assert given == ["--asym", "--calib-data", "lists.jsonl", "--held-out", "8"]


def test_the_command_leaves_out_what_is_written_besides(tmp_path: Path) -> None:
    besides = ExportOptions(
        checkpoint_out=tmp_path, checkpoint_for="sglang", resume=True, force=True, free_memory=1
    )
    assert besides.arguments() == []


def test_the_command_gives_the_same_options() -> None:
    options = ExportOptions(
        method="awq", bits=5.5, seed=3, verify=False, max_new_tokens=9, device="cpu"
    )
    parsed = vars(parser().parse_args(["--output", "e", *options.arguments()]))
    read = {key: value for key, value in parsed.items() if key in vars(options)}
    assert ExportOptions(**read) == options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"damp": 2.0}, "--damp is 2; give a number above 0 and at most 1"),
        ({"held_out": 0}, "--held-out is 0"),
        ({"bits": float("nan")}, "--bits is nan"),
        ({"min_top1_agreement": 0.9, "verify": False}, "needs the verification"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        ExportOptions(**options)
