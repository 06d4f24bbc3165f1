"""Engines shared by the tests that need a whole one; exported once per run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Triton reads it when it is first imported, which transformers does. With a GPU the kernels run on
# that.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from helpers.tiny import make_hf_model, tiny_configs, write_checkpoint  # noqa: E402
from mmr5_runtime.backends import BackendName  # noqa: E402

# pytest-benchmark would switch itself off in the runs that tests of the benchmark plugin start.
os.environ.pop("PYTEST_XDIST_WORKER", None)

# A run in the background starts with SIGINT ignored; the tests of Ctrl-C need it as in a terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tiny models gain nothing from threads and lose much to them when the machine is busy.
torch.set_num_threads(1)

# How long an example takes says how busy the machine is.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

EngineFactory = Callable[[str], Path]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of a module that names ``BACKENDS`` run once on each, as far as they load an engine."""
    names = getattr(metafunc.module, "BACKENDS", None)
    if names and "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> BackendName:
    """What a test loads its engines with, in so many words; their folders have what it takes."""
    return getattr(request, "param", "native")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bf16 checkpoint whose decoder fits every storage format."""
    folder = tmp_path_factory.mktemp("tiny-checkpoint")
    model = make_hf_model(tiny_configs()["int4"], seed=4)
    return write_checkpoint(model, folder, dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def tiny_engine(
    tiny_checkpoint: Path, backend: BackendName, tmp_path_factory: pytest.TempPathFactory
) -> EngineFactory:
    """Engine folder of the tiny checkpoint by quantization name."""
    from helpers.exporting import quick_export  # not before an engine is asked for
    from mmr5_export.onnx.ort import add_graphs

    made: dict[str, Path] = {}

    def make(quant: str) -> Path:
        if quant not in made:
            made[quant] = tmp_path_factory.mktemp("engines") / quant
            quick_export(str(tiny_checkpoint), quant, made[quant])
            if backend == "onnxruntime":
                add_graphs(made[quant])
        return made[quant]

    return make
