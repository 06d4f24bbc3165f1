"""Where a checkpoint comes from: a folder, the shipped ``mini``, or a Hugging Face hub id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from mmr5_runtime.types import ExportError

MINI = "mini"
DEFAULT_MODEL = "i2vec/MM-R5"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt")  # merges.txt of older tokenizers


@dataclass(frozen=True)
class Location:
    """A checkpoint folder on disk, the name to record for it, and the hub commit if known."""

    folder: Path
    name: str
    revision: str | None = None


def locate(model: str, revision: str | None = None, *, download: bool = True) -> Location:
    """Finds ``model``: an existing folder, ``mini``, or a hub id, which is downloaded.

    Without ``download`` a hub id is only looked up in the hub's cache.

    A folder is recorded by its own name only, so that the manifest does not depend on where it
    lies. Raises :class:`ExportError` naming the alternatives when it cannot be had, and
    :class:`OptionError` for a revision of what has none.
    """
    folder = Path(model).expanduser()
    if revision is not None and (model == MINI or folder.is_dir()):
        from mmr5_export.options import OptionError  # here: it loads torch, --help does without

        raise OptionError(
            f"revision {revision} was given but {model} is no hub id; leave the revision out."
        )
    if model == MINI:
        return _mini()
    if folder.is_dir():
        return Location(folder, folder.resolve().name)
    if folder.exists():
        raise ExportError(f"{model} is a file; pass the checkpoint folder that holds it.")
    if not is_hub_id(model):
        raise ExportError(
            f"there is no checkpoint folder {model}; pass an existing folder, {MINI}, or a hub id "
            f"such as {DEFAULT_MODEL}."
        )
    return _fetch(model, revision, download)


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form of a hub id, owner/model."""
    return _HUB_ID.fullmatch(name) is not None


def _mini() -> Location:
    folder = Path(str(resources.files("mmr5_runtime") / "assets" / MINI))
    if not folder.is_dir():
        raise ExportError(
            f"this installation holds no {MINI} checkpoint; install mmr5-runtime again or pass a "
            "checkpoint folder."
        )
    return Location(folder, MINI)


def _fetch(model: str, revision: str | None, download: bool) -> Location:
    choices = f"pass a local checkpoint folder, or {MINI}, which ships with the package"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ExportError(
            f"there is no folder {model}, and a hub id needs huggingface_hub; run pip install "
            f"'mmr5-runtime[export]' or {choices}."
        ) from error
    try:
        path = snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(_HUB_FILES),
            local_files_only=not download,
        )
    except Exception as error:
        # The hub client lets through errors of its own, of its HTTP library and of the system;
        # all of them mean that the checkpoint cannot be had.
        if not download:
            raise ExportError(
                f"{model} is no local folder and not in the hub's cache, and --dry-run downloads "
                f"nothing; run hf download {model}, leave out --dry-run, or {choices}."
            ) from error
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise ExportError(
            f"{model} is no local folder and cannot be fetched from the hub ({reason}); connect "
            f"to the network, or {choices}."
        ) from error
    folder = Path(path)
    return Location(folder, model, folder.name)  # the cache names a snapshot by its commit
