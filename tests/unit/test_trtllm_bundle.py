"""Bundles: hashes of every file, command lines as data, and running them where that is possible."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from mmr5_export.options import OptionError
from mmr5_export.trtllm.bundle import (
    Step,
    build_lines,
    builder_installed,
    check_builder,
    decoder_step,
    run_steps,
    serve_step,
    vision_step,
    write_build,
    write_bundle,
)
from mmr5_export.trtllm.refusals import Limits
from mmr5_export.trtllm.versions import VERSIONS

V121 = VERSIONS["1.2.1"]
LIMITS = Limits(2, 20_000, 22_048, 39_000, 980)
SHAPES = {
    "pixels": {"min": [4, 1176], "opt": [3920, 1176], "max": [3920, 1176]},
    "windows": {"min": [1, 4], "opt": [70, 64], "max": [250, 64]},
}
TRTLLM_BUILD = (
    "trtllm-build --checkpoint_dir ckpt --output_dir llm --gemm_plugin bfloat16 "
    "--gpt_attention_plugin bfloat16 --max_batch_size 2 --max_input_len 20000 --max_seq_len 22048 "
    "--max_num_tokens 20000 --max_multimodal_len 39000 --kv_cache_type paged --tokens_per_block 32 "
    "--use_paged_context_fmha enable"
)
TRTEXEC = (
    "trtexec --onnx=vision/model.onnx --saveEngine=vision/model.engine --stronglyTyped "
    "--skipInference --minShapes=pixels:4x1176,windows:1x4 "
    "--optShapes=pixels:3920x1176,windows:70x64 --maxShapes=pixels:3920x1176,windows:250x64"
)


def test_the_command_that_builds_the_decoder() -> None:
    assert list(decoder_step(V121, LIMITS, "bfloat16").argv) == TRTLLM_BUILD.split()


@pytest.mark.parametrize("name", ["1.3.0rc22", "1.4.0rc1"])
def test_a_version_without_a_builder_gets_no_such_command(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} builds no engines"):
        decoder_step(VERSIONS[name], LIMITS, "bfloat16")


def test_a_dtype_that_the_plugins_do_not_know() -> None:
    with pytest.raises(ValueError, match="float16, bfloat16, not in float32"):
        decoder_step(V121, LIMITS, "float32")


def test_the_command_that_builds_the_tower() -> None:
    assert list(vision_step(SHAPES).argv) == TRTEXEC.split()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("1.2.1", "--extra_llm_api_options llm_args-1.2.1.yaml"),
        ("1.3.0rc22", "--config llm_args-1.3.0rc22.yaml"),
        ("1.4.0rc1", "--config llm_args-1.4.0rc1.yaml"),
    ],
)
def test_the_command_that_serves(name: str, words: str) -> None:
    expected = f"trtllm-serve . --backend pytorch {words}"
    assert shlex.join(serve_step(VERSIONS[name]).argv) == expected


def test_the_build_as_data_and_as_a_script_say_the_same(tmp_path: Path) -> None:
    steps = (decoder_step(V121, LIMITS, "bfloat16"), vision_step(SHAPES))
    write_build(tmp_path, V121, steps)
    data = json.loads((tmp_path / "build.json").read_text())
    assert data["tensorrt_llm"] == "1.2.1" and "tensorrt~=10.14.1" in data["needs"]
    lines = (tmp_path / "build.sh").read_text().splitlines()
    assert [shlex.split(line) for line in lines[-2:]] == [step["argv"] for step in data["steps"]]
    assert lines[0] == "#!/bin/sh" and "set -eu" in lines


def test_a_bundle_names_every_file_below_it_with_its_hash(tmp_path: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "config.json").write_text("{}")
    (tmp_path / "build.sh").write_text("exit")
    for _ in range(2):  # a bundle that is there already is not part of itself
        lines = build_lines([Step("x", ("a", "b"))])
        write_bundle(tmp_path, "engine", {"tool": "1"}, "nothing was run", lines)
    found = json.loads((tmp_path / "bundle.json").read_text())
    assert found == {
        "target": "engine",
        "made_by": {"tool": "1"},
        "files": {
            name: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
            for name, content in (("build.sh", b"exit"), ("ckpt/config.json", b"{}"))
        },
        "verified": "nothing was run",
        "build": [["a", "b"]],
    }


def test_where_tensorrt_llm_is_not_installed_nothing_is_asked_for() -> None:
    assert not builder_installed()
    check_builder(V121)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Something that calls itself TensorRT-LLM 1.2.1, and a builder that notes its arguments."""
    site = tmp_path / "site"
    (site / "tensorrt_llm").mkdir(parents=True)
    (site / "tensorrt_llm" / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    metadata = site / "tensorrt_llm-1.2.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: 1.2.1\n")
    monkeypatch.syspath_prepend(str(site))
    program = tmp_path / "bin" / "trtllm-build"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\necho "$PWD $@" >> made\n[ "$1" = ok ] || { echo no memory >&2; exit 3; }\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    folder = tmp_path / "bundle"
    folder.mkdir()
    return folder


