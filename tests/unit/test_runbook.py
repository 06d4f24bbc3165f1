"""The runbook: steps in order, each bounded, and nothing that was measured is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mmr5_bench.runbook.book import Book
from mmr5_bench.runbook.call import main
from mmr5_bench.runbook.session import (
    ARCHIVED_BYTES,
    Session,
    run_steps,
    write_archive,
)
from mmr5_bench.runbook.steps import CUDA_MARGIN_SECONDS, EARLY, SCRATCH, Step, plan_steps
from mmr5_bench.runbook.table import entries

ROOT = Path(__file__).parents[2]
MADE_BY = {"commit": "abc"}
WRITE = "import sys; open(sys.argv[1], 'w').write('{}')"


def step(
    folder: Path,
    name: str,
    code: str = WRITE,
    *,
    seconds: float = 30,
    least: float = 0,
    needs: tuple[str, ...] = (),
    disk_bytes: int = 0,
    file: bool = True,
) -> Step:
    """A step of its own group that runs a line of Python and writes one file."""
    target = folder / f"{name}.json"
    return Step(
        name,
        f"group-{name}",
        f"about {name}",
        lambda bound: [sys.executable, "-c", code, str(target), f"{bound:g}"],
        seconds,
        least,
        (target.name,) if file else (),
        needs,
        disk_bytes,
    )


def run(
    folder: Path, steps: Sequence[Step], *, again: bool = False, minutes: float = 1, **given: object
) -> tuple[dict[str, str], list[str]]:
    """Status by step, in the order of the book, and what was said."""
    folder.mkdir(exist_ok=True)
    book, said = Book.open(folder, dry_run=True, provenance=MADE_BY), list[str]()
    session = Session(ROOT, minutes, again=again, grace=0.5, **given)  # type: ignore[arg-type]
    try:
        run_steps(session, steps, book, said.append)
    finally:
        stored = json.loads((folder / "runbook.json").read_text())
    return {record["name"]: record["status"] for record in stored["steps"]}, said


def record(folder: Path, name: str) -> dict[str, object]:
    stored = json.loads((folder / "runbook.json").read_text())
    return next(dict(one) for one in stored["steps"] if one["name"] == name)


def test_a_failing_step_is_recorded_and_the_next_one_goes_on(tmp_path: Path) -> None:
    fails = "print('first'); raise SystemExit('no memory left')"
    steps = [
        step(tmp_path, "a"),
        step(tmp_path, "b", fails),
        step(tmp_path, "c", "pass"),
        step(tmp_path, "d"),
    ]
    found, said = run(tmp_path, steps)
    assert list(found.items()) == [("a", "done"), ("b", "failed"), ("c", "failed"), ("d", "done")]
    failed = record(tmp_path, "b")
    assert failed["tail"] == ["first", "no memory left"] and failed["rc"] == 1
    assert any("no memory left" in line for line in said)
    assert record(tmp_path, "c")["reason"] == "did not write c.json"
    assert record(tmp_path, "d")["files"] == {"d.json": 2}


def test_a_step_may_say_that_its_time_was_over(tmp_path: Path) -> None:
    code = f"{WRITE}; raise SystemExit({EARLY})"
    steps = [
        replace(step(tmp_path, "early", code), early=EARLY),
        replace(step(tmp_path, "crashed", f"{WRITE}; 1 / 0"), early=EARLY),
        step(tmp_path, "wrong", code),
    ]
    found, _ = run(tmp_path, steps)
    assert found == {"early": "done", "crashed": "failed", "wrong": "failed"}
    assert EARLY not in (0, 1, 2, 130) and record(tmp_path, "crashed")["rc"] == 1
    assert record(tmp_path, "early")["reason"] == "ended before its last part"


def test_a_step_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    steps = [
        step(tmp_path, "slow", "import time; print('up', flush=True); time.sleep(60)", seconds=1.5),
        step(tmp_path, "next"),
    ]
    began = time.monotonic()
    found, _ = run(tmp_path, steps)
    assert time.monotonic() - began < 30
    assert found == {"slow": "timed out", "next": "done"}
    ended = record(tmp_path, "slow")
    assert ended["rc"] == -signal.SIGTERM and ended["tail"] == ["up"]
    assert ended["reason"] == "was ended after 2 s"


def test_a_program_that_cannot_be_started_is_a_failed_step(tmp_path: Path) -> None:
    missing = Step("x", "x", "", lambda bound: [str(tmp_path / "no-such-program")], 5, 0)
    found, _ = run(tmp_path, [missing, step(tmp_path, "y")])
    assert found == {"x": "failed", "y": "done"}
    assert "no-such-program" in str(record(tmp_path, "x")["reason"])


def test_the_budget_decides_what_still_starts(tmp_path: Path) -> None:
    tell = "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"
    steps = [
        step(tmp_path, "small", tell, seconds=500, least=1),
        step(tmp_path, "large", seconds=500, least=300),
        step(tmp_path, "last", tell, seconds=10, least=1),
    ]
    found, said = run(tmp_path, steps, minutes=2)
    assert found == {"small": "done", "large": "skipped", "last": "done"}
    assert "takes 300 s or more" in str(record(tmp_path, "large")["reason"])
    assert any("large: takes" in line for line in said)
    # A step is told a little less than its bound, so that it ends by itself.
    assert 90 < float((tmp_path / "small.json").read_text()) < 115
    assert float((tmp_path / "last.json").read_text()) == 5


def test_what_a_step_needs_and_who_was_asked_for(tmp_path: Path) -> None:
    steps = [
        step(tmp_path, "a", needs=("no_such_module.inside", "json")),
        step(tmp_path, "b", disk_bytes=1 << 60),
        step(tmp_path, "c"),
        step(tmp_path, "d"),
        step(tmp_path, "e"),
    ]
    found, _ = run(tmp_path, steps, only=("a", "b", "group-c", "d"), skip=("d",))
    assert [found[name] for name in "abcde"] == ["skipped", "skipped", "done", "skipped", "skipped"]
    assert record(tmp_path, "a")["reason"] == "needs no_such_module.inside, not installed here"
    assert "GB of disk" in str(record(tmp_path, "b")["reason"])
    assert record(tmp_path, "e")["reason"] == "not asked for"
    with pytest.raises(ValueError, match="there is no step 'f'; there are a, group-a, b"):
        run(tmp_path, steps, only=("f",))


def test_a_second_run_goes_on_and_keeps_the_order(tmp_path: Path) -> None:
    count = "import sys; open(sys.argv[1], 'a').write('x')"
    steps = [step(tmp_path, name, count) for name in ("a", "b", "c")]
    assert run(tmp_path, steps, only=("c",))[0]["c"] == "done"
    found, said = run(tmp_path, steps)
    assert list(found.items()) == [("a", "done"), ("b", "done"), ("c", "done")]
    assert "c: done before" in said
    (tmp_path / "b.json").unlink()
    run(tmp_path, steps)
    run(tmp_path, steps, again=True, only=("a",))
    assert [(tmp_path / f"{name}.json").read_text() for name in "abc"] == ["xx", "x", "x"]
    # What was done stays done where a later run does not ask for it.
    assert run(tmp_path, steps, only=("b",))[0] == {"a": "done", "b": "done", "c": "done"}


def test_an_interruption_keeps_what_was_measured(tmp_path: Path) -> None:
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"
    steps = [step(tmp_path, "a"), step(tmp_path, "b", code), step(tmp_path, "c")]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, steps)
    assert record(tmp_path, "a")["status"] == "done"
    assert record(tmp_path, "b")["status"] == "interrupted"
    assert run(tmp_path, [steps[0], step(tmp_path, "b"), steps[2]])[0] == dict.fromkeys(
        "abc", "done"
    )


def test_what_was_never_tried_comes_before_what_failed(tmp_path: Path) -> None:
    fails = "raise SystemExit(1)"
    steps = [step(tmp_path, "a", fails), step(tmp_path, "b"), step(tmp_path, "c")]
    assert run(tmp_path, steps, only=("a",))[0] == {"a": "failed", "b": "skipped", "c": "skipped"}
    # As if the runbook itself had been killed while b ran.
    book = json.loads((tmp_path / "runbook.json").read_text())
    book["steps"][1]["status"] = "running"
    (tmp_path / "runbook.json").write_text(json.dumps(book))
    found, said = run(tmp_path, steps)
    began = [line.partition(":")[0] for line in said if "(up to" in line]
    assert began == ["c", "a", "b"]
    assert list(found.items()) == [("a", "failed"), ("b", "done"), ("c", "done")]
    # Neither is a step that was killed forgotten when there is no time for it.
    book["steps"] = [{"name": "b", "about": "", "status": "running"}]
    (tmp_path / "runbook.json").write_text(json.dumps(book))
    assert run(tmp_path, steps, only=("c",))[0]["b"] == "interrupted"


def test_files_of_an_earlier_run_are_not_shown_as_of_this_one(tmp_path: Path) -> None:
    shipped = ROOT / "tests" / "unit" / "test_runbook.py"  # any file: what counts is when
    (tmp_path / "a.json").write_bytes(shipped.read_bytes())
    (tmp_path / "b.json").write_bytes(shipped.read_bytes())
    found, _ = run(tmp_path, [step(tmp_path, "a", "pass"), step(tmp_path, "b")])
    assert found == {"a": "failed", "b": "done"}
    assert record(tmp_path, "a")["files"] == {} and record(tmp_path, "b")["files"] == {"b.json": 2}
    book = Book.open(tmp_path, dry_run=True, provenance=MADE_BY)
    assert entries(book) == []


def test_a_failure_without_output_says_no_empty_line(tmp_path: Path) -> None:
    _, said = run(tmp_path, [step(tmp_path, "a", "raise SystemExit(3)")])
    assert [line.partition(" after")[0] for line in said[1:]] == ["a: failed"]


def test_scratch_folders_go_when_a_step_begins_and_ends(tmp_path: Path) -> None:
    left = f"import os; os.mkdir('{tmp_path}/{SCRATCH}new'); assert not os.path.exists"
    code = f"{left}('{tmp_path}/{SCRATCH}old'); open('{tmp_path}/{SCRATCH}new/x', 'w'); {WRITE}"
    (tmp_path / f"{SCRATCH}old").mkdir()
    (tmp_path / f"{SCRATCH}old.json").write_text("{}")
    found, _ = run(tmp_path, [replace(step(tmp_path, "a", code), scratch=SCRATCH)])
    assert found == {"a": "done"}
    assert [path.name for path in tmp_path.glob(f"{SCRATCH}*")] == [f"{SCRATCH}old.json"]


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    run(tmp_path, [step(tmp_path, "a")])
    with pytest.raises(ValueError, match="has the results of a dry run; give another --out"):
        Book.open(tmp_path, dry_run=False, provenance=MADE_BY)
    with pytest.raises(ValueError, match="of commit abc, this is def.*--again without --only"):
        Book.open(tmp_path, dry_run=True, provenance={"commit": "def"})
    (tmp_path / "runbook.json").write_text("{")
    with pytest.raises(ValueError, match="is no runbook"):
        Book.open(tmp_path, dry_run=True, provenance=MADE_BY)


def test_the_archive_holds_the_folder_but_not_itself(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    steps = [step(folder, "a"), step(folder, "b", "raise SystemExit(1)")]
    run(folder, steps, archive=folder / "all.tar.gz")
    (folder / f"{SCRATCH}x" / "checkpoint").mkdir(parents=True)
    (folder / f"{SCRATCH}x" / "checkpoint" / "config.json").write_text("{}")
    with (folder / "weights.bin").open("wb") as sparse:
        sparse.truncate(ARCHIVED_BYTES + 1)
    assert write_archive(folder, folder / "all.tar.gz") == ["weights.bin"]
    with tarfile.open(folder / "all.tar.gz") as packed:
        names = sorted(packed.getnames())
    assert names == ["a.json", "logs/a.log", "logs/b.log", "runbook.json"]


@pytest.mark.parametrize("dry_run", [True, False])
def test_the_plan_has_the_important_first(tmp_path: Path, dry_run: bool) -> None:
    steps = plan_steps(ROOT, tmp_path, dry_run=dry_run)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert (
        names
        == (
            "environment gpu-tests prove targets kernels reranks-int4 reranks-bf16 peers reuse "
            "reranks-int8 lengths-int4 lengths-bf16 lists20-int4 lists20-bf16 dense-int4 "
            "dense-bf16 vidore-int4 vidore-bf16 export"
        ).split()
    )
    by_name = {one.name: one for one in steps}
    assert by_name["reuse"].early == EARLY and by_name["export"].scratch == SCRATCH
    if not dry_run:
        assert by_name["gpu-tests"].seconds == 150 and by_name["reranks-int4"].seconds == 150
        assert all(one.margin == CUDA_MARGIN_SECONDS == 25 for one in steps)
        usual, long = (by_name[name].command(9) for name in ("reranks-int4", "lists20-int4"))
        assert usual[usual.index("--pages") :][1:4] == ["10", "5", "--generated"]
        assert long[long.index("--pages") :][1:3] == ["20", "--generated"]
    for one in steps:
        command = one.command(33)
        by_default = one.name in ("gpu-tests", "reuse", "prove", "targets")
        assert ("cuda" in command) != dry_run or by_default
        assert ("7b" in command) != dry_run or by_default
        assert ("--dry-run" in command) == dry_run or one.name not in ("reuse", "prove", "targets")
        assert one.least < one.seconds
        assert command[-1] == "33" or one.name == "gpu-tests"


def test_from_the_shell_without_anything_installed(tmp_path: Path) -> None:
    out = tmp_path / "results"

    def shell(*given: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(ROOT / "benchmarks" / "gpu" / "run.sh"), "--out", str(out), *given],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        )

    done = shell("--dry-run", "--only", "environment", "lengths-int4", "--archive", f"{out}.tgz")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    status = {one["name"]: one["status"] for one in document["steps"]}
    assert {name for name, found in status.items() if found == "done"} == {
        "environment",
        "lengths-int4",
    }
    assert [row["subject"] for row in document["measured"]] == ["ours int4", "ours int4"]
    assert "lengths-int4     done" in done.stderr
    assert "rerank[pages=2,workload=small" in done.stderr
    measured = json.loads((out / "lengths-int4.json").read_text())
    machine = json.loads((out / "environment.json").read_text())
    assert measured["ceilings"] == machine["ceilings"]
    assert machine["provenance"]["packages"]["torch"]
    assert Path(f"{out}.tgz").is_file()


def test_usage_and_a_missing_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    command = ["mmr5_bench.runbook.command", "--out", str(tmp_path)]
    assert main([*command, "--list"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == "environment"
    assert main([*command, "--dry-run", "--only", "sleep"]) == 1
    assert "there is no step 'sleep'" in capsys.readouterr().err
    assert main([]) == 2
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert main(command) == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "runbook.json").exists()
