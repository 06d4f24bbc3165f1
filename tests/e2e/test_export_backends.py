"""Exports with files for other engines: complete, described, repeatable, and resumable anywhere."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.exporting import tree_hashes, write_samples
from helpers.for_tensorrt import (
    MAX_PIXELS,
    PAGE_TOKENS,
    TARGETS,
    calibrated,
    for_tensorrt,
    run,
    write_untied,
)
from mmr5_export import export
from mmr5_export.agreement import VerificationFailed
from mmr5_export.cli import OK, main
from mmr5_export.options import ExportOptions
from mmr5_runtime.artifact import MANIFEST_NAME, read_manifest, verify_hashes
from mmr5_runtime.reuse.identity import engine_identity
from mmr5_runtime.types import ExportError

ALL = ("onnxruntime", "tensorrt-llm")
BUNDLES = {
    "engine": "tensorrt-llm/engine",
    "llm-api": "tensorrt-llm/llm-api",
    "onnx": "tensorrt",
}
FILES = {
    "decoder.onnx",
    "head.onnx",
    "vision.onnx",
    "tensorrt-llm/engine/ckpt/config.json",
    "tensorrt-llm/engine/ckpt/rank0.safetensors",
    "tensorrt-llm/engine/vision/model.onnx",
    "tensorrt-llm/engine/vision/model.data",
    "tensorrt-llm/engine/vision/profile.json",
    "tensorrt-llm/engine/build.json",
    "tensorrt-llm/engine/build.sh",
    "tensorrt-llm/engine/bundle.json",
    "tensorrt-llm/llm-api/config.json",
    "tensorrt-llm/llm-api/model.safetensors",
    "tensorrt-llm/llm-api/hf_quant_config.json",
    "tensorrt-llm/llm-api/tokenizer.json",
    "tensorrt-llm/llm-api/preprocessor_config.json",
    "tensorrt-llm/llm-api/sampling_params.json",
    "tensorrt-llm/llm-api/llm_args-1.2.1.yaml",
    "tensorrt-llm/llm-api/llm_args-1.3.0rc22.yaml",
    "tensorrt-llm/llm-api/llm_args-1.4.0rc1.yaml",
    "tensorrt-llm/llm-api/bundle.json",
    "tensorrt/decoder.onnx",
    "tensorrt/decoder.data",
    "tensorrt/vision.onnx",
    "tensorrt/vision.data",
    "tensorrt/profiles.json",
    "tensorrt/build.sh",
    "tensorrt/build.json",
    "tensorrt/bundle.json",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untied(tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="module")
def data(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("data"), 6, own_of=checkpoint)


@pytest.fixture(scope="module")
def native(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("native") / "engine"
    run(checkpoint, output)
    return output


@pytest.fixture(scope="module")
def full(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("full") / "engine"
    run(checkpoint, output, **for_tensorrt(backend=ALL))
    return output


def test_every_file_is_there_and_hashed(full: Path) -> None:
    manifest = read_manifest(full)
    verify_hashes(full, manifest)
    assert set(tree_hashes(full)) == {*manifest.files, MANIFEST_NAME}
    added = {name for backend in manifest.backends.values() for name in backend.files}
    assert FILES <= added
    assert list(manifest.backends) == list(ALL)
    assert list(manifest.backends["tensorrt-llm"].facts["targets"]) == list(TARGETS)


def test_a_native_engine_is_the_same_with_and_without(native: Path, full: Path) -> None:
    alone, beside = read_manifest(native), read_manifest(full)
    assert alone.native_files == beside.native_files
    identities = {engine_identity(m, torch.float32, torch.device("cpu")) for m in (alone, beside)}
    assert len(identities) == 1


@pytest.mark.parametrize("target", TARGETS)
def test_a_bundle_describes_its_folder(full: Path, target: str) -> None:
    folder = full / BUNDLES[target]
    bundle = json.loads((folder / "bundle.json").read_text())
    hashes = tree_hashes(folder)
    del hashes["bundle.json"]
    assert {name: entry["sha256"] for name, entry in bundle["files"].items()} == hashes
    assert bundle["target"] == target
    facts = read_manifest(full).backends["tensorrt-llm"].facts["targets"][target]
    assert facts["folder"] == BUNDLES[target]
    assert facts["verified"].startswith(bundle["verified"])
    assert "not executed" in bundle["verified"]


def test_a_bundle_says_what_to_run(full: Path) -> None:
    said = {
        target: json.loads((full / folder / "bundle.json").read_text())
        for target, folder in BUNDLES.items()
    }
    assert [words[0] for words in said["engine"]["build"]] == ["trtllm-build", "trtexec"]
    assert [words[0] for words in said["onnx"]["build"]] == ["trtexec", "trtexec"]
    assert "build" not in said["llm-api"]  # and its folder has no build.sh
    assert list(said["llm-api"]["serve"]) == ["1.2.1", "1.3.0rc22", "1.4.0rc1"]
    assert said["llm-api"]["serve"]["1.2.1"][0] == "trtllm-serve"


def test_the_table_that_the_graphs_lack_is_found_in_the_engine(full: Path) -> None:
    folder = full / BUNDLES["onnx"]
    table = json.loads((folder / "bundle.json").read_text())["embeddings"]
    assert load_file(folder / table["file"])[table["tensor"]].shape == (576, 128)


def test_a_checkpoint_for_the_llm_api_lets_through_no_larger_pages(full: Path) -> None:
    """Its limits are for pages of this size; the source allows pages 341 times as large."""
    name = "preprocessor_config.json"
    own = json.loads((full / name).read_text())
    found = json.loads((full / BUNDLES["llm-api"] / name).read_text())
    assert found == {**own, "min_pixels": 3136, "max_pixels": MAX_PIXELS}
    stops = json.loads((full / BUNDLES["llm-api"] / "sampling_params.json").read_text())
    assert tuple(stops["stop_token_ids"]) == read_manifest(full).spec.eos_token_ids
    assert "</answer>" in stops["stop"]


def test_the_build_is_for_the_sizes_and_shapes_that_were_exported(full: Path) -> None:
    folder = full / BUNDLES["engine"]
    build = json.loads((folder / "build.json").read_text())
    decoder, vision = (step["argv"] for step in build["steps"])
    # Twenty pages of 97 tokens and 2,048 of an answer are more than the context of 4,096.
    assert decoder[decoder.index("--max_input_len") + 1] == "2048"
    assert decoder[decoder.index("--max_multimodal_len") + 1] == str(20 * PAGE_TOKENS)
    dtype = json.loads((folder / "ckpt" / "config.json").read_text())["dtype"]
    assert decoder[decoder.index("--gemm_plugin") + 1] == dtype == "bfloat16"
    largest = next(word for word in vision if word.startswith("--maxShapes="))
    assert f"pixels:{PAGE_TOKENS * 4}x1176" in largest


def test_the_card_and_the_report_say_what_was_verified(full: Path) -> None:
    manifest, card = read_manifest(full), (full / "README.md").read_text()
    report = json.loads((full / "report.json").read_text())
    assert set(report["backends"]) == set(ALL)
    assert "## Other engines" in card
    for facts in manifest.backends["tensorrt-llm"].facts["targets"].values():
        assert facts["verified"] in card
    assert manifest.backends["onnxruntime"].verified in card
    assert "--backend onnxruntime --backend tensorrt-llm --trt-target engine" in report["command"]


def test_a_card_without_other_engines_does_not_speak_of_them(native: Path) -> None:
    assert "Other engines" not in (native / "README.md").read_text()
    assert read_manifest(native).backends == {}


def test_the_command_says_where_to_build(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(checkpoint), "--method", "rtn", "--no-verify", "--json"]
    words += ["--output", str(tmp_path / "engine"), "--max-pixels", str(MAX_PIXELS)]
    assert main([*words, "--backend", "tensorrt-llm", "--backend", "native"]) == OK
    *lines, document = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    assert "run tensorrt-llm/engine/build.sh where TensorRT-LLM 1.2.1 is installed" in text
    assert "--trt-target llm-api" in text
    assert "not executed" in json.loads(document)["backends"]["tensorrt-llm"]


def test_equal_exports_have_equal_bytes(full: Path, checkpoint: Path, tmp_path: Path) -> None:
    asked = for_tensorrt(backend=(*reversed(ALL), "native"), trt_target=TARGETS[::-1])
    run(checkpoint, tmp_path / "engine", **asked)
    assert tree_hashes(tmp_path / "engine") == tree_hashes(full)


@pytest.mark.parametrize("where", ["onnxruntime", "engine", "llm-api", "onnx"])
@pytest.mark.parametrize("end", [False, True], ids=["begun", "written"])
def test_an_export_cut_off_in_a_backend_resumes_to_equal_bytes(
    full: Path, checkpoint: Path, tmp_path: Path, where: str, end: bool
) -> None:
    def cut(stage: str, done: int, total: int, note: str = "") -> None:
        if stage == where and (done == total if end else done < total):
            raise KeyboardInterrupt

    options: dict[str, Any] = {"method": "rtn", "verify": False, **for_tensorrt(backend=ALL)}
    output = tmp_path / "engine"
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, "int4", output, ExportOptions(**options), progress=cut)
    assert not output.exists()
    # Nothing was calibrated, so there is nothing to keep: the next one starts over by itself.
    export(checkpoint, "int4", output, ExportOptions(**options, resume=True))
    assert tree_hashes(output) == tree_hashes(full)
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_a_calibrated_export_goes_on_behind_its_last_layer(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    options = calibrated(data, **for_tensorrt(backend=ALL))
    run(checkpoint, tmp_path / "whole" / "engine", "int8", **options | {"trt_target": ("engine",)})
    seen: list[str] = []

    def cut(stage: str, done: int, total: int, note: str = "") -> None:
        if stage == "engine" and done == 1:
            raise KeyboardInterrupt

    def watch(stage: str, done: int, total: int, note: str = "") -> None:
        seen.append(stage)

    wanted = ExportOptions(**{**options, "trt_target": ("engine",)})
    output = tmp_path / "cut" / "engine"
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, "int8", output, wanted, progress=cut)
    half = output.with_name("engine.partial-work") / "engine" / "tensorrt-llm" / "engine" / "ckpt"
    assert (half / "rank0.safetensors").is_file()
    with pytest.raises(ExportError, match=r"trt_target"):
        changed = ExportOptions(**{**options, "trt_target": ("engine", "onnx")}, resume=True)
        export(checkpoint, "int8", output, changed)
    wanted = ExportOptions(**{**options, "trt_target": ("engine",)}, resume=True)
    export(checkpoint, "int8", output, wanted, progress=watch)
    assert "engine" in seen and "answer" not in seen
    assert tree_hashes(output) == tree_hashes(tmp_path / "whole" / "engine")


@pytest.mark.parametrize("quant", ["int8", "fp8"])
@pytest.mark.parametrize("method", [None, "rtn"])
def test_ranges_of_inputs_are_seen_where_tensorrt_needs_them(
    checkpoint: Path, data: Path, tmp_path: Path, quant: str, method: str | None
) -> None:
    """Rounding alone does not calibrate, but static scales of activations make it."""
    options = calibrated(data, **for_tensorrt(trt_target=("engine", "onnx")))
    run(checkpoint, tmp_path / "engine", quant, **options | {"method": method})
    folder = tmp_path / "engine" / BUNDLES["engine"] / "ckpt"
    tensors = load_file(folder / "rank0.safetensors")
    scales = [t for name, t in tensors.items() if name.endswith("activation_scaling_factor")]
    assert len(scales) == 3 * 5 and all(float(scale) > 0 for scale in scales)
    manifest = read_manifest(tmp_path / "engine")
    assert len(manifest.report["input_absmax"]) == 3 * 7
    assert manifest.quant.calibration is not None


@pytest.fixture
def programs(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Something that calls itself TensorRT-LLM 1.2.1; its builders make another file every time."""
    site, programs = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("programs")
    (site / "tensorrt_llm").mkdir()
    (site / "tensorrt_llm" / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    metadata = site / "tensorrt_llm-1.2.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: 1.2.1\n")
    monkeypatch.syspath_prepend(str(site))
    made = {"trtllm-build": "llm/rank0.engine", "trtexec": "vision/model.engine"}
    for name, file in made.items():
        (programs / name).write_text(f"#!/bin/sh\nmkdir -p llm\necho built >> {file}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return programs


def test_engines_that_are_built_again_leave_the_folder_readable(
    checkpoint: Path, tmp_path: Path, programs: Path
) -> None:
    output, folder = tmp_path / "engine", tmp_path / "engine" / BUNDLES["engine"]
    run(checkpoint, output, **for_tensorrt(trt_target=("engine",)))
    facts = read_manifest(output).backends["tensorrt-llm"].facts["targets"]["engine"]
    assert facts["built"] and facts["unbuilt"] is None
    assert "engines built by TensorRT-LLM 1.2.1, not executed" in facts["verified"]
    engines = [folder / "llm" / "rank0.engine", folder / "vision" / "model.engine"]
    before = [engine.read_bytes() for engine in engines]
    subprocess.run([folder / "build.sh"], check=True)
    assert all(engine.read_bytes() != old for engine, old in zip(engines, before, strict=True))
    verify_hashes(output, read_manifest(output))
    bundle = json.loads((folder / "bundle.json").read_text())
    assert not [name for name in bundle["files"] if name.endswith(".engine")]


def test_a_build_that_fails_does_not_lose_the_engine(
    checkpoint: Path, tmp_path: Path, programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (programs / "trtexec").write_text("#!/bin/sh\necho no GPU >&2\nexit 3\n")
    output = tmp_path / "engine"
    words = ["--model", str(checkpoint), "--method", "rtn", "--no-verify", "--output", str(output)]
    assert main([*words, "--max-pixels", str(MAX_PIXELS), "--backend", "tensorrt-llm"]) == OK
    assert "not built: trtexec failed with status 3 (no GPU); to build" in capsys.readouterr().out
    facts = read_manifest(output).backends["tensorrt-llm"].facts["targets"]["engine"]
    assert not facts["built"] and "built" not in facts["verified"]
    assert not list(output.rglob("*.engine"))


def test_nothing_is_added_to_an_engine_that_is_rejected(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmr5_export.publish.verdict", lambda *_: "worse than asked.")
    options = calibrated(data, method="rtn", **for_tensorrt(backend=ALL))
    with pytest.raises(VerificationFailed):
        run(checkpoint, tmp_path / "engine", **options)
    manifest = read_manifest(tmp_path / "engine.rejected")
    assert manifest.backends == {}
    assert not [name for name in tree_hashes(tmp_path / "engine.rejected") if "tensorrt" in name]