@pytest.fixture
def trtexec(installed: Path) -> Path:
    """The second program of a build, which does nothing."""
    program = installed.parent / "bin" / "trtexec"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return program


def test_the_steps_run_in_the_folder_of_the_bundle(installed: Path) -> None:
    steps = [Step("x", ("trtllm-build", "ok", "a b")), Step("y", ("trtllm-build", "ok"))]
    assert run_steps(installed, steps) is None
    assert (installed / "made").read_text() == f"{installed} ok a b\n{installed} ok\n"


def test_a_step_that_fails_stops_the_build_with_its_words(installed: Path) -> None:
    steps = [Step("x", ("trtllm-build", "bad")), Step("y", ("trtllm-build", "ok"))]
    assert run_steps(installed, steps) == "trtllm-build failed with status 3 (no memory)"
    assert (installed / "made").read_text() == f"{installed} bad\n"


def test_a_build_that_failed_leaves_no_engine(installed: Path) -> None:
    (installed / "llm").mkdir()
    (installed / "llm" / "rank0.engine").write_text("half")
    (installed / "vision.engine").write_text("half")
    steps = [Step("llm", ("trtllm-build", "ok")), Step("vision.engine", ("no-such-program",))]
    reason = run_steps(installed, steps)
    assert reason is not None and reason.startswith("no-such-program could not be run")
    assert sorted(path.name for path in installed.iterdir()) == ["made"]


def test_a_build_that_can_run_is_let_through(trtexec: Path) -> None:
    assert builder_installed()
    check_builder(V121)


def test_another_version_than_the_files_are_for_is_refused_at_once(trtexec: Path) -> None:
    with pytest.raises(OptionError, match=r"TensorRT-LLM 1\.2\.1 is installed but .* 1\.4\.0rc1"):
        check_builder(VERSIONS["1.4.0rc1"])


def test_an_installation_that_does_not_say_its_version(installed: Path, trtexec: Path) -> None:
    (metadata,) = (installed.parent / "site").glob("*.dist-info/METADATA")
    metadata.unlink()
    metadata.parent.rmdir()
    with pytest.raises(OptionError, match=r"TensorRT-LLM of no known version is installed"):
        check_builder(V121)


@pytest.mark.parametrize("program", ["trtllm-build", "trtexec"])
def test_a_program_that_is_not_there_is_named_at_once(trtexec: Path, program: str) -> None:
    (trtexec.parent / program).unlink()
    with pytest.raises(OptionError, match=rf"needs {program}, which is not on the PATH; .*\.$"):
        check_builder(V121)


def test_the_script_runs_its_commands_from_anywhere(installed: Path, tmp_path: Path) -> None:
    write_build(installed, V121, [Step("x", ("trtllm-build", "ok", "it's"))])
    subprocess.run([installed / "build.sh"], cwd=tmp_path, check=True)
    assert (installed / "made").read_text() == f"{installed} ok it's\n"
