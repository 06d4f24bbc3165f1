"""The pytest plugin: what it times, what it refuses, and what it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.plugin_runs import CLOCK, measured, plugin_options, run_pytest
from mmr5_bench.evidence.document import load_evidence

pytest_plugins = ["pytester"]
USAGE_ERROR = int(pytest.ExitCode.USAGE_ERROR)
JSON = "--benchmark-json=out.json"

PLAIN = """
import functools
import support

def test_plain(mmr5_benchmark):
    results = mmr5_benchmark.run(
        functools.partial(support.answer, seconds=1.5),
        name="own[pages=2]", rounds=3, warmup=2, **support.FIXED,
    )
    assert [result.order for result in results] == [(1, 0)] * 3
"""


def test_an_entry_has_the_times_of_pytest_benchmark(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(PLAIN)
    result = run_pytest(pytester, JSON, CLOCK, "--mmr5-title=Own", "--mmr5-note=of nothing")
    assert result.ret == 0
    evidence = measured(pytester)
    (entry,) = evidence["entries"]
    assert (entry["name"], entry["subject"], entry["warmup"]) == ("own[pages=2]", "own", 2)
    assert entry["samples_ms"] == [1500.0] * 3
    assert entry["stages_ms"] == pytest.approx({"decode": 0.01, "other": 1499.99})
    assert entry["memory"]["peak_rss_bytes"] > 0
    assert (evidence["title"], evidence["note"]) == ("Own", "of nothing")
    assert evidence["machine"]["torch"] and evidence["provenance"]["commit"]
    recorded = json.loads((pytester.path / "out.json").read_text())
    assert recorded["benchmarks"][0]["group"] == "own[pages=2,quant=own]"
    result.stdout.fnmatch_lines(["*Own*", "of nothing*", "*p50*p95*", "own[[]pages=2] *1500 *"])


def test_every_round_gets_its_number_off_the_clock(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import support

        def test_rounds(mmr5_benchmark):
            prepared, asked = [], []

            def setup(number):
                prepared.append(number)
                support.now += 100.0
                return number, "page"

            def target(number, page):
                asked.append((number, page))
                return support.answer(seconds=number)

            mmr5_benchmark.run(
                target, name="own", rounds=3, warmup=2, setup=setup, **support.FIXED
            )
            assert prepared == [-2, -1, 0, 1, 2]
            assert asked == [(number, "page") for number in prepared]
            assert mmr5_benchmark.entry["samples_ms"] == [0.0, 1000.0, 2000.0]
        """
    )
    run_pytest(pytester, CLOCK).assert_outcomes(passed=1)


def test_coroutine_functions_run_to_their_end_on_the_clock(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import asyncio
        from functools import partial
        import pytest
        import support

        loops = set()

        async def function(*arguments):
            await asyncio.sleep(0)
            loops.add(asyncio.get_running_loop())
            return support.answer(seconds=2.0)

        class Client:
            async def method(self):
                return await function()

            async def __call__(self):
                return await function()

        @pytest.mark.parametrize(
            "target", [function, partial(function, 1), Client().method, Client()], ids="fpmc"
        )
        def test_async(mmr5_benchmark, request, target):
            loops.clear()
            mmr5_benchmark.run(target, name=request.node.name, rounds=2, warmup=1, **support.FIXED)
            assert mmr5_benchmark.entry["samples_ms"] == [2000.0, 2000.0]
            assert len(loops) == 1 and loops.pop().is_closed()
        """
    )
    result = run_pytest(pytester, CLOCK)
    result.assert_outcomes(passed=4)
    assert "never awaited" not in result.stdout.str() + result.stderr.str()


def test_what_cannot_be_timed_to_its_end_is_refused(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import asyncio
        import pytest
        import support

        async def function():
            return support.answer()

        async def generator():
            yield support.answer()

        def hidden():
            return function()

        def lazy():
            yield support.answer()

        def tuple_of_ids():
            return (1, 0)

        @pytest.mark.parametrize("target", [generator, hidden, lazy, tuple_of_ids])
        def test_refused(mmr5_benchmark, target):
            mmr5_benchmark.run(target, name="own", rounds=1, **support.FIXED)

        def test_inside_a_loop(mmr5_benchmark):
            async def main():
                mmr5_benchmark.run(function, name="own", rounds=1, **support.FIXED)

            asyncio.run(main())
        """
    )
    result = run_pytest(pytester, JSON)
    result.assert_outcomes(failed=5)
    assert "never awaited" not in result.stdout.str() + result.stderr.str()
    result.stdout.fnmatch_lines(
        [
            "E*ValueError: generator is an async generator*measure an async def that reads it*",
            "E*ValueError: hidden returns something to be awaited*measure the async def itself.",
            "E*ValueError: lazy returned generator, no RerankResult; read it to its end*",
            "E*ValueError: tuple_of_ids returned tuple, no RerankResult*",
            "E*ValueError: function is measured in an event loop of its own*plain def.",
        ]
    )
    evidence = measured(pytester)
    assert evidence["entries"] == []
    assert {s["reason"] for s in evidence["skipped"]} == {"ValueError after 0 of 1 rounds"}


