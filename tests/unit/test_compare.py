"""Two runs compared: what fails, what is only suspect, what is never held against each other."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.evidence import MACHINE, interval, make_entry, make_evidence, noisy_rounds
from mmr5_bench.cli import main
from mmr5_bench.evidence.document import Entry, Evidence, write_evidence
from mmr5_bench.report.compare import compare
from mmr5_bench.report.qualities import change_interval
from mmr5_bench.report.ratios import pooled_ratio
from mmr5_bench.report.rules import LATENCIES, LatencyRule, QualityRule, parse_rule

P50, P95 = LatencyRule("p50", 0.1), LatencyRule("p95", 0.1)
FEW = settings(max_examples=10)


def run_of(
    seed: int, *, entries: int = 24, rounds: int = 12, slower: float = 1.0, only: int | None = None
) -> Evidence:
    """A noisy run of lists of different length; with ``only`` that one entry is slower."""
    generator = random.Random(seed)
    found = []
    for number in range(entries):
        lists = random.Random(number)
        factor = slower if only in (None, number) else 1.0
        bases = [factor * 100 * lists.uniform(0.5, 1.8) for _ in range(rounds)]
        found.append(make_entry(f"rerank[{number}]", "ours", noisy_rounds(bases, generator)))
    return make_evidence(found)


def verdicts(result: dict[str, Any], kind: str = "rows") -> list[str]:
    return [row["verdict"] for row in result[kind]]


def with_quality(**metrics: Any) -> Evidence:
    return make_evidence([make_entry("a", "ours", [10.0] * 6, quality={"cases": 300, **metrics})])


samples = st.lists(st.floats(0.1, 1e5), min_size=5, max_size=14)


@FEW
@given(
    rounds=st.lists(samples, min_size=1, max_size=6),
    statistics=st.sets(st.sampled_from(LATENCIES), min_size=1, max_size=2),
    allowed=st.floats(0, 1),
)
def test_a_file_and_itself_are_ok_by_any_rule(
    rounds: list[list[float]], statistics: set[Any], allowed: float
) -> None:
    run = make_evidence([make_entry(f"{i}", "ours", times) for i, times in enumerate(rounds)])
    result = compare(run, run, [LatencyRule(s, allowed) for s in statistics], strict=True)
    assert not result["failed"]
    assert set(verdicts(result) + verdicts(result, "pooled")) == {"ok"}


@FEW
@given(rounds=st.lists(samples, min_size=1, max_size=6))
def test_everything_slower_by_a_fifth_is_always_regressed(rounds: list[list[float]]) -> None:
    before = make_evidence([make_entry(f"{i}", "ours", r) for i, r in enumerate(rounds)])
    slower = [[1.2 * time for time in times] for times in rounds]
    after = make_evidence([make_entry(f"{i}", "ours", r) for i, r in enumerate(slower)])
    result = compare(before, after, [P50])
    assert result["failed"]
    assert set(verdicts(result) + verdicts(result, "pooled")) == {"regressed"}
    assert set(verdicts(compare(after, before, [P50]))) == {"improved"}


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_noise_passes_and_a_fifth_more_is_caught(seed: int) -> None:
    before = run_of(seed)
    assert not compare(before, run_of(seed + 1), [P95])["failed"]
    slower = compare(before, run_of(seed + 2, slower=1.2), [P95])
    assert slower["failed"] and verdicts(slower, "pooled") == ["regressed"]


def test_one_outlier_does_not_fail_twelve_rounds() -> None:
    before = run_of(1, entries=3)
    after = copy.deepcopy(before)
    times = after["entries"][0]["samples_ms"]
    slowest = sorted(range(len(times)), key=times.__getitem__)
    times[slowest[-1]] *= 1.5
    assert verdicts(compare(before, after, [P95], strict=True)) == ["ok"] * 3
    times[slowest[-2]] *= 1.5
    result = compare(before, after, [P95])
    assert not result["failed"] and verdicts(result) == ["suspect", "ok", "ok"]
    assert compare(before, after, [P95], strict=True)["failed"]


def test_one_slow_entry_among_many_is_found_by_itself() -> None:
    result = compare(run_of(1), run_of(2, slower=1.8, only=3), [P50])
    assert [row["name"] for row in result["rows"] if row["verdict"] == "regressed"] == ["rerank[3]"]
    assert verdicts(result, "pooled") == ["ok"] and result["failed"]


def test_as_much_faster_elsewhere_makes_slower_uncertain() -> None:
    """Noise that reaches as far to the other side is no proof."""
    before, after = run_of(1), run_of(2, slower=1.8, only=3)
    for number in (5, 6, 7):
        entry = after["entries"][number]
        entry["samples_ms"] = [time / 1.8 for time in entry["samples_ms"]]
    found = {row["name"]: row["verdict"] for row in compare(before, after, [P50])["rows"]}
    assert found["rerank[3]"] == "suspect"


def test_few_rounds_prove_nothing() -> None:
    before = make_evidence([make_entry("a", "ours", [10.0, 11.0, 12.0])])
    after = make_evidence([make_entry("a", "ours", [20.0, 22.0, 24.0])])
    result = compare(before, after, [P50])
    assert verdicts(result) == ["suspect"] and "prove nothing" in result["rows"][0]["note"]


def test_rounds_beyond_the_shorter_run_are_left_out() -> None:
    before = make_evidence([make_entry("a", "ours", [10.0] * 8 + [99.0] * 4)])
    after = make_evidence([make_entry("a", "ours", [10.0] * 8)])
    row = compare(before, after, [P95])["rows"][0]
    assert (row["rounds"], row["ratio"]["value"]) == (8, 1.0)
    assert row["note"] == "first 8 rounds of each"


def test_other_machines_are_refused_unless_allowed() -> None:
    before = run_of(1, entries=2)
    after = {**run_of(1, entries=2), "machine": {**MACHINE, "host_cpu": "Another 1"}}
    with pytest.raises(ValueError, match="host_cpu: Imaginary 9000 and Another 1.*--allow-machine"):
        compare(before, after, [P50])  # type: ignore[arg-type]
    allowed = compare(before, after, [P50], allow_machine_diff=True)  # type: ignore[arg-type]
    assert allowed["machine_differences"] and not allowed["failed"]


def test_other_work_is_never_compared_and_fails() -> None:
    before = make_evidence([make_entry("a", "ours", [1.0] * 6), make_entry("b", "ours", [1.0] * 6)])
    after = copy.deepcopy(before)
    after["entries"][1]["work"] = "f" * 16
    result = compare(before, after)
    assert result["failed"] and result["different_work"] == ["b ours"]
    assert {row["name"] for row in result["rows"]} == {"a"}


def test_entries_of_one_file_only_are_listed() -> None:
    def run(*names: str) -> Evidence:
        return make_evidence([make_entry(name, "ours", [1.0] * 6) for name in names])

    result = compare(run("a", "b"), run("b", "c"), [P50])
    assert (result["only_before"], result["only_after"]) == (["a ours"], ["c ours"])
    assert not result["failed"]
    with pytest.raises(ValueError, match="nothing can be compared"):
        compare(run("a"), run("b"), [P50])
    with pytest.raises(ValueError, match="first file has a ours twice"):
        compare(run("a", "a"), run("a"), [P50])


@pytest.mark.parametrize(
    ("before", "after", "rule", "verdict"),
    [
        (0.95, 0.70, QualityRule("recall@1", 0.02), "regressed"),
        (0.95, 0.92, QualityRule("recall@1", 0.02), "suspect"),
        (0.90, 0.88, QualityRule("recall@1", 0.02), "ok"),
        (0.70, 0.95, QualityRule("recall@1", 0.02), "improved"),
        (0.01, 0.25, QualityRule("fallback", 0.02), "regressed"),
        (0.25, 0.01, QualityRule("fallback", 0.02), "improved"),
    ],
)
def test_quality_by_its_intervals(
    before: float, after: float, rule: QualityRule, verdict: str
) -> None:
    old, new = (with_quality(**{rule.metric: interval(v, 0.02)}) for v in (before, after))
    result = compare(old, new, [rule])
    assert verdicts(result, "quality") == [verdict]
    assert result["failed"] == (verdict == "regressed")


def test_a_rule_that_nothing_was_held_against_has_not_passed() -> None:
    full = with_quality(**{"recall@1": interval(0.9, 0.02)})
    with pytest.raises(ValueError, match="has it no more"):
        compare(full, with_quality(), [QualityRule("recall@1", 0.02)])
    with pytest.raises(ValueError, match="no entry of both files has mrr"):
        compare(full, full, [QualityRule("mrr", 0.02)])


def test_judgements_of_data_sets_are_compared_too() -> None:
    def run(recall: float) -> Evidence:
        quality = {"cases": 1658, "recall@1": interval(recall, 0.01)}
        row = {"subject": "ours", "dataset": "d", "axes": {}, "quality": quality}
        return make_evidence([], qualities=[row])

    assert compare(run(0.7), run(0.6), [QualityRule("recall@1", 0.02)])["failed"]


@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_change_lies_in_its_interval(a: float, b: float, reach: float, other: float) -> None:
    change = change_interval(interval(a, reach), interval(b, other))
    assert change["low"] <= change["value"] <= change["high"]
    assert change["high"] - change["low"] >= 2 * max(reach, other) - 1e-9


@pytest.mark.parametrize("statistic", LATENCIES)
@pytest.mark.parametrize("count", [1, 3, 8])
def test_pooled_ratio_of_a_constant_factor_is_exact(count: int, statistic: Any) -> None:
    import numpy as np

    pairs = [(np.arange(1.0, 9.0) * i, np.arange(1.0, 9.0) * i * 1.25) for i in range(1, count + 1)]
    ratio = pooled_ratio(pairs, statistic)
    assert [ratio[end] for end in ("low", "value", "high")] == pytest.approx([1.25] * 3)


@pytest.mark.parametrize("text", ["p95:10%", "p50:2.5%", "recall@1:-0.02", "fallback:+0.01"])
def test_rules_are_written_as_they_are_read(text: str) -> None:
    assert parse_rule(text).text == text


@pytest.mark.parametrize(
    "text", ["", "p95", "p95:", "p95:10", "p95:-10%", "p95:x%", "p94:10%", "recall@1:2%"]
    + ["recall@1:0.02", "recall@1:+0.02", "fallback:-0.01", "speed:-1", "p95:nan%", ":10%"],
)  # fmt: skip
def test_what_is_no_rule_is_usage_with_an_example(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "a.json", "b.json", f"--fail={text}"])
    assert stopped.value.code == 2
    assert "for example" in capsys.readouterr().err or "Write --fail" in capsys.readouterr().err


@given(st.text(max_size=20))
def test_any_text_is_a_rule_or_a_value_error(text: str) -> None:
    try:
        rule = parse_rule(text)
    except ValueError as error:
        assert repr(text) in str(error)
    else:
        assert parse_rule(rule.text) == rule


@pytest.mark.parametrize(("slower", "status"), [(1.0, 0), (1.3, 1)])
def test_the_command(
    slower: float, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, run in zip(files, (run_of(1), run_of(2, slower=slower)), strict=True):
        write_evidence(run, path)
    assert main(["compare", *map(str, files), "--fail", "p95:10%"]) == status
    told = capsys.readouterr()
    result = json.loads(told.out.splitlines()[-1])
    assert result["failed"] == bool(status) and len(result["rows"]) == 24
    assert "| all 24 entries | p95:10% |" in told.err
    assert told.err.splitlines()[-1].startswith("FAILED" if status else "passed")


def test_the_command_names_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries: list[Entry] = [make_entry("a", "ours", [0.0] * 6)]
    write_evidence(make_evidence(entries), tmp_path / "a.json")
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "none.json")]) == 1
    assert "none.json cannot be read" in capsys.readouterr().err
    assert main(["compare", *[str(tmp_path / "a.json")] * 2]) == 1
    assert "time of 0 ms" in capsys.readouterr().err


def test_a_pace_takes_the_machine_out() -> None:
    draw = random.Random(5)
    before = run_of(5, entries=8)
    after = copy.deepcopy(before)
    for old, new in zip(before["entries"], after["entries"], strict=True):
        busy = [draw.uniform(1.0, 1.8) for _ in old["samples_ms"]]
        old["pace_ms"] = [8.0] * len(busy)
        new["pace_ms"] = [8.0 * b for b in busy]
        new["samples_ms"] = [ms * b for ms, b in zip(old["samples_ms"], busy, strict=True)]
    rules = [parse_rule("p50:10%"), parse_rule("p95:10%")]
    assert not compare(before, after, rules)["failed"]
    for new in after["entries"]:
        new["samples_ms"] = [1.2 * ms for ms in new["samples_ms"]]
    result = compare(before, after, rules)
    assert result["failed"] and {row["note"] for row in result["rows"]} == {"at one pace"}
    assert [row["ratio"]["value"] for row in result["rows"]] == pytest.approx([1.2] * 16)
    for new in after["entries"]:
        del new["pace_ms"]  # known of one run only, it is of no use
    assert {row["note"] for row in compare(before, after, rules)["rows"]} == {""}
