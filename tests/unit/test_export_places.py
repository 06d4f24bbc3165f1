"""Where an export may write: whose folders it replaces, and whose it leaves alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.exporting import quick_export, tree_hashes
from mmr5_export.options import ExportOptions, OptionError
from mmr5_export.places import MARKER_NAME, check_places, unfinished_checkpoint
from mmr5_runtime.types import ExportError


@pytest.fixture
def source(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of its own, which a test may lose."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))


@pytest.mark.parametrize("more", [{}, {"resume": True}, {"force": True}])
@pytest.mark.parametrize("place", ["source", "source/int8", ".", "link", "engine", "engine/hf"])
def test_a_checkpoint_is_never_written_over_the_source_or_the_engine(
    source: Path, tmp_path: Path, place: str, more: dict[str, Any]
) -> None:
    (tmp_path / "link").symlink_to(source)
    before = tree_hashes(tmp_path)
    with pytest.raises(OptionError, match=r"--checkpoint-out .*choose"):
        quick_export(source, "int8", tmp_path / "engine", checkpoint_out=tmp_path / place, **more)
    assert tree_hashes(tmp_path) == before


@pytest.mark.parametrize(
    ("output", "options"),
    [
        ("a", {"calib_data": "a/lists.jsonl"}),
        ("a", {"response_cache": "a/answers.jsonl"}),
        ("a", {"response_cache": "a.partial-work/answers.jsonl"}),
        ("a", {"response_cache": "a.rejected/answers.jsonl"}),
        ("a", {"calib_data": "b/lists", "checkpoint_out": "b"}),
        ("a", {"checkpoint_out": "a.partial-work"}),
        ("a", {"checkpoint_out": "a.rejected"}),
        ("models", {}),
        ("models/source.partial-7", {}),
    ],
)
def test_what_is_written_does_not_hold_what_is_read(
    tmp_path: Path, output: str, options: dict[str, str]
) -> None:
    (tmp_path / "models" / "source").mkdir(parents=True)
    given: dict[str, Any] = {name: tmp_path / path for name, path in options.items()}
    with pytest.raises(OptionError, match=r"; choose (another|a folder)"):
        check_places(tmp_path / "models" / "source", tmp_path / output, ExportOptions(**given))


@pytest.mark.parametrize("option", ["force", "resume"])
@pytest.mark.parametrize("name", ["config.json", "notes.txt"])
def test_a_foreign_checkpoint_is_not_replaced(
    source: Path, tmp_path: Path, name: str, option: str
) -> None:
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / name).write_text("{}")
    options: dict[str, Any] = {"checkpoint_out": foreign, option: True}
    with pytest.raises(ExportError, match="is no checkpoint that mmr5-export wrote"):
        quick_export(source, "int8", tmp_path / "engine", **options)
    assert [path.name for path in foreign.iterdir()] == [name]
    assert not (tmp_path / "engine").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to this user")
def test_a_place_that_is_forbidden_is_refused_at_once(source: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ExportError, match="cannot be made in"):
        check_places(source, tmp_path / "e", ExportOptions(checkpoint_out=tmp_path / "locked/hf"))


def test_a_place_below_a_file_is_refused_at_once(source: Path, tmp_path: Path) -> None:
    options = ExportOptions(checkpoint_out=source / "config.json" / "hf")
    with pytest.raises(ExportError, match=r"cannot be made in .*config\.json"):
        check_places("mini", tmp_path / "engine", options)


def test_a_rejected_folder_of_somebody_else_is_found_at_once(source: Path, tmp_path: Path) -> None:
    (tmp_path / "engine.rejected").mkdir()
    (tmp_path / "engine.rejected" / "letter.txt").write_text("")
    with pytest.raises(ExportError, match=r"engine\.rejected is not an engine folder"):
        check_places(source, tmp_path / "engine", ExportOptions(min_top1_agreement=0.5))


def test_our_own_checkpoint_is_replaced_when_asked(source: Path, tmp_path: Path) -> None:
    places: dict[str, Any] = {"checkpoint_out": tmp_path / "hf"}
    quick_export(source, "int8", tmp_path / "engine", **places)
    first = tree_hashes(tmp_path / "hf")
    assert MARKER_NAME in first
    with pytest.raises(ExportError, match="hf exists already; .*--force"):
        quick_export(source, "int8", tmp_path / "other", **places)
    quick_export(source, "int4", tmp_path / "engine", **places, force=True)
    assert tree_hashes(tmp_path / "hf") != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "hf", "source"]
    # That of another export is not replaced because this one is resumed.
    with pytest.raises(ExportError, match="hf exists already; .*--force"):
        quick_export(source, "int8", tmp_path / "other", **places, resume=True)


def test_the_old_checkpoint_stays_until_the_new_one_is_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"checkpoint_out": tmp_path / "hf", "force": True}
    quick_export(source, "int8", tmp_path / "engine", **options)
    before = tree_hashes(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("mmr5_export.hf_checkpoint.TensorWriter.finish", interrupt)
        quick_export(source, "int4", tmp_path / "engine", **options)
    assert before.items() <= tree_hashes(tmp_path).items()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_a_killed_process_left_of_a_checkpoint_goes(source: Path, tmp_path: Path) -> None:
    left = unfinished_checkpoint(tmp_path / "hf", tmp_path / "engine")
    for folder in (left, left.with_name(f"{left.name}.partial-4711")):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    quick_export(source, "int8", tmp_path / "engine", checkpoint_out=tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "hf", "source"]
    assert "quantization_config" in json.loads((tmp_path / "hf" / "config.json").read_text())
