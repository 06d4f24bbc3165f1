"""The journal of an unfinished export: what survives a kill, what refuses to go on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mmr5_export.journal import Journal, open_journal, resumable, work_folder
from mmr5_runtime.artifact import is_partial
from mmr5_runtime.types import CheckpointError, ExportError

JOB = {"model": "a", "damp": 0.01, "files": {"x": "1"}}


class Cut(Exception):
    """Stands for whatever stops an export."""


def cut_off(folder: Path, steps: int, job: dict[str, Any] = JOB) -> None:
    """An export that finishes ``steps`` steps and is then stopped."""
    with pytest.raises(Cut), open_journal(folder, job, resume=False, discard=False) as journal:
        for number in range(steps):
            journal.finish(f"step-{number}", {"n": number}, {"t": torch.full((3,), number)})
        raise Cut


def test_a_resumed_journal_gives_back_results_and_tensors(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    cut_off(folder, 2)
    with open_journal(folder, JOB, resume=True, discard=False) as journal:
        assert journal.done("step-0") and journal.done("step-1") and not journal.done("step-2")
        assert journal.result("step-1") == {"n": 1}
        assert journal.tensors("step-1")["t"].tolist() == [1, 1, 1]
    assert not folder.exists()


def test_results_read_alike_before_and_after_a_resume(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    with (
        pytest.raises(Cut),
        open_journal(folder, JOB, resume=False, discard=False) as journal,
    ):
        journal.finish("a", {"shape": (1, 2)})
        first = journal.result("a")
        raise Cut
    with open_journal(folder, JOB, resume=True, discard=False) as journal:
        assert journal.result("a") == first == {"shape": [1, 2]}


@pytest.mark.parametrize("torn", [b'{"step": "st', b'{"step": "step-2", "result": 1}'])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    folder = tmp_path / "work"
    cut_off(folder, 2)
    path = folder / "journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with (
        pytest.raises(Cut),
        open_journal(folder, JOB, resume=True, discard=False) as journal,
    ):
        assert journal.done("step-1") and not journal.done("step-2")
        journal.finish("step-2", None)
        raise Cut
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == ["step-0", "step-1", "step-2"]


def test_reading_a_whole_journal_writes_nothing(tmp_path: Path) -> None:
    """Whoever is killed while reading must find everything again."""
    folder = tmp_path / "work"
    cut_off(folder, 2)
    path = folder / "journal.jsonl"
    os.utime(path, (1, 1))
    journal = Journal(folder)
    journal.read()
    assert journal.done("step-1") and path.stat().st_mtime == 1


def test_reading_never_shortens_the_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "work"
    cut_off(folder, 2)
    path = folder / "journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step')

    def cut(path: Path, length: int) -> None:
        assert length == len(whole)
        raise Cut

    with monkeypatch.context() as patched, pytest.raises(Cut):
        patched.setattr(os, "truncate", cut)
        Journal(folder).read()
    assert path.read_bytes() == whole + b'{"step'


@pytest.mark.parametrize("line", [b"{}", b"[]", b"nonsense", b"\xff\xfe", b'{"step": "a"}', b""])
def test_a_damaged_line_says_how_to_go_on(tmp_path: Path, line: bytes) -> None:
    folder = tmp_path / "work"
    cut_off(folder, 2)
    path = folder / "journal.jsonl"
    first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join((first, line, second, b"")))
    with (
        pytest.raises(ExportError, match=r"line 2 of .*journal\.jsonl is damaged .*--force"),
        open_journal(folder, JOB, resume=True, discard=False),
    ):
        pass
    assert len(path.read_bytes().splitlines()) == 3


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{}"])
def test_a_damaged_job_says_how_to_go_on(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "work"
    cut_off(folder, 1)
    (folder / "job.json").write_bytes(content)
    with (
        pytest.raises(ExportError, match=r"job\.json is damaged .*--force"),
        open_journal(folder, JOB, resume=True, discard=False),
    ):
        pass
    with open_journal(folder, JOB, resume=False, discard=True) as journal:
        assert not journal.done("step-0")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no disk that is full")
def test_a_full_disk_is_told_from_a_broken_one(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    with (
        pytest.raises(OSError, match="No space left"),
        open_journal(folder, JOB, resume=False, discard=False) as journal,
    ):
        journal.finish("first", None)
        (folder / "steps").mkdir()
        (folder / "steps" / "second.safetensors").symlink_to("/dev/full")
        journal.finish("second", None, {"t": torch.zeros(9)})
    with open_journal(folder, JOB, resume=True, discard=False) as journal:
        assert journal.done("first") and not journal.done("second")


def test_a_checkpoint_that_will_not_do_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError),
        open_journal(tmp_path / "work", JOB, resume=False, discard=False) as journal,
    ):
        journal.finish("answers", [])
        raise CheckpointError("a tensor holds NaN; download it again.")
    assert not (tmp_path / "work").exists()


def test_the_job_is_the_first_thing_that_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A work folder half thrown away must not be taken for one to go on with."""
    folder = tmp_path / "work"
    cut_off(folder, 1)
    assert resumable(folder)
    with monkeypatch.context() as patched, pytest.raises(Cut):
        patched.setattr("mmr5_export.journal.shutil.rmtree", raise_cut)
        with open_journal(folder, JOB, resume=False, discard=True):
            pass
    assert not resumable(folder) and (folder / "steps").is_dir()
    with open_journal(folder, {"other": 1}, resume=True, discard=False) as journal:
        assert not journal.done("step-0")


