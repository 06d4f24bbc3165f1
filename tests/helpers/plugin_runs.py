"""Runs of pytest with the plugin mmr5 inside a test, and the tests they run."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import pytest

from mmr5_bench.evidence.document import Evidence, load_evidence

# A clock that only the measured call moves, and calls that need no engine.
SUPPORT = """
import functools
from mmr5_runtime.types import RerankResult, Usage

now = 0.0

def clock():
    return now

def answer(order=(1, 0), seconds=0.0):
    global now
    now += seconds
    usage = Usage(9, 4, 3, pages=2, decode_steps=2)
    return RerankResult(
        order, "ok", "eos", text="", reasoning="", usage=usage, timings_ms={"decode": 0.01}
    )

FIXED = dict(axes={"pages": 2, "quant": "own"}, work="0123456789abcdef")
"""
CLOCK = "--benchmark-timer=support.clock"


def plugin_options() -> list[str]:
    """What loads the plugin: nothing where its entry point is installed, which then does."""
    found = entry_points(group="pytest11", name="mmr5")
    return [] if found else ["-p", "mmr5_bench.plugin"]


# pytest-benchmark asks the processor for its flags, which takes a second.
CONFTEST = """
import pytest

@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info():
    return {}
"""


def run_pytest(
    pytester: pytest.Pytester, *options: str | Path, subprocess: bool = False
) -> pytest.RunResult:
    """Runs what ``pytester`` holds, without the seconds that the machine's ceilings take."""
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(support=SUPPORT)
    pytester.syspathinsert()
    every = [*plugin_options(), "--mmr5-ceilings=0", *options]
    if subprocess:
        return pytester.runpytest_subprocess(*every)
    return pytester.runpytest_inprocess(*every, no_reraise_ctrlc=True)


def measured(pytester: pytest.Pytester) -> Evidence:
    """What the run left in ``out.json``."""
    return load_evidence(pytester.path / "out.json")
