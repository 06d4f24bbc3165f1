"""What lies beside a file that somebody else has to build or serve: hashes and command lines.

``bundle.json`` names every other file of its folder with hash and size, what was verified of them,
and what to run. ``build.json`` has the commands as data, ``build.sh`` the same as a script. Command
lines are lists of words, relative to the folder, so that nothing has to be quoted to be run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmr5_export.trtllm.llm_args import file_name
from mmr5_export.trtllm.refusals import Limits
from mmr5_export.trtllm.versions import Version
from mmr5_runtime.artifact import file_sha256
from mmr5_runtime.types import ExportError

BUNDLE_NAME, BUILD_NAME, SCRIPT_NAME = "bundle.json", "build.json", "build.sh"
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
    words = ["trtllm-build", "--checkpoint_dir", "ckpt", "--output_dir", "llm"]
    words += ["--gemm_plugin", dtype, "--gpt_attention_plugin", dtype]
    for name, size in sizes.items():
        words += [f"--{name}", str(size)]
    words += ["--kv_cache_type", "paged", "--tokens_per_block", str(_TOKENS_PER_BLOCK)]
    return Step("llm", (*words, "--use_paged_context_fmha", "enable"))


Shapes = Mapping[str, Mapping[str, Sequence[int]]]
"""Shapes of an ONNX file's inputs: by input name, what ``min``, ``opt`` and ``max`` are."""


def vision_step(shapes: Shapes) -> Step:
    """``trtexec`` for ``vision/model.onnx``, with one optimisation profile over ``shapes``."""
    words = ["trtexec", "--onnx=vision/model.onnx", "--saveEngine=vision/model.engine"]
    words += ["--stronglyTyped", "--skipInference"]
    for option in ("min", "opt", "max"):
        listed = (f"{name}:{'x'.join(map(str, found[option]))}" for name, found in shapes.items())
        words.append(f"--{option}Shapes={','.join(listed)}")
    return Step("vision/model.engine", tuple(words))


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
    steps: Sequence[Step],
) -> None:
    """Writes ``bundle.json`` about all other files that are in ``folder`` and below it.

    ``made_by`` maps tools to versions; ``verified`` says exactly what was run of the files.
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
        "build": [list(step.argv) for step in steps],
    }
    write_json(folder / BUNDLE_NAME, document)


def run_steps(folder: Path, version: Version, steps: Sequence[Step]) -> bool:
    """Runs a build where TensorRT-LLM is installed; False, and nothing is run, where it is not.

    Raises :class:`ExportError` with the last line a command said when it fails, or when the
    TensorRT-LLM that is installed is not ``version``.
    """
    if importlib.util.find_spec("tensorrt_llm") is None:
        return False
    found = importlib.metadata.version("tensorrt_llm")
    if found != version.name:
        raise ExportError(
            f"TensorRT-LLM {found} is installed but the build is for {version.name}; install that "
            "one, or export where there is none and build elsewhere."
        )
    for step in steps:
        try:
            done = subprocess.run(
                step.argv, cwd=folder, capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise ExportError(f"{step.argv[0]} cannot be run ({error}); install it.") from error
        if done.returncode:
            said = (done.stderr or done.stdout).strip().rpartition("\n")[2]
            raise ExportError(
                f"{shlex.join(step.argv)} failed with status {done.returncode} ({said}); see its "
                "output, or build elsewhere."
            )
    return True


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Strict JSON, keys in their order."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