def test_a_slowdown_is_inside_the_measured_time(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import time
        import support

        def test_slow(mmr5_benchmark):
            own = []

            def target():
                started = time.perf_counter()
                sum(range(20_000))
                own.append(1e3 * (time.perf_counter() - started))
                return support.answer()

            mmr5_benchmark.run(target, name="own", rounds=3, **support.FIXED)
            samples = mmr5_benchmark.entry["samples_ms"]
            assert all(ms >= 3 * alone for ms, alone in zip(samples, own, strict=True))
        """
    )
    run_pytest(pytester, "--mmr5-slowdown=2").assert_outcomes(passed=1)


def test_a_name_is_measured_once(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest
        import support

        @pytest.mark.parametrize("subject", ["a", "b", "a"])
        def test_it(mmr5_benchmark, subject):
            mmr5_benchmark.run(
                support.answer, name="own", subject=subject, rounds=1, **support.FIXED
            )
        """
    )
    result = run_pytest(pytester)
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["E*ValueError: own of a was measured before in this run*"])


def test_disabled_benchmarks_ask_once_and_time_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import support

        def test_it(mmr5_benchmark):
            rounds = []
            results = mmr5_benchmark.run(
                lambda number: support.answer(),
                name="own", rounds=3, warmup=2, setup=lambda n: rounds.append(n) or (n,),
                **support.FIXED,
            )
            assert rounds == [0] and len(results) == 1 and mmr5_benchmark.entry is None
        """
    )
    result = run_pytest(pytester, "--benchmark-disable", JSON)
    result.assert_outcomes(passed=1)
    assert not (pytester.path / "out.json").exists()
    assert not (pytester.path / "out.jsonl").exists()


def test_only_recordings_of_this_machine_are_compared(pytester: pytest.Pytester) -> None:
    theirs = "\ndef test_own_benchmark(benchmark):\n    benchmark.pedantic(int)\n"
    pytester.makepyfile(PLAIN + theirs)
    assert run_pytest(pytester, "--benchmark-save=first").ret == 0
    (saved,) = pytester.path.glob(".benchmarks/*/*_first.json")
    recording = json.loads(saved.read_text())
    machine = recording["machine_info"].pop("mmr5")

    def compare(machine: dict[str, str] | None, *options: str) -> pytest.RunResult:
        told = {} if machine is None else {"mmr5": machine}
        saved.write_text(json.dumps({**recording, "machine_info": told}))
        return run_pytest(pytester, "--benchmark-compare", *options)

    same = compare(machine | {"load": 99.0})
    assert same.ret == 0
    assert "machine_info is different" not in same.stdout.str() + same.stderr.str()

    other = machine | {"host_cpu": "Other 9000"}
    for told, why in (
        (other, "is of another machine (host_cpu: Other 9000 and"),
        (None, "does not"),
    ):
        refused = compare(told)
        assert refused.ret == USAGE_ERROR
        (line,) = [line for line in refused.errlines if line.startswith("ERROR")]
        assert f"{recording['datetime']} {why}" in line and "--mmr5-allow-machine-diff" in line
        assert compare(told, "--mmr5-allow-machine-diff").ret == 0
        assert compare(told, "-k", "own_benchmark").ret == 0


def test_benchmarks_that_are_not_ours_are_left_alone(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_own(benchmark):\n    benchmark.pedantic(int)\n")
    assert run_pytest(pytester, JSON).ret == 0
    recorded = json.loads((pytester.path / "out.json").read_text())
    assert "mmr5" not in recorded and "mmr5" not in recorded["machine_info"]


CELLS = """
import pytest

@pytest.mark.rerank_axes(quant="int4", cache="seen")
def test_measured(rerank_case, mmr5_benchmark):
    mmr5_benchmark(rerank_case)

def test_engine(mmr5_engine):
    assert mmr5_engine
