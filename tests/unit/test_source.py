"""What is fetched of a hub id, and that nothing is where that was not asked for."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from mmr5_export.options import OptionError
from mmr5_export.source import MINI, locate
from mmr5_runtime.types import ExportError


class Hub:
    """Stands for the hub's client: keeps what it was asked for, and gives a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: dict[str, Any] = {}

    def __call__(self, model: str, **options: Any) -> str:
        self.asked = options
        return str(self.folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    made = Hub(tmp_path / "0123abc")
    monkeypatch.setattr("huggingface_hub.snapshot_download", made)
    return made


def test_every_kind_of_file_a_checkpoint_needs_is_fetched(hub: Hub) -> None:
    location = locate("somebody/model", "main")
    assert location.revision == "0123abc" and hub.asked["revision"] == "main"
    assert not hub.asked["local_files_only"]
    needed = ["config.json", "merges.txt", "chat_template.jinja", "model-1.safetensors"]
    others = ["README.md", "pytorch_model.bin", "figure.png"]
    patterns = hub.asked["allow_patterns"]  # globs over names in the repository
    fetched = [n for n in (*needed, *others) if any(fnmatchcase(n, glob) for glob in patterns)]
    assert fetched == needed


def test_without_download_only_the_cache_is_asked(hub: Hub) -> None:
    locate("somebody/model", download=False)
    assert hub.asked["local_files_only"]


def test_what_is_not_in_the_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ExportError, match="not in the hub's cache.*hf download no/thing, leave"):
        locate("no/thing", download=False)


def test_a_revision_is_of_a_hub_id(tmp_path: Path) -> None:
    for model in (str(tmp_path), MINI):
        with pytest.raises(OptionError, match="is no hub id; leave the revision out"):
            locate(model, "main")
