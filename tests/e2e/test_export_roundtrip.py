"""A calibrated export, its ordinary checkpoint, and the way back to an engine: equal weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.exporting import tree_hashes, write_samples
from helpers.inputs import GRIDS, hf_inputs, random_pages, random_prompt
from helpers.tiny import read_spec
from mmr5_export import export
from mmr5_export.options import ExportOptions
from mmr5_kernels.reference import dequantize
from mmr5_runtime.artifact import TensorReader, read_manifest
from mmr5_runtime.types import ExportError

library = pytest.importorskip("compressed_tensors.quantization", reason="needs the export extra")


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an int4 GPTQ engine and the checkpoint written beside it."""
    folder = tmp_path_factory.mktemp("made")
    options = ExportOptions(
        calib_data=write_samples(folder / "data", 12, own_of=tiny_checkpoint),
        calib_samples=4,
        held_out=2,
        max_new_tokens=8,  # random weights never stop
        checkpoint_out=folder / "checkpoint",
    )
    export(tiny_checkpoint, "int4", folder / "engine", options)
    return folder


def stored(engine: Path) -> dict[str, Tensor]:
    with TensorReader(engine, manifest := read_manifest(engine)) as reader:
        return {name: reader.get(name) for name in manifest.tensors}


@torch.no_grad()
def test_transformers_loads_the_checkpoint_and_computes_what_was_quantized(
    made: Path, tiny_checkpoint: Path
) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration as Qwen

    config = json.loads((made / "checkpoint" / "config.json").read_text())
    library.QuantizationConfig.model_validate(config["quantization_config"])
    golden = Qwen.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16).eval()
    manifest, tensors = read_manifest(made / "engine"), stored(made / "engine")
    linears = [name for name in manifest.formats if name.startswith("model.layers.")]
    assert len(linears) == 21
    for name in linears:
        suffixes = manifest.formats[name].tensors(1, 128)
        parts = {suffix: tensors[f"{name}.{suffix}"] for suffix in suffixes}
        weight = dequantize(manifest.formats[name], parts, torch.bfloat16)
        path = name.replace("model.layers", "model.language_model.layers")
        golden.get_submodule(path).weight.data = weight
    spec = read_spec(tiny_checkpoint)
    inputs = hf_inputs(spec, random_prompt(spec, GRIDS, 3), random_pages(spec, GRIDS, 3), GRIDS)
    found = Qwen.from_pretrained(made / "checkpoint", dtype=torch.bfloat16).eval()
    assert torch.equal(found(**inputs).logits, golden(**inputs).logits)


def test_the_checkpoint_comes_back_as_the_same_engine(made: Path, tmp_path: Path) -> None:
    manifest = export(made / "checkpoint", None, tmp_path / "engine")
    assert manifest.quant.name == "as-stored" and "quantized" in manifest.report["unverified"]
    original, again = stored(made / "engine"), stored(tmp_path / "engine")
    head = {name for name in {*original, *again} if name.startswith("lm_head.")}
    assert again.keys() - head == original.keys() - head
    assert all(torch.equal(again[name], original[name]) for name in again.keys() - head)
    assert again["lm_head.weight"].dtype == torch.bfloat16  # not quantized unasked


def test_a_quantized_checkpoint_is_not_quantized_again(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"taken over as it is.*leave out --quant and --method"):
        export(made / "checkpoint", "int4", tmp_path / "engine", ExportOptions(method="gptq"))
    assert not list(tmp_path.iterdir())


def test_tensorrt_llm_does_not_get_what_it_misreads(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(
        method="rtn",
        verify=False,
        checkpoint_out=tmp_path / "checkpoint",
        checkpoint_for="tensorrt-llm",
    )
    with pytest.raises(ExportError, match="TensorRT-LLM takes 8-bit .* for fp8"):
        export(tiny_checkpoint, "int8", tmp_path / "engine", options)
    assert not list(tmp_path.iterdir())


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmr5_export.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_dry_run_writes_nothing_and_says_what_would_be(
    made: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    data = ("--calib-data", made / "data", "--calib-samples", "4", "--held-out", "2")
    found = run("--model", tiny_checkpoint, "--output", tmp_path / "e", "--dry-run", *data)
    assert found.returncode == 0, found.stderr
    assert "21 linears w4a16-g128 by gptq" in found.stdout
    assert "samples: 4 to calibrate, 2 held out" in found.stdout
    assert "memory, layer: about" in found.stdout and "time: very roughly" in found.stdout
    assert not list(tmp_path.iterdir())


def test_exit_statuses(made: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = ("--output", tmp_path / "engine")
    model = ("--model", tiny_checkpoint)
    data = ("--calib-data", made / "data", "--held-out", "2", "--max-new-tokens", "8")
    assert run(*model, *output, "--damp", "7").returncode == 2
    assert run(*model, *output, "--quant", "int3").returncode == 2
    assert run(*model, *output).returncode == 2  # int4 without calibration data
    assert run(*model, *output, *data).returncode == 3  # fewer than 128 samples
    assert run("--model", tmp_path / "nowhere", *output).returncode == 1
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run("--model", empty, *output).returncode == 3
    # Random weights cannot put the page first that the given answers do, in all of eleven lists.
    threshold = ("--min-top1-agreement", "1", "--held-out", "11", "--method", "rtn")
    rejected = run(*model, *output, *data, *threshold)
    assert rejected.returncode == 5, rejected.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "engine.rejected"]


def test_a_changed_option_does_not_resume(
    made: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mmr5_export.pipeline as pipeline

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    options: dict[str, Any] = {"calib_data": made / "data", "calib_samples": 4, "held_out": 2}
    options["max_new_tokens"] = 8
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pipeline, "make_engine", cut)
        export(tiny_checkpoint, "int4", tmp_path / "engine", ExportOptions(**options))
    before = tree_hashes(tmp_path)
    assert any("layer-02" in name for name in before)
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"damp": 0.05}, r"recipe\.quant\.damp was 0\.01 and is now 0\.05"),
        ({"seed": 9}, r"options\.seed was 0 and is now 9"),
        ({"held_out": 1}, r"options\.held_out was 2 and is now 1"),
    )
    for changed, message in changes:
        with pytest.raises(ExportError, match=f"cannot be resumed because .*{message}"):
            again = ExportOptions(**{**options, **changed}, resume=True)
            export(tiny_checkpoint, "int4", tmp_path / "engine", again)
    with monkeypatch.context() as patched, pytest.raises(ExportError, match=r"versions\.torch"):
        patched.setattr("mmr5_export.job.tool_versions", lambda: {"torch": "0.1"})
        export(tiny_checkpoint, "int4", tmp_path / "engine", ExportOptions(**options, resume=True))
    assert tree_hashes(tmp_path) == before
    export(tiny_checkpoint, "int4", tmp_path / "engine", ExportOptions(**options, resume=True))
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]
