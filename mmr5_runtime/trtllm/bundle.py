"""The TensorRT-LLM part of an engine folder: which bundle it holds, whether it is whole and built.

A bundle lies in ``tensorrt-llm/engine`` or ``tensorrt-llm/llm-api`` and says in ``bundle.json``
what it holds: ``{"target", "files": {relative path: {"sha256", "size"}}, ...}``. Engines are not in
that list: they are built from it on the machine they run on, into the same folder::

    llm/config.json     what the decoder engine was built for, as trtllm-build writes it
    llm/rank0.engine    the decoder
    vision/model.engine the vision tower

An ``llm-api`` bundle needs no building. It has its arguments, limits among them, in one file per
version of TensorRT-LLM, ``llm_args-<version>.yaml``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmr5_runtime.artifact import file_sha256
from mmr5_runtime.manifest import is_inside
from mmr5_runtime.trtllm.prompt import Limits
from mmr5_runtime.types import EngineError

FOLDER = "tensorrt-llm"
TARGETS = ("engine", "llm-api")
DESCRIPTION = "bundle.json"
DECODER, DECODER_CONFIG, VISION = "llm/rank0.engine", "llm/config.json", "vision/model.engine"
_ARGUMENTS = "llm_args-"
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Bundle:
    """One bundle whose files are there: its folder and target."""

    folder: Path
    target: str

    def built(self) -> BuiltEngine:
        """What was built of an ``engine`` bundle.

        Raises EngineError, saying what to run, when a file of it is missing or unreadable.
        """
        for name in (DECODER, DECODER_CONFIG, VISION):
            if not (self.folder / name).is_file():
                raise EngineError(
                    f"{self.folder / name} is missing: the engines have not been built; run "
                    f"{self.folder / 'build.sh'} on the machine they are to run on."
                )
        return BuiltEngine.from_config(self.folder)

    def stamps(self) -> dict[str, tuple[int, int]]:
        """Size and time of change of what was built: it changes with every build, not its name."""
        stamps = {}
        for name in (DECODER, DECODER_CONFIG, VISION):
            if (path := self.folder / name).is_file():
                found = path.stat()
                stamps[name] = (found.st_size, found.st_mtime_ns)
        return stamps

    def arguments_file(self, version: str) -> Path:
        """The LLM arguments for an installed ``version``: its own, or the last of its release.

        Raises EngineError, naming the versions there are, when there are none.
        """
        files = self.arguments()
        if version in files:
            return files[version]
        near = [path for name, path in files.items() if _minor(name) == _minor(version)]
        if not near:
            raise EngineError(
                f"{self.folder} has LLM arguments for TensorRT-LLM {', '.join(files) or 'nothing'} "
                f"but {version} is installed; install one of those, or export the engine again "
                "with its --trt-version."
            )
        return near[-1]

    def arguments(self) -> dict[str, Path]:
        """Files of LLM arguments by version, the oldest first."""
        files = {
            path.stem.removeprefix(_ARGUMENTS): path
            for path in self.folder.glob(f"{_ARGUMENTS}*.yaml")
        }
        return dict(sorted(files.items(), key=lambda item: _in_order(item[0])))


@dataclass(frozen=True)
class BuiltEngine:
    """Facts of a decoder engine: its limits, rows of its rotary table, dtype, and block reuse.

    ``dtype`` is that of everything that is not quantized, of the vision tower built beside it too;
    ``reuse``: whether prompts can start behind cached blocks, for which the engine needs paged
    context attention.
    """

    limits: Limits
    positions: int
    vocab_size: int
    dtype: torch.dtype
    reuse: bool

    @classmethod
    def from_config(cls, folder: Path) -> BuiltEngine:
        """From ``llm/config.json``; EngineError when it is not what trtllm-build writes."""
        path = folder / DECODER_CONFIG
        config = read_json(path, f"run {folder / 'build.sh'} again")
        try:
            build, model = config["build_config"], config["pretrained_config"]
            limits = Limits(
                sequence=int(build["max_seq_len"]),
                prompt=int(build["max_input_len"]),
                images=int(build["max_prompt_embedding_table_size"]),
            )
            reuse = bool(build["plugin_config"]["use_paged_context_fmha"])
            positions, size = int(model["max_position_embeddings"]), int(model["vocab_size"])
            dtype = dtype_of(model["dtype"])
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"{path} is no description of a TensorRT-LLM engine ({error!r}); run "
                f"{folder / 'build.sh'} again."
            ) from error
        return cls(limits, positions, size, dtype, reuse)


def find_bundle(folder: Path) -> Bundle:
    """The bundle of an engine folder; EngineError when there is none.

    Of two it is the one for engines once they have been built, and before that the other, which
    needs no building.
    """
    found = [name for name in TARGETS if (folder / FOLDER / name / DESCRIPTION).is_file()]
    if not found:
        raise EngineError(
            f"{folder} has nothing for TensorRT-LLM; export it with --backend tensorrt-llm, or "
            "load it with backend='native'."
        )
    built = (folder / FOLDER / TARGETS[0] / DECODER).is_file()
    target = found[0] if built else found[-1]
    return Bundle(folder / FOLDER / target, target)


def check_bundle(bundle: Bundle, hashes: bool) -> None:
    """Compares every file with its size and, with ``hashes``, its sha256.

    Raises EngineError naming the first that is missing, was altered or lies elsewhere. Engines are
    not among them, and may be built again.
    """
    where, remedy = bundle.folder / DESCRIPTION, "export the engine again"
    description = read_json(where, remedy)
    try:
        target = description["target"]
        files = {
            str(name): (str(entry["sha256"]), int(entry["size"]))
            for name, entry in description["files"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"{where} does not describe a bundle ({error!r}); {remedy}.") from error
    if target != bundle.target:
        raise EngineError(
            f"{where} is for {target!r} but lies in the folder of {bundle.target!r}; {remedy}."
        )
    for name, (sha256, size) in files.items():
        if not is_inside(name):
            raise EngineError(f"{where} lists the file {name!r} outside its folder; {remedy}.")
        path = bundle.folder / name
        if not path.is_file():
            raise EngineError(f"{path} is missing; copy the whole engine folder or {remedy}.")
        if path.stat().st_size != size or (hashes and file_sha256(path) != sha256):
            raise EngineError(
                f"{path} was altered since the export (its size or sha256 differs); copy it or "
                f"{remedy}."
            )


def read_json(path: Path, remedy: str) -> Mapping[str, Any]:
    """The object in a JSON file; EngineError with ``remedy`` when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} cannot be read ({error}); {remedy}.") from error
    if not isinstance(content, dict):
        raise EngineError(f"{path} holds no JSON object; {remedy}.")
    return content


def dtype_of(name: object) -> torch.dtype:
    """The dtype a bundle calls ``name``; KeyError when it is none it can have."""
    return _DTYPES[str(name)]


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _in_order(version: str) -> tuple[list[int], float, str]:
    """Sorts versions: 1.3.0rc9 before 1.3.0rc22, and that before 1.3.0."""
    release, _, candidate = version.partition("rc")
    numbers = [int(part) for part in re.findall(r"\d+", release)]
    return numbers, int(candidate) if candidate.isdecimal() else float("inf"), version
