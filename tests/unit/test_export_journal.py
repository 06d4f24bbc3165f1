"""The journal of an unfinished export: what survives a kill, what refuses to go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmr5_export.journal import Journal, open_journal, work_folder
from mmr5_runtime.artifact import is_partial
from mmr5_runtime.types import ExportError

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
