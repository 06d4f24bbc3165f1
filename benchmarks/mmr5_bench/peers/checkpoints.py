"""What was made of which checkpoint: engines held against their name and source, and mini told.

An engine folder's manifest says what it was exported as and the SHA-256 of every file of its
source; both are compared before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmr5_bench.peers.names import ENGINES, MINI
from mmr5_export.checkpoint import read_spec
from mmr5_export.source import locate
from mmr5_runtime.artifact import Manifest, file_sha256, read_manifest


def check_name(quant: str, folder: Path) -> Manifest:
    """The manifest of ``folder``; ValueError unless it was exported as ``quant``.

    EngineError, which names the folder, for one that holds no whole engine.
    """
    manifest = read_manifest(folder)
    found = manifest.quant_name
    if found != quant:
        remedy = f"write {found}={folder}" if found in ENGINES else f"use {', '.join(ENGINES)}"
        raise ValueError(f"--engine {quant}={folder}: the engine there is {found}; {remedy}")
    return manifest


def check_engines(engines: Mapping[str, Path], checkpoint: Path) -> None:
    """ValueError for an engine of another name, or made from other files than ``checkpoint`` has.

    Reads every file of the checkpoint once, the weights too: nothing else tells a model from
    another training of it. Files that only one side has decide nothing.
    """
    hashes: dict[str, str] = {}
    for quant, folder in engines.items():
        source = check_name(quant, folder).source
        for name, sha256 in source.files.items():
            path = checkpoint / name
            if path.is_file() and name not in hashes:
                hashes[name] = file_sha256(path)
            if hashes.get(name, sha256) != sha256:
                raise ValueError(
                    f"--engine {quant}={folder} was made from {source.name} with another {name} "
                    f"than {checkpoint} has; export the checkpoint, or pass the engine's own with "
                    "--checkpoint"
                )


def rounding_of(folder: Path) -> dict[str, Any]:
    """``method`` and, for weights in groups, ``group`` of an engine folder; EngineError for none.

    Two engines of one ``quant`` differ in these.
    """
    manifest = read_manifest(folder)
    groups = sorted({f.group_size for f in manifest.formats.values() if f.group_size is not None})
    grouped = {"group": ",".join(map(str, groups))} if groups else {}
    return {"method": manifest.quant.method, **grouped}


def is_mini(checkpoint: Path) -> bool:
    """Whether a checkpoint folder is mini, or a copy or retraining of it: by its architecture."""
    mini = locate(MINI).folder
    return checkpoint.resolve() == mini.resolve() or read_spec(checkpoint)[1] == read_spec(mini)[1]
