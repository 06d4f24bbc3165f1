"""Answers of a run: who writes them is decided once, whatever memory is free on a resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.exporting import write_samples
from mmr5_export.estimate import ResourceError
from mmr5_export.job import Job
from mmr5_export.journal import open_journal
from mmr5_export.options import ExportOptions
from mmr5_export.pipeline import plan_export
from mmr5_export.responses import respond
from mmr5_export.run import Run

COUNT = 5
FORMATS = ("bf16", "int8-weight-only")


class Stopped(Exception):
    """The export ends here."""


@pytest.fixture
def job(tiny_checkpoint: Path, tmp_path: Path) -> Job:
    options = ExportOptions(
        calib_data=write_samples(tmp_path / "data", COUNT),
        calib_samples=3,
        held_out=2,
        max_new_tokens=6,
        response_cache=tmp_path / "answers.jsonl",
        device="cpu",
    )
    return plan_export(tiny_checkpoint, "int4", tmp_path / "engine", options)[0]


def answer(job: Job, folder: Path, answering: str | None, stop_at: int = COUNT + 1) -> Run:
    """A run that has its answers, or was interrupted at the given one."""

    def progress(stage: str, done: int, total: int, note: str = "") -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    with (
        pytest.raises(Stopped),  # a block that succeeds would take its folder along
        open_journal(folder, {}, resume=True, discard=False) as journal,
    ):
        run = Run(job, journal, answering, progress)
        assert len(run.responses) == COUNT
        raise Stopped
    return run


def expected(job: Job, quant: str) -> list[tuple[int, ...]]:
    return [response.token_ids for response in respond(job.samples, job.generator(quant))]


def test_a_resumed_export_goes_on_with_the_format_it_began_with(job: Job, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        answer(job, tmp_path / "work", "int8-weight-only", stop_at=2)
    run = answer(job, tmp_path / "work", "bf16")
    assert [response.token_ids for response in run.responses] == expected(job, "int8-weight-only")
    assert run.answered_by == "int8-weight-only"


@pytest.mark.parametrize("begun", FORMATS)
def test_finished_answers_are_reported_as_they_were_made(
    begun: str, job: Job, tmp_path: Path
) -> None:
    first = answer(job, tmp_path / "work", begun)
    for later in (*FORMATS, None):
        run = answer(job, tmp_path / "work", later)
        assert run.responses == first.responses
        facts = run.calibration_facts()
        assert facts is not None and facts["answers_by"] == begun
        assert [held_out.reference_by for held_out in run.held_out()] == [begun] * 2


def test_memory_that_went_away_is_said(job: Job, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        answer(job, tmp_path / "work", "bf16", stop_at=2)
    with pytest.raises(
        ResourceError, match="begun with the model in bf16.* --resume, or .*--force"
    ):
        answer(job, tmp_path / "work", "int8-weight-only")


def test_cached_answers_have_a_writer_too(job: Job, tmp_path: Path) -> None:
    answer(job, tmp_path / "one", "bf16")
    assert answer(job, tmp_path / "two", None).answered_by == "bf16"
