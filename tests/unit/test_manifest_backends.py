"""Engines with files for other backends: their manifest, and what stays as it was without them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmr5_runtime.artifact import (
    MANIFEST_NAME,
    Backend,
    FileEntry,
    Manifest,
    file_sha256,
    read_manifest,
    verify_hashes,
    write_manifest,
)
from mmr5_runtime.manifest import is_inside
from mmr5_runtime.reuse.identity import engine_identity
from mmr5_runtime.types import EngineError

EngineFactory = Callable[[str], Path]
CPU = torch.device("cpu")
ADDED = "tensorrt-llm/engine/ckpt/config.json"


@pytest.fixture
def engine(tiny_engine: EngineFactory, tmp_path: Path) -> Path:
    """A copy of the int4 engine that a test may damage."""
    return Path(shutil.copytree(tiny_engine("int4"), tmp_path / "engine"))


def with_backend(engine: Path) -> Manifest:
    """The engine with one file for another backend, in a folder below it."""
    path = engine / ADDED
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    manifest = read_manifest(engine)
    added = replace(
        manifest,
        files={**manifest.files, ADDED: FileEntry(file_sha256(path), 2)},
        backends={"tensorrt-llm": Backend((ADDED,), "not executed", {"targets": {"engine": {}}})},
    )
    write_manifest(engine, added)
    return added


def change(engine: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = engine / MANIFEST_NAME
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def test_backends_read_back_as_they_were_written(engine: Path) -> None:
    added = with_backend(engine)
    assert read_manifest(engine) == added
    verify_hashes(engine, added)
    data = json.loads((engine / MANIFEST_NAME).read_text())
    assert data["schema_version"] == 3
    assert data["backends"]["tensorrt-llm"] == {
        "files": [ADDED],
        "verified": "not executed",
        "targets": {"engine": {}},
    }


def test_an_engine_of_the_version_before_reads_as_one_without_backends(engine: Path) -> None:
    now = read_manifest(engine)

    def older(data: dict[str, Any]) -> None:
        data["schema_version"] = 2
        del data["backends"]

    change(engine, older)
    assert read_manifest(engine) == now and now.backends == {}


def test_an_engine_of_this_version_has_to_say_its_backends(engine: Path) -> None:
    change(engine, lambda data: data.pop("backends"))
    with pytest.raises(EngineError, match="it lacks 'backends'"):
        read_manifest(engine)


def test_a_backend_does_not_change_what_the_native_engine_is(engine: Path) -> None:
    before = read_manifest(engine)
    added = with_backend(engine)
    told = replace(added, files={**added.files, "README.md": FileEntry("0" * 64, 1)})
    own = engine_identity(before, torch.float32, CPU)
    assert engine_identity(added, torch.float32, CPU) == own
    assert engine_identity(told, torch.float32, CPU) == own
    assert ADDED not in added.native_files
    assert {"config.json", "tokenizer.json"} <= set(added.native_files)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_of_the_native_engine_still_changes_it(engine: Path, name: str) -> None:
    manifest = read_manifest(engine)
    files = {**manifest.files, name: FileEntry("0" * 64, 1)}
    changed = replace(manifest, files=files)
    own = engine_identity(manifest, torch.float32, CPU)
    assert engine_identity(changed, torch.float32, CPU) != own


def test_a_file_of_a_backend_that_is_gone_is_noticed(engine: Path) -> None:
    with_backend(engine)
    (engine / ADDED).unlink()
    with pytest.raises(EngineError, match="config.json is missing"):
        read_manifest(engine)


def test_a_file_of_a_backend_that_was_altered_is_noticed(engine: Path) -> None:
    added = with_backend(engine)
    (engine / ADDED).write_text("[]")
    with pytest.raises(EngineError, match="was altered since the export"):
        verify_hashes(engine, added)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda data: data["files"].pop(ADDED), "lacks its file"),
        (lambda data: data["backends"]["tensorrt-llm"].pop("verified"), "it lacks 'verified'"),
        (lambda data: data["backends"]["tensorrt-llm"].update(files="all"), "no list of files"),
        (lambda data: data["backends"]["tensorrt-llm"].update(files=[1]), "is not text"),
        (lambda data: data["backends"]["tensorrt-llm"].update(verified=True), "what was verified"),
        (lambda data: data.update(backends=[]), "cannot be read"),
    ],
)
def test_a_backend_that_is_not_described(
    engine: Path, edit: Callable[[dict[str, Any]], object], words: str
) -> None:
    with_backend(engine)
    change(engine, edit)
    with pytest.raises(EngineError, match=words):
        read_manifest(engine)


def test_a_backend_cannot_own_what_the_native_engine_reads(engine: Path) -> None:
    with_backend(engine)
    weights = "model-00001-of-00001.safetensors"
    change(engine, lambda data: data["backends"]["tensorrt-llm"].update(files=[weights]))
    with pytest.raises(EngineError, match="holds tensors of the engine"):
        read_manifest(engine)


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "config.json", "preprocessor_config.json", "generation_config.json"],
)
def test_a_backend_cannot_claim_what_would_then_not_count_for_the_engine(
    engine: Path, name: str
) -> None:
    with_backend(engine)
    change(engine, lambda data: data["backends"]["tensorrt-llm"]["files"].append(name))
    with pytest.raises(EngineError, match=f"'{name}' of the backend .* is the engine's own"):
        read_manifest(engine)


part = st.text(st.characters(exclude_characters="/\\:\0", codec="utf-8"), min_size=1, max_size=6)
plain = st.lists(part.filter(lambda text: text not in (".", "..")), min_size=1, max_size=4)


@given(plain)
def test_a_plain_path_is_inside(parts: list[str]) -> None:
    name = "/".join(parts)
    assert is_inside(name)
    assert Path("/engine", name).resolve().is_relative_to("/engine")


@given(plain, st.integers(0, 4), st.sampled_from(["..", ".", "", "a\\b", "\\", "C:", "a\0b"]))
def test_a_path_with_a_part_that_leads_elsewhere_is_not(
    parts: list[str], place: int, wrong: str
) -> None:
    assert not is_inside("/".join([*parts[:place], wrong, *parts[place:]]))


@given(st.text(max_size=12))
def test_whatever_is_inside_stays_in_its_folder(name: str) -> None:
    if is_inside(name):
        assert Path("/engine", name).resolve().is_relative_to("/engine")
        assert not Path(name).is_absolute()


@pytest.mark.parametrize("name", ["../config.json", "/etc/hostname", "a/../../b", "a\\b", ""])
def test_a_manifest_that_points_elsewhere_is_refused(engine: Path, name: str) -> None:
    change(engine, lambda data: data["files"].update({name: {"sha256": "0" * 64, "size": 1}}))
    with pytest.raises(EngineError, match="outside its folder"):
        read_manifest(engine)
