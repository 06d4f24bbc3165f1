"""What a job will take: answers that are known already, lengths, and the disks it writes to."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.exporting import write_samples
from mmr5_export.estimate import ResourceError
from mmr5_export.job import Job, prepare
from mmr5_export.options import ExportOptions
from mmr5_export.responses import respond
from mmr5_export.samples import DataError
from mmr5_export.workload import check, plan_lines, require

SHARED_MEMORY = Path("/dev/shm")


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    return None


def job(checkpoint: Path, folder: Path, **options: Any) -> Job:
    """A job of int4 by GPTQ on 3 + 2 samples of ``folder / data``."""
    given: dict[str, Any] = {"calib_samples": 3, "held_out": 2, "max_new_tokens": 5}
    given |= {"calib_data": folder / "data", "response_cache": folder / "answers.jsonl"}
    chosen = ExportOptions(**{**given, "device": "cpu", **options})
    return prepare(checkpoint, "int4", folder / "engine", chosen, silent)


def test_answers_that_are_known_are_not_counted_again(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    write_samples(tmp_path / "data", 5)
    made = job(tiny_checkpoint, tmp_path)
    before = require(made)
    assert (before.missing, before.answering, before.workload.to_answer) == (5, "bf16", 25)
    respond(made.samples[:2], made.generator("bf16"), made.response_cache)
    some = require(made)
    assert (some.missing, some.answering, some.workload.to_answer) == (3, "bf16", 15)
    respond(made.samples, made.generator("bf16"), made.response_cache)
    known = require(made)
    assert (known.missing, known.answering, known.workload.to_answer) == (0, "bf16", 0)
    assert "answering" in before.needs.memory and "answering" not in known.needs.memory
    assert "answers: 0 given, 5 known, 0 to write" in plan_lines(made, known)


def test_where_bf16_does_not_fit_an_int8_copy_answers(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    write_samples(tmp_path / "data", 5)
    made = job(tiny_checkpoint, tmp_path)
    enough = require(made).needs.memory["answering"]
    tight = job(tiny_checkpoint, tmp_path, free_memory=enough - 1)
    found = require(tight)
    assert found.answering == "int8-weight-only" and found.missing == 5
    assert found.needs.memory["answering"] < enough
    assert require(job(tiny_checkpoint, tmp_path, free_memory=enough)).answering == "bf16"


def test_given_answers_count_with_their_own_length(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_samples(tmp_path / "data", 5, responses=True)
    made = job(tiny_checkpoint, tmp_path, verify=False, max_new_tokens=3000)
    found = require(made)
    assert found.answering is None and found.missing == 0
    assert 10 < found.workload.answer < 100
    # Those that are not written yet can become as long as is allowed.
    write_samples(tmp_path / "data", 5)
    open_ones = require(job(tiny_checkpoint, tmp_path, verify=False, max_new_tokens=3000))
    assert open_ones.workload.answer == 3000
    assert open_ones.workload.longest > found.workload.longest + 2000


def test_an_answer_that_the_context_cannot_hold_is_found_before_anything_runs(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "data", 5, responses=True) / "samples.jsonl"
    data.write_text(data.read_text().replace("Page by page.", "Page by page. " * 2000))
    with pytest.raises(DataError, match="the context holds 4096; shorten the response"):
        require(job(tiny_checkpoint, tmp_path, verify=False))


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    if not SHARED_MEMORY.is_dir() or SHARED_MEMORY.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system to write to")
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as folder:
        yield Path(folder)


def test_a_checkpoint_on_another_disk_is_checked_there(
    tiny_checkpoint: Path, tmp_path: Path, other_disk: Path
) -> None:
    write_samples(tmp_path / "data", 5)
    huge = 1 << 60
    beside = {"checkpoint_out": other_disk / "hf"}
    made = job(tiny_checkpoint, tmp_path, **beside)
    required = require(made)
    check(made, required)
    assert required.checkpoint_bytes > 0
    here = required.disk_bytes - required.checkpoint_bytes
    check(job(tiny_checkpoint, tmp_path, **beside, free_bytes=here), required)
    more = replace(required, checkpoint_bytes=huge, disk_bytes=required.disk_bytes + huge)
    with pytest.raises(ResourceError, match=rf"{other_disk}/hf .* another --checkpoint-out"):
        check(made, more)
    with pytest.raises(ResourceError, match=rf"{tmp_path}/engine .* another --output"):
        check(made, replace(required, disk_bytes=huge))


def test_a_checkpoint_on_the_same_disk_adds_to_the_engine(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    write_samples(tmp_path / "data", 5)
    made = job(tiny_checkpoint, tmp_path, checkpoint_out=tmp_path / "hf")
    both, alone = require(made), require(job(tiny_checkpoint, tmp_path))
    assert both.disk_bytes == alone.disk_bytes + both.checkpoint_bytes
    tight = job(
        tiny_checkpoint, tmp_path, checkpoint_out=tmp_path / "hf", free_bytes=alone.disk_bytes
    )
    with pytest.raises(ResourceError, match="another --output"):
        check(tight, both)


def test_libraries_that_can_change_a_result_identify_the_job(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    write_samples(tmp_path / "data", 5)
    versions = job(tiny_checkpoint, tmp_path).identity()["versions"]
    common = {"torch", "safetensors", "python", "mmr5-runtime", "numpy", "pillow", "tokenizers"}
    assert versions.keys() == common | {"llmcompressor", "compressed-tensors", "transformers"}
    rounded = job(tiny_checkpoint, tmp_path, method="rtn")
    assert rounded.identity()["versions"].keys() == common