"""


def test_missing_engines_are_one_error(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(CELLS)
    result = run_pytest(pytester)
    assert result.ret == USAGE_ERROR
    (line,) = [line for line in result.errlines if line.startswith("ERROR")]
    assert "make bench-engines" in line and "--mmr5-engine QUANT=DIR" in line
    assert all(str(Path("build", "mini", name)) in line for name in ("bf16", "int8", "int4-gptq"))
    assert run_pytest(pytester, "--collect-only").ret == 0
    run_pytest(pytester, "--benchmark-skip", "-k", "measured").assert_outcomes(skipped=2)


def test_cells_are_named_by_their_axes(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(CELLS)
    result = run_pytest(pytester, "--collect-only", "-q", "--mmr5-think=full,32")
    ids = [f"pages={n},quant=int4,cache=seen,*think={t}" for n in (5, 10) for t in ("full", 32)]
    result.stdout.fnmatch_lines(
        [f"*::test_measured?{cell}]" for cell in ids]
        + [f"*::test_engine?{quant}]" for quant in ("bf16", "int8", "int4")]
    )
    run_pytest(pytester, "-k", "measured", "--mmr5-cache=cold").assert_outcomes(skipped=1)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--mmr5-engine=nowhere", "there is no engine in nowhere*mmr5-export."),
        ("--mmr5-reference=nowhere", "there is no engine in nowhere*mmr5-export."),
        ("--mmr5-pages=5,0", "'0' is no whole number of 1 or more"),
        ("--mmr5-cache=hot", "'hot' is none of cold, warm, seen"),
        ("--mmr5-think=-3", "'-3' is none of full, off, auto, and no number of tokens"),
        ("--benchmark-json=out.jsonl", "out.jsonl cannot hold both the JSON and the journal*"),
        ("--mmr5-slowdown=nan", "'nan' is no number of 0 or more"),
    ],
)
def test_options_that_cannot_be_meant(pytester: pytest.Pytester, option: str, message: str) -> None:
    result = run_pytest(pytester, option)
    assert result.ret == USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{message.replace('[', '[[]')}*"])


def test_an_axis_that_is_none_is_a_collection_error(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(CELLS.replace("cache=", "memory="))
    result = run_pytest(pytester)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*rerank_axes has no axis 'memory'; it takes pages, quant,*"])


def test_without_pytest_benchmark_the_extra_is_named(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(PLAIN)
    result = run_pytest(pytester, "-p", "no:benchmark")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*mmr5_benchmark needs pytest-benchmark*mmr5-runtime?bench]*"])


def test_loading_it_imports_nothing_heavy(tmp_path: Path) -> None:
    code = f"""
import sys, pytest
pytest.main([*{plugin_options()!r}, "-q", {str(tmp_path)!r}])
assert "mmr5_bench.plugin.collection" in sys.modules
print(sorted({{"torch", "numpy", "PIL", "safetensors"}} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]"


FIRST = PLAIN.replace("def test_plain", "def test_a")


def test_an_interrupted_run_keeps_what_it_measured(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        FIRST
        + """
def test_b(mmr5_benchmark):
    def target(number):
        if number == 1:
            raise KeyboardInterrupt
        return support.answer()

    mmr5_benchmark.run(target, name="b", rounds=4, setup=lambda n: (n,), **support.FIXED)
"""
    )
    result = run_pytest(pytester, JSON)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    kept = measured(pytester)
    assert [entry["name"] for entry in kept["entries"]] == ["own[pages=2]"]
    interrupted = {"subject": "own: b", "reason": "KeyboardInterrupt after 1 of 4 rounds"}
    assert kept["skipped"] == [interrupted]
    journal = load_evidence(pytester.path / "out.jsonl")
    assert (journal["entries"], journal["skipped"]) == (kept["entries"], kept["skipped"])


def test_evidence_is_written_where_pytest_benchmark_fails_to(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        FIRST
        + """
def test_b(benchmark):
    def target():
        raise KeyboardInterrupt

    benchmark.pedantic(target)
"""
    )
    run_pytest(pytester, JSON)
    kept = measured(pytester)
    assert json.loads((pytester.path / "out.json").read_text())["kind"] == "mmr5-evidence"
    assert [entry["name"] for entry in kept["entries"]] == ["own[pages=2]"]


def test_a_killed_run_leaves_its_journal(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(FIRST + "\ndef test_b():\n    import os\n    os._exit(9)\n")
    result = run_pytest(pytester, "--mmr5-journal=kept/run.jsonl", subprocess=True)
    assert result.ret == 9
    kept = load_evidence(pytester.path / "kept" / "run.jsonl")
    assert [entry["name"] for entry in kept["entries"]] == ["own[pages=2]"]
    assert kept["machine"]["torch"]
