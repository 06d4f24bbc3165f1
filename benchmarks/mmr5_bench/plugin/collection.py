"""Gives tests their cells, and checks once what all of them need: engines, the same machine."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mmr5_bench.plugin.axes import cell_name, make_cells, marked
from mmr5_bench.plugin.recording import RECORDING, Recording
from mmr5_bench.plugin.settings import MANIFEST, is_engine


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not {"rerank_case", "mmr5_engine"} & set(metafunc.fixturenames):
        return
    settings = metafunc.config.stash[RECORDING].settings
    if "rerank_case" not in metafunc.fixturenames:
        metafunc.parametrize("mmr5_engine", list(settings.engines), indirect=True, scope="session")
        return
    try:
        cells = make_cells(settings, marked(metafunc.definition))
    except ValueError as error:
        raise pytest.Collector.CollectError(f"{metafunc.definition.nodeid}: {error}") from error
    if cells:
        ids = [cell_name("", cell)[1:-1] for cell in cells]
        metafunc.parametrize("rerank_case", cells, ids=ids, indirect=True)
    else:
        reason = "no cell of this test is among the engines and options given"
        skipped = pytest.param(None, marks=pytest.mark.skip(reason=reason), id="none")
        metafunc.parametrize("rerank_case", [skipped], indirect=True)


@pytest.hookimpl(trylast=True)  # after -k, -m and --benchmark-skip have had their say
def pytest_collection_modifyitems(config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    """Raises pytest.UsageError: one error for all tests that could only fail."""
    if config.getoption("collectonly"):
        return
    running = [item for item in items if not any(item.iter_markers("skip"))]
    recording = config.stash[RECORDING]
    _require_engines(recording, running)
    if any("mmr5_benchmark" in _fixtures(item) for item in running):
        if refusal := recording.refuse_comparison():
            raise pytest.UsageError(refusal)


def _require_engines(recording: Recording, items: Sequence[pytest.Item]) -> None:
    engines = recording.settings.engines
    wanted = dict.fromkeys(quant for item in items if (quant := _quant(item)))
    absent = [engines[quant] for quant in wanted if not is_engine(engines[quant])]
    if absent:
        raise pytest.UsageError(
            f"there is no engine in {', '.join(map(str, absent))} ({MANIFEST}); run "
            "`make bench-engines`, or name yours with --mmr5-engine QUANT=DIR."
        )


def _fixtures(item: pytest.Item) -> Sequence[str]:
    return getattr(item, "fixturenames", ())


def _quant(item: pytest.Item) -> str | None:
    """The engine a test will load, None when it needs none."""
    callspec = getattr(item, "callspec", None)
    params = {} if callspec is None else callspec.params
    cell = params.get("rerank_case")
    quant = cell["quant"] if isinstance(cell, dict) else params.get("mmr5_engine")
    return quant if isinstance(quant, str) else None
