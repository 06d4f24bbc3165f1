"""An export stopped after its last step: however it ended, it ends like that when it is resumed."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from helpers.exporting import quick_export, tree_hashes
from mmr5_export.agreement import VerificationFailed
from mmr5_export.estimate import ResourceError
from mmr5_runtime.artifact import read_manifest
from mmr5_runtime.types import ExportError

REASON = "the engine is worse than asked; ask for less."


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def rejecting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for a verification that finds the engine wanting."""
    monkeypatch.setattr("mmr5_export.publish.verdict", lambda *_: REASON)


def stopped_at(place: str, monkeypatch: pytest.MonkeyPatch, *arguments: Any, **more: Any) -> None:
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(place, interrupt)
        quick_export(*arguments, **more)


PLACES = ("mmr5_export.pipeline.publish", "mmr5_export.journal._clear")


@pytest.mark.parametrize("place", PLACES)
def test_a_rejected_export_is_rejected_again(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rejecting: None,
    place: str,
) -> None:
    output = tmp_path / "engine"
    stopped_at(PLACES[0], monkeypatch, tiny_checkpoint, "int8", output)
    if place != PLACES[0]:
        stopped_at(place, monkeypatch, tiny_checkpoint, "int8", output, resume=True)
    assert (tmp_path / "engine.partial-work").is_dir()
    with pytest.raises(VerificationFailed, match=REASON):
        quick_export(tiny_checkpoint, "int8", output, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["engine.rejected"]
    read_manifest(tmp_path / "engine.rejected")


@pytest.mark.parametrize("place", PLACES)
def test_a_published_export_is_published_once(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    output, beside = tmp_path / "engine", tmp_path / "hf"
    stopped_at(PLACES[0], monkeypatch, tiny_checkpoint, "int8", output, checkpoint_out=beside)
    assert not output.exists() and not beside.exists()
    if place != PLACES[0]:
        again: dict[str, Any] = {"checkpoint_out": beside, "resume": True}
        stopped_at(place, monkeypatch, tiny_checkpoint, "int8", output, **again)
        assert output.is_dir() and beside.is_dir()
    with monkeypatch.context() as patched:  # nothing is made twice
        patched.setattr("mmr5_export.pipeline.make_engine", interrupt)
        manifest = quick_export(tiny_checkpoint, "int8", output, checkpoint_out=beside, resume=True)
    assert manifest == read_manifest(output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "hf"]
    quick_export(tiny_checkpoint, "int8", tmp_path / "plain")
    assert tree_hashes(output) == tree_hashes(tmp_path / "plain")


def test_an_engine_taken_away_in_between_is_made_again(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "engine"
    stopped_at(PLACES[0], monkeypatch, tiny_checkpoint, "int8", output)
    stopped_at(PLACES[1], monkeypatch, tiny_checkpoint, "int8", output, resume=True)
    output.rename(tmp_path / "elsewhere")
    quick_export(tiny_checkpoint, "int8", output, resume=True)
    assert tree_hashes(output) == tree_hashes(tmp_path / "elsewhere")


def test_a_checkpoint_asked_for_too_late_is_made_all_the_same(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "engine"
    stopped_at(PLACES[0], monkeypatch, tiny_checkpoint, "int8", output)
    quick_export(tiny_checkpoint, "int8", output, resume=True, checkpoint_out=tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "hf"]


def test_a_checkpoint_that_got_lost_is_not_passed_over(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"checkpoint_out": tmp_path / "hf"}
    stopped_at(PLACES[0], monkeypatch, tiny_checkpoint, "int8", tmp_path / "engine", **options)
    (lost,) = tmp_path.glob("hf.partial-*")
    lost.rename(tmp_path / "elsewhere")
    with pytest.raises(ExportError, match="is gone from .*--force"):
        quick_export(tiny_checkpoint, "int8", tmp_path / "engine", resume=True, **options)


def test_an_old_engine_moved_away_by_a_killed_process_is_replaced(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "engine"
    quick_export(tiny_checkpoint, "bf16", output)
    stopped_at(PLACES[0], monkeypatch, tiny_checkpoint, "int8", output, force=True)
    output.rename(tmp_path / "engine.partial-work" / "engine-old")  # and killed here
    manifest = quick_export(tiny_checkpoint, "int8", output, force=True, resume=True)
    assert manifest.quant.name == "int8"
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_a_full_disk_is_a_lack_of_resources(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def full(stage: str, done: int, total: int, note: str = "") -> None:
        if stage == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ResourceError, match="No space left on device.*nothing was kept"):
        quick_export(tiny_checkpoint, "int8", tmp_path / "engine", progress=full)
    assert not list(tmp_path.iterdir())
