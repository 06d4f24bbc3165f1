"""What lies beside a file that somebody else has to build or serve: hashes and command lines.

``bundle.json`` names every other file of its folder with hash and size, what was verified of them,
and what to run: under ``build`` the commands that make engines, under ``serve`` by version what
serves a checkpoint that needs no building. ``build.json`` has the former as data, ``build.sh`` the
same as a script. Command lines are lists of words, relative to the folder, so that nothing has to
be quoted to be run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmr5_export.options import OptionError
from mmr5_export.trtllm.llm_args import file_name
from mmr5_export.trtllm.refusals import Limits
from mmr5_export.trtllm.versions import Version
from mmr5_runtime.artifact import file_sha256

BUNDLE_NAME, BUILD_NAME, SCRIPT_NAME = "bundle.json", "build.json", "build.sh"
BUILDERS = ("trtllm-build", "trtexec")  # the programs of the two steps
ENGINES = ("llm", "vision/model.engine")  # and what they make
_DTYPES = ("float16", "bfloat16")
_TOKENS_PER_BLOCK = 32  # of the KV cache that is shared between prompts; the builder's default


@dataclass(frozen=True)
class Step:
    """One command: what it makes, and its words, program first."""

    makes: str
    argv: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """A mapping that ``json`` can write."""
        return {"makes": self.makes, "argv": list(self.argv)}


def decoder_step(version: Version, limits: Limits, dtype: str) -> Step:
    """``trtllm-build`` of ``ckpt`` into ``llm``; ``dtype`` is that of the checkpoint.

    Options are those of ``tensorrt_llm/commands/build.py`` in 1.2.1. Paged context attention is
    what lets prompts share blocks of keys and values. Raises ``ValueError`` for a version that
    builds no engines and for a dtype that its plugins do not know.
    """
    if not version.engines:
        raise ValueError(f"TensorRT-LLM {version.name} builds no engines.")
    if dtype not in _DTYPES:
        raise ValueError(f"engines compute in one of {', '.join(_DTYPES)}, not in {dtype}.")
    sizes = {
        "max_batch_size": limits.max_batch_size,
        "max_input_len": limits.max_input_len,
        "max_seq_len": limits.max_seq_len,
        "max_num_tokens": limits.max_num_tokens,
        "max_multimodal_len": limits.max_multimodal_len,
    }
    words = [BUILDERS[0], "--checkpoint_dir", "ckpt", "--output_dir", ENGINES[0]]
    words += ["--gemm_plugin", dtype, "--gpt_attention_plugin", dtype]
    for name, size in sizes.items():
        words += [f"--{name}", str(size)]
    words += ["--kv_cache_type", "paged", "--tokens_per_block", str(_TOKENS_PER_BLOCK)]
    return Step(ENGINES[0], (*words, "--use_paged_context_fmha", "enable"))


Shapes = Mapping[str, Mapping[str, Sequence[int]]]
"""Shapes of an ONNX file's inputs: by input name, what ``min``, ``opt`` and ``max`` are."""


def vision_step(shapes: Shapes) -> Step:
    """``trtexec`` for ``vision/model.onnx``, with one optimisation profile over ``shapes``."""
    words = [BUILDERS[1], "--onnx=vision/model.onnx", f"--saveEngine={ENGINES[1]}"]
    words += ["--stronglyTyped", "--skipInference"]
    for option in ("min", "opt", "max"):
        listed = (f"{name}:{'x'.join(map(str, found[option]))}" for name, found in shapes.items())
        words.append(f"--{option}Shapes={','.join(listed)}")
    return Step(ENGINES[1], tuple(words))


def serve_step(version: Version) -> Step:
    """``trtllm-serve`` of a checkpoint for the LLM API, from within its folder."""
    words = ("trtllm-serve", ".", "--backend", "pytorch")
    return Step("a server", (*words, version.config_option, file_name(version)))


def write_build(folder: Path, version: Version, steps: Sequence[Step]) -> None:
    """Writes ``build.json`` and ``build.sh``."""
    document = {
        "tensorrt_llm": version.name,
        "needs": list(version.needs),
        "steps": [step.to_json() for step in steps],
    }
    write_json(folder / BUILD_NAME, document)
    script = folder / SCRIPT_NAME
    lines = ["#!/bin/sh", f"# Needs TensorRT-LLM {version.name} and a GPU.", "set -eu"]
    lines += ['cd "$(dirname "$0")"', *(shlex.join(step.argv) for step in steps)]
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    script.chmod(0o755)


def write_bundle(
    folder: Path,
    target: str,
    made_by: Mapping[str, str],
    verified: str,
    more: Mapping[str, Any],
) -> None:
    """Writes ``bundle.json`` about all other files that are in ``folder`` and below it.

    ``made_by`` maps tools to versions; ``verified`` says exactly what was run of the files;
    ``more`` is what else the target has to say, its command lines among it.
    """
    listed = sorted(
        path for path in folder.rglob("*") if path.is_file() and path != folder / BUNDLE_NAME
    )
    files = {
        path.relative_to(folder).as_posix(): {
            "sha256": file_sha256(path),
            "size": path.stat().st_size,
        }
        for path in listed
    }
    document = {
        "target": target,
        "made_by": dict(made_by),
        "files": files,
        "verified": verified,
        **more,
    }
    write_json(folder / BUNDLE_NAME, document)


def build_lines(steps: Sequence[Step]) -> dict[str, Any]:
    """What ``bundle.json`` says of commands that make engines."""
    return {"build": [list(step.argv) for step in steps]}


def builder_installed() -> bool:
    """Whether TensorRT-LLM is here, so that an export builds the engines itself."""
    return importlib.util.find_spec("tensorrt_llm") is not None


def check_builder(version: Version) -> None:
    """Raises :class:`OptionError` where TensorRT-LLM is here but could not run the build.

    It is then of another version than ``version``, or a program of the build is not on the PATH.
    """
    if not builder_installed():
        return
    try:
        found = importlib.metadata.version("tensorrt_llm")
    except importlib.metadata.PackageNotFoundError:
        found = "of no known version"
    elsewhere = "export where TensorRT-LLM is not installed and build elsewhere"
    if found != version.name:
        raise OptionError(
            f"TensorRT-LLM {found} is installed but the build is for {version.name}; install that "
            f"one, or {elsewhere}."
        )
    for program in BUILDERS:
        if shutil.which(program) is None:
            raise OptionError(
                f"TensorRT-LLM {found} is installed but its build needs {program}, which is not on "
                f"the PATH; put it there, or {elsewhere}."
            )


def run_steps(folder: Path, steps: Sequence[Step]) -> str | None:
    """Runs a build in ``folder``; returns why it failed, None when everything was built.

    What a build that failed has made is removed: ``build.sh`` makes all of it. Nothing is raised,
    since the files it starts from are good and hours of work lie behind them.
    """
    for step in steps:
        try:
            done = subprocess.run(
                step.argv, cwd=folder, capture_output=True, text=True, check=False
            )
        except OSError as error:
            reason = f"{step.argv[0]} could not be run ({error})"
        else:
            if done.returncode == 0:
                continue
            said = (done.stderr or done.stdout).strip().rpartition("\n")[2]
            reason = f"{step.argv[0]} failed with status {done.returncode} ({said})"
        for name in (made.makes for made in steps):
            shutil.rmtree(folder / name, ignore_errors=True)
            if (folder / name).is_file():
                (folder / name).unlink()
        return reason
    return None


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Strict JSON, keys in their order."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
