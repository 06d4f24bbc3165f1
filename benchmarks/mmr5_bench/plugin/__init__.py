"""The pytest plugin ``mmr5``: rerank benchmarks on pytest-benchmark.

Data flow: ``settings`` reads the options; ``collection`` gives every test that takes
``rerank_case`` its cells (list size, engine, cache, stop, think: ``axes``) and checks engines and
machine once for all; ``fixtures`` loads one engine at a time (``engines``) and draws lists
(``drawing``, ``case``); ``measure`` runs them through pytest-benchmark, one list per round, and
makes an entry of what it saw; ``recording`` keeps entries in a ``journal`` at once, and ``hooks``
puts them into pytest-benchmark's JSON and a short table (``summary``).

As an entry point it is loaded in every pytest run of the environment, so nothing here may import
torch, numpy or pytest-benchmark before a test asks for a measurement.
"""

from __future__ import annotations

import pytest

from mmr5_bench.plugin import collection, fixtures
from mmr5_bench.plugin.recording import RECORDING, Recording
from mmr5_bench.plugin.settings import add_options, read_settings

_BENCHMARK_PLUGINS = ("benchmark", "pytest_benchmark.plugin")
"""By entry point, and by ``-p`` where entry points are switched off."""


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Registers the parts; before pytest-benchmark's own, which already compares recordings."""
    config.addinivalue_line(
        "markers",
        "rerank_axes(pages, quant, cache, stop, think): cells of a test that takes rerank_case; "
        "several markers add up",
    )
    config.stash[RECORDING] = Recording(read_settings(config))
    manager = config.pluginmanager
    manager.register(collection, "mmr5-collection")
    manager.register(fixtures, "mmr5-fixtures")
    if any(manager.hasplugin(name) for name in _BENCHMARK_PLUGINS):
        from mmr5_bench.plugin import hooks

        manager.register(hooks, "mmr5-benchmark")
    else:
        from mmr5_bench.plugin import missing

        manager.register(missing, "mmr5-missing")
