"""The parts that only make sense beside pytest-benchmark; registered when it is there."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mmr5_bench.plugin.recording import RECORDING, Compared, Recording
from mmr5_bench.plugin.summary import summary_lines

if TYPE_CHECKING:
    from mmr5_bench.plugin.measure import PedanticBenchmark, RerankBenchmark


@pytest.fixture
def mmr5_benchmark(benchmark: PedanticBenchmark, request: pytest.FixtureRequest) -> RerankBenchmark:
    """``mmr5_benchmark(rerank_case)`` measures a cell, ``mmr5_benchmark.run`` anything else."""
    from mmr5_bench.plugin.measure import RerankBenchmark

    return RerankBenchmark(benchmark, request.config.stash[RECORDING])


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """Only where something of ours was measured: other users of pytest-benchmark pay nothing."""
    recording = config.stash[RECORDING]
    if recording.begun:
        machine_info["mmr5"] = recording.machine


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    recording = config.stash[RECORDING]
    if recording.begun:
        told = recording.head()
        output_json["mmr5"] = {k: v for k, v in told.items() if k not in ("entries", "machine")}


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_compare_machine_info(
    config: pytest.Config, compared_benchmark: Mapping[str, Any]
) -> None:
    """Keeps our part of a recording's machine; whether it matters is known after collection.

    It is taken out, because pytest-benchmark would warn of every difference, and the load of the
    machine always differs.
    """
    machine = compared_benchmark["machine_info"].pop("mmr5", None)
    compared = Compared(compared_benchmark.get("datetime", "an unknown time"), machine)
    config.stash[RECORDING].compared.append(compared)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest-benchmark, which writes its JSON here
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, Any, Any]:
    recording = session.config.stash[RECORDING]
    try:
        return (yield)
    finally:
        _rescue(recording)
        recording.end()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    recording = terminalreporter.config.stash[RECORDING]
    if not recording.entries:
        return
    title, note = recording.description()
    terminalreporter.section(title, sep="-")
    terminalreporter.write_line(f"{note} 95 % intervals in brackets, times in ms.".lstrip())
    for line in summary_lines(recording.entries):
        terminalreporter.write_line(line)


def _rescue(recording: Recording) -> None:
    """Writes the JSON where pytest-benchmark could not.

    It writes none when a round of any benchmark was interrupted before it had a single time.
    """
    path = recording.settings.json
    if path is None or not recording.entries or _holds(path, recording):
        return
    from mmr5_bench.evidence.document import write_evidence

    write_evidence(recording.evidence(), path)


def _holds(path: Path, recording: Recording) -> bool:
    """Whether the file has what was measured in this run."""
    from mmr5_bench.evidence.document import load_evidence

    try:
        found = load_evidence(path)["entries"]
    except ValueError:
        return False
    return [e["samples_ms"] for e in found] == [e["samples_ms"] for e in recording.entries]
