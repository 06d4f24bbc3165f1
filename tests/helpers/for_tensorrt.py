"""A tiny checkpoint that every target of TensorRT takes, and options that go with it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from helpers.tiny import make_hf_model, tiny_configs, write_checkpoint
from mmr5_export import export
from mmr5_export.options import ExportOptions
from mmr5_runtime.artifact import Manifest

MAX_PIXELS = 48 * 28 * 28  # a context of 4,096 holds many such pages
PAGE_TOKENS = 97  # of the largest of them: one token high and as thin as may be
TARGETS = ("engine", "llm-api", "onnx")


def for_tensorrt(**options: Any) -> dict[str, Any]:
    """Options of an export with all three targets, with ``options`` in place of theirs."""
    every: dict[str, Any] = {"backend": ("tensorrt-llm",), "trt_target": TARGETS}
    return {**every, "max_pixels": MAX_PIXELS, **options}


def run(checkpoint: Path, output: Path, quant: str = "int4", **options: Any) -> Manifest:
    """An export that rounds and does not verify, with ``options`` in place of that."""
    plain = {"method": "rtn", "verify": False, "max_pixels": MAX_PIXELS}
    return export(checkpoint, quant, output, ExportOptions(**{**plain, **options}))


def calibrated(data: Path, **options: Any) -> dict[str, Any]:
    """Options of a small calibrated and verified export."""
    sizes = {"calib_samples": 3, "held_out": 2, "max_new_tokens": 4}
    return {"calib_data": data, "method": None, "verify": True, **sizes, **options}


def write_untied(folder: Path, layout: Any = "new") -> Path:
    """A random bf16 checkpoint with a head of its own and a vocabulary in multiples of 64."""
    config = copy.deepcopy(tiny_configs()["int4"])
    config.text_config.vocab_size = 576
    return write_checkpoint(make_hf_model(config, seed=9), folder, layout, dtype=torch.bfloat16)
