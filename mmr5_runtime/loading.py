"""From an engine folder to everything a request needs, or one clear error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmr5_runtime.artifact import TensorReader, read_manifest, verify_hashes
from mmr5_runtime.engine import Engine
from mmr5_runtime.image import PixelBudget
from mmr5_runtime.model import Model
from mmr5_runtime.prompt import PromptTokenizer, template_sha256
from mmr5_runtime.types import EngineError, RequestError

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class LoadedEngine:
    """One engine folder in memory; immutable and shared by all requests."""

    engine: Engine
    tokenizer: PromptTokenizer
    budget: PixelBudget
    image_settings: Mapping[str, Any]  # keyword arguments of image.preprocess
    generation_config: Mapping[str, Any]
    context: int  # tokens of prompt and reply together


def load_engine(
    path: Path,
    *,
    device: str,
    dtype: str,
    min_pixels: int | None,
    max_pixels: int | None,
    check_hashes: bool,
) -> LoadedEngine:
    """Read and check the manifest, then stream the weights to the device.

    Raises EngineError for anything wrong with the folder, RequestError for an option.
    """
    manifest = read_manifest(path)
    if check_hashes:
        verify_hashes(path, manifest)
    if manifest.template_sha256 != template_sha256():
        raise EngineError(
            f"{path} was exported with another prompt template than this mmr5-runtime has; "
            "export it again with this version."
        )
    where = resolve_device(device)
    compute = resolve_dtype(dtype, where)
    # Everything small is checked before the weights are read, which takes minutes at 7B.
    stored = manifest.pixel_budget
    budget = PixelBudget(stored.min_pixels, stored.max_pixels).replaced(min_pixels, max_pixels)
    tokenizer = PromptTokenizer.from_file(path / "tokenizer.json")
    generation_config = _read_optional(path / "generation_config.json")
    with TensorReader(path, manifest) as reader:
        model = Model.from_tensors(manifest.spec, reader.get, manifest.formats, compute, where)
    return LoadedEngine(
        engine=Engine(model, where),
        tokenizer=tokenizer,
        budget=budget,
        image_settings=manifest.image_settings,
        generation_config=generation_config,
        context=manifest.spec.text.max_position_embeddings,
    )


def resolve_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` to a device that is there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise RequestError(f"device={name!r} is unknown; pass auto, cpu, cuda or cuda:N.")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise RequestError(f"device={name!r} is not there ({count} GPUs seen); pass cpu.")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU and float32 on a CPU, where few have bfloat16 arithmetic."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise RequestError(f"dtype={name!r} is unknown; pass auto, bfloat16 or float32.")
    return DTYPES[name]


def _read_optional(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} cannot be read ({error}); export the engine again.") from error
    if not isinstance(content, dict):
        raise EngineError(f"{path} holds no JSON object; export the engine again.")
    return content
