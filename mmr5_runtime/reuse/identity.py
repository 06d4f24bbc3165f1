"""What a stored result was computed with: one key that changes when a bit of it might."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import PIL
import torch

from mmr5_runtime import __version__
from mmr5_runtime.manifest import Manifest

# To be raised whenever what is computed from a page, or how it is stored, changes its bits.
CACHE_SCHEMA = 1


def engine_identity(
    manifest: Manifest,
    dtype: torch.dtype,
    device: torch.device,
    compute: Mapping[str, Any] | None = None,
) -> bytes:
    """SHA-256 (32 bytes) of all that decides the bits of page embeddings and KV but their input.

    That is the engine (hashes of its own files, which are not those of its report or of another
    backend, architecture, storage of every linear, image settings), the arithmetic (compute dtype,
    device, its library versions and switches, the number of CPU threads: a sum that is split
    otherwise rounds otherwise) and the code (versions of this package, of Pillow and NumPy, which
    resize pages). ``compute`` says which kernels run and how prompts and keys and values are kept
    (``Compute.to_json``). Call it after these were set.

    It takes the manifest's word for the files: ``verify_hashes`` of the artifact module checks it.
    """
    return digest(
        {
            "schema": CACHE_SCHEMA,
            "files": {name: entry.sha256 for name, entry in manifest.native_files.items()},
            "tensors": dict(manifest.tensors),
            "architecture": manifest.spec.to_json(),
            "quant": manifest.quant.to_json(),
            "image": asdict(manifest.image),
            "dtype": str(dtype),
            "device": _device(device),
            "compute": dict(compute or {}),
            "versions": {
                "mmr5-runtime": __version__,
                "torch": torch.__version__,
                "pillow": PIL.__version__,
                "numpy": np.__version__,
            },
        }
    )


def digest(document: Mapping[str, Any]) -> bytes:
    """SHA-256 (32 bytes) over ``document`` as canonical JSON.

    JSON quotes and nests, so different documents never give the same text. Tuples count as lists.
    """
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).digest()


def _device(device: torch.device) -> dict[str, Any]:
    """Which processor computes, and the switches of PyTorch that choose between its kernels.

    Of those for float32 only ``fp32_precision`` is read: it also shows what the older ones were set
    to, while reading these raises once the new one was used.
    """
    backends: Any = torch.backends  # modules that put on their switches at run time
    common = {"type": device.type, "deterministic": torch.are_deterministic_algorithms_enabled()}
    if device.type == "cuda":
        return common | {
            "name": torch.cuda.get_device_name(device),
            "capability": torch.cuda.get_device_capability(device),
            "cuda": torch.version.cuda,
            "cudnn": backends.cudnn.version(),
            "float32": [backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision],
            "reduced_bf16": backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        }
    return common | {
        "capability": backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "onednn": backends.mkldnn.enabled,
        "float32": [backends.mkldnn.matmul.fp32_precision, backends.mkldnn.conv.fp32_precision],
    }
