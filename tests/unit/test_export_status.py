"""Exit statuses of mmr5-export by kind of mistake, and what --dry-run says and leaves alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from helpers.exporting import quick_export, write_samples
from mmr5_export.cli import INCOMPATIBLE, OK, TOO_SMALL, USAGE, main

QUICK = ("--method", "rtn", "--no-verify")


def run(checkpoint: Path, output: Path, *arguments: str | Path) -> int:
    return main(["--model", str(checkpoint), "--output", str(output), *map(str, arguments)])


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out" / "engine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--device", "tpu"), "--device='tpu' is unknown"),
        (("--dtype", "float16"), "--dtype='float16' is unknown"),
        (("--group-size", "48"), "group size 48"),
        (("--quant", "int8", "--asym"), "only int4 can be asymmetric"),
        (("--bits", "5"), "--bits is a budget"),
        (("--quant", "int4-mixed", "--bits", "4"), "4 bits per weight are fewer"),
        (("--quant", "bf16", "--min-top1-agreement", "0.9"), "has nothing to measure"),
        (("--max-pixels", "7"), "no pixel budget"),
        (("--revision", "main"), "no hub id"),
        (("--method", "gptq"), "pass --calib-data"),
        (("--damp", "2"), "--damp is 2"),
    ],
)
def test_a_mistake_in_the_options_is_wrong_usage(
    tiny_checkpoint: Path,
    output: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    assert run(tiny_checkpoint, output, *arguments) == USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mmr5-export: error: ") and words in line
    assert not output.parent.exists()


def test_a_recipe_that_means_nothing_is_wrong_usage(
    tiny_checkpoint: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[quant]\nname = "mine"\nformat = "int4"\ngrouping = 3\n')
    assert run(tiny_checkpoint, output, "--quant", recipe) == USAGE
    assert "has no key 'grouping'" in capsys.readouterr().err


def test_a_reader_of_no_checkpoint_is_wrong_usage(
    tiny_checkpoint: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        run(tiny_checkpoint, output, "--checkpoint-for", "vllm")
    assert left.value.code == USAGE
    assert "--checkpoint-out, which is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"query": "Which?", "pages": ["0-0.png", "gone.png"]}, "gone.png"),
        ({"query": "Which?", "pages": ["0-0.png"]}, "lists 1 page"),
        ({"query": "Which?", "images": ["0-0.png"]}, "lacks pages"),
        (None, "3 to calibrate on and 32 held out were asked for"),
    ],
)
def test_data_that_cannot_be_used_is_incompatible_input(
    tiny_checkpoint: Path,
    output: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    line: dict[str, object] | None,
    words: str,
) -> None:
    data = write_samples(tmp_path / "data", 4)
    if line is not None:
        (data / "samples.jsonl").write_text(json.dumps(line) + "\n")
    arguments = ("--calib-data", data, "--calib-samples", "3")
    assert run(tiny_checkpoint, output, *arguments) == INCOMPATIBLE
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("dry", [False, True])
def test_weights_that_are_no_numbers_stop_it_before_the_model_answers(
    tiny_checkpoint: Path,
    output: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    dry: bool,
) -> None:
    """In the vision tower, which calibration would only meet as strange statistics."""
    checkpoint = tmp_path / "damaged"
    checkpoint.mkdir()
    for path in tiny_checkpoint.iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(name for name in tensors if name.endswith("blocks.0.attn.qkv.weight"))
    tensors[name][3, 4] = float("nan")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    data, cache = write_samples(tmp_path / "data", 5), tmp_path / "answers.jsonl"
    found = run(
        checkpoint, output, "--calib-data", data, "--calib-samples", "3", "--held-out", "2",
        "--response-cache", cache, *(["--dry-run"] if dry else []),
    )  # fmt: skip
    assert found == INCOMPATIBLE
    assert "visual.blocks.0.attn.qkv.weight holds NaN" in capsys.readouterr().err
    assert not cache.exists() and not output.parent.exists()


def test_a_dry_run_ends_with_json_and_writes_nothing(
    tiny_checkpoint: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_samples(tmp_path / "data", 5)
    arguments = (
        "--calib-data", data, "--calib-samples", "3", "--held-out", "2", "--dry-run",
        "--response-cache", tmp_path / "answers.jsonl",
    )  # fmt: skip
    assert run(tiny_checkpoint, output, *arguments, "--json") == OK
    *plan, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    assert document["samples"] == 3 and document["held_out"] == 2
    assert document["answers_missing"] == 5 and document["answering"] == "bf16"
    assert document["formats"]["lm_head"] == "w8a16" and document["methods"]["lm_head"] == "rtn"
    stages = {"writing", "answering", "embedding", "layer", "verifying"}
    assert document["memory_bytes"].keys() == stages
    assert any(line.startswith("answers: 0 given, 0 known, 5 to write") for line in plan)
    assert sorted(os.listdir(tmp_path)) == ["data"]
    assert run(tiny_checkpoint, output, *arguments) == OK
    assert capsys.readouterr().out.splitlines()[-1].startswith("time: ")


def test_a_dry_run_refuses_what_the_export_would(
    tiny_checkpoint: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick_export(tiny_checkpoint, "bf16", output)
    assert run(tiny_checkpoint, output, *QUICK, "--dry-run") == 1
    assert "exists already; choose another --output" in capsys.readouterr().err
    assert run(tiny_checkpoint, output, *QUICK, "--dry-run", "--force") == OK


def test_a_dry_run_shows_a_plan_that_does_not_fit(
    tiny_checkpoint: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An answer of a hundred million tokens has logits that no machine holds."""
    data = write_samples(tmp_path / "data", 3)
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 1 << 40
    checkpoint = tmp_path / "long"
    checkpoint.mkdir()
    for path in tiny_checkpoint.iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    (checkpoint / "config.json").write_text(json.dumps(config))
    arguments = ("--method", "rtn", "--calib-data", data, "--held-out", "3", "--dry-run")
    assert run(checkpoint, output, *arguments, "--max-new-tokens", "10000000000") == TOO_SMALL
    found = capsys.readouterr()
    assert "stage needs about" in found.err and "memory, verifying: about" in found.out


def test_a_dry_run_downloads_nothing(
    output: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert run(Path("nobody/has-this"), output, "--dry-run") == 1
    message = capsys.readouterr().err
    assert "nobody/has-this is no local folder and not in the hub's cache" in message
    assert "--dry-run downloads nothing; run hf download nobody/has-this" in message


def test_rounding_verifies_on_every_sample_there_is(
    tiny_checkpoint: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is calibrated, so no sample is set aside for it; --verify can be said."""
    data = write_samples(tmp_path / "data", 3)
    arguments = (
        "--method", "rtn", "--verify", "--calib-data", data, "--held-out", "3",
        "--response-cache", tmp_path / "answers.jsonl",
    )  # fmt: skip
    assert run(tiny_checkpoint, output, *arguments, "--max-new-tokens", "4") == OK, (
        capsys.readouterr().err
    )
    report = json.loads((output / "report.json").read_text())
    assert report["verification"]["ranks"]["lists"] == 3
