"""Exports for tests: quick ones without calibration, and small calibration data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmr5_export import export
from mmr5_export.assemble import Progress
from mmr5_export.checkpoint import open_checkpoint
from mmr5_export.generator import weights_sha256
from mmr5_export.options import ExportOptions
from mmr5_runtime.artifact import Manifest, file_sha256


def quick_export(
    model: str | Path,
    quant: str,
    output: Path,
    *,
    progress: Progress = lambda stage, done, total, note="": None,
    **options: Any,
) -> Manifest:
    """Rounds to nearest and does not verify: what most tests need of an engine."""
    plain = {"method": None if quant == "bf16" else "rtn", "verify": False}
    return export(model, quant, output, ExportOptions(**{**plain, **options}), progress=progress)


def write_samples(
    folder: Path,
    count: int,
    seed: int = 0,
    responses: bool = False,
    own_of: Path | None = None,
) -> Path:
    """A folder of calibration data: ``count`` lists of 2 to 4 small noisy pages.

    ``responses`` rank at random. Held-out ones are taken for the original's answers only where
    ``own_of`` says so: ``meta.json`` then names the weights of that checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        pages = []
        for page in range(int(rng.integers(2, 5))):
            pixels = rng.integers(0, 256, (56 + 28 * (page % 2), 56, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}-{page}.png")
            pages.append(f"{number}-{page}.png")
        row: dict[str, Any] = {"query": f"Which page is number {number}?", "pages": pages}
        row["relevant"] = [int(rng.integers(len(pages)))]
        if responses or own_of:
            ids = ", ".join(str(1 + int(i)) for i in rng.permutation(len(pages)))
            row["response"] = f"<think>Page by page.</think><answer>[{ids}]</answer>"
        rows.append(row)
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    if own_of:
        weights = {
            name: file_sha256(own_of / name) for name in open_checkpoint(own_of).weight_files
        }
        meta = {"weights_sha256": weights_sha256(weights)}
        (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def tree_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file under a folder, by relative path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