def raise_cut(*_: object, **__: object) -> None:
    raise Cut


def test_nothing_is_left_when_no_step_was_finished(tmp_path: Path) -> None:
    cut_off(tmp_path / "work", 0)
    assert not (tmp_path / "work").exists()


def test_a_changed_job_refuses_and_names_what_changed(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    cut_off(folder, 1)
    changed = {**JOB, "damp": 0.05}
    with (
        pytest.raises(ExportError, match=r"damp was 0\.01 and is now 0\.05.*--force"),
        open_journal(folder, changed, resume=True, discard=False),
    ):
        pass
    with open_journal(folder, JOB, resume=True, discard=False) as journal:  # nothing was lost
        assert journal.done("step-0")


LONG = "x" * 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"seed": 4, "model": LONG}}, "options.seed was 0 and is now 4;"),
        ({"options": {"model": LONG}}, "options.seed was 0 and is now not given;"),
        (
            {"options": {"seed": 0, "model": LONG + "y"}},
            f'options.model was ...{LONG[:30]}" and is now ...{LONG[:30]}y";',
        ),
        ({"files": {"x": "1", "y": "2"}}, 'files.y was not given and is now "2";'),
        ({"answers": [None, "b", "d"]}, 'answers[1] was "a" and is now "b";'),
        ({"answers": []}, "answers had 3 entries and now has 0;"),
        ({"a": 1, "b": 1, "c": 1, "d": 1, "e": 1, "f": 1}, "and is now 1, and 2 more;"),
    ],
)
def test_every_change_is_named_down_to_its_value(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    job = {**JOB, "options": {"seed": 0, "model": LONG}, "answers": [None, "a", "c"]}
    folder = tmp_path / "work"
    cut_off(folder, 1, job)
    with (
        pytest.raises(ExportError) as caught,
        open_journal(folder, {**job, **change}, resume=True, discard=False),
    ):
        pass
    assert message in str(caught.value)


def test_an_unfinished_export_is_not_thrown_away_unasked(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    cut_off(folder, 1)
    with (
        pytest.raises(ExportError, match="--resume or start over"),
        open_journal(folder, JOB, resume=False, discard=False),
    ):
        pass
    with open_journal(folder, {"other": 1}, resume=False, discard=True) as journal:
        assert not journal.done("step-0")


def test_resuming_nothing_starts_from_the_beginning(tmp_path: Path) -> None:
    with open_journal(tmp_path / "work", JOB, resume=True, discard=False) as journal:
        assert not journal.done("step-0")


def test_two_exports_do_not_share_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    with open_journal(folder, JOB, resume=False, discard=False):
        for options in ({"resume": True, "discard": False}, {"resume": False, "discard": True}):
            with (
                pytest.raises(ExportError, match="another export works"),
                open_journal(folder, JOB, **options),
            ):
                pass


def test_altered_tensors_are_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    cut_off(folder, 1)
    path = folder / "steps" / "step-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with (
        pytest.raises(ExportError, match="altered.*--force"),
        open_journal(folder, JOB, resume=True, discard=False) as journal,
    ):
        journal.tensors("step-0")


def test_readers_refuse_the_work_folder(tmp_path: Path) -> None:
    folder = work_folder(tmp_path / "engine")
    assert folder.parent == tmp_path and is_partial(folder)


def test_a_kill_between_folder_and_job_leaves_a_folder_that_starts_over(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    (folder / "hidden" / "old").mkdir(parents=True)
    (folder / "job.unfinished").write_text("{")
    with open_journal(folder, JOB, resume=False, discard=False) as journal:
        assert isinstance(journal, Journal) and not (folder / "hidden").exists()
