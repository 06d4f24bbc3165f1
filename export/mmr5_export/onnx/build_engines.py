"""Builds the engines of a folder of ONNX graphs, with TensorRT or TensorRT-RTX.

This file needs nothing but Python and the bindings of either, and is put beside the graphs as
``build.py``: ``python build.py`` does what ``build.sh`` does with trtexec. The exporter compiles
through it too (``--aot rtx``).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MODULES = {"trt": ("tensorrt",), "rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
SUFFIXES = {"trt": ".plan", "rtx": ".rtx"}


class BuildError(Exception):
    """A graph that the parser or the builder does not take; the text names the node."""


def load_bindings(flavour: str) -> Any:
    """The Python bindings of "trt" or "rtx"; raises ``ImportError`` when none is installed."""
    for name in MODULES[flavour]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    raise ImportError(f"none of {', '.join(MODULES[flavour])} is installed")


def build(trt: Any, graph: Path, profiles: Sequence[Mapping[str, Any]]) -> Any:
    """Parses and builds one graph; returns the serialized engine, a buffer.

    ``profiles`` are those of one graph in ``profiles.json``. Raises :class:`BuildError`.
    """
    logger = error_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        errors = (parser.get_error(index) for index in range(parser.num_errors))
        told = "; ".join(
            f"node {error.node_name()} ({error.node_operator()}): {' '.join(error.desc().split())}"
            for error in errors
        )
        raise BuildError(f"the parser does not take {graph.name}: {told}")
    config = builder.create_builder_config()
    for profile in profiles:
        made = builder.create_optimization_profile()
        for name, shape in profile["shapes"].items():
            made.set_shape(name, shape["min"], shape["opt"], shape["max"])
        if config.add_optimization_profile(made) < 0:
            told = "; ".join(logger.errors)
            raise BuildError(f"{graph.name} does not take profile {profile['name']}: {told}")
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError(f"{graph.name} does not build: {'; '.join(logger.errors)}")
    return engine


def build_file(
    trt: Any, graph: Path, profiles: Sequence[Mapping[str, Any]], output: Path
) -> dict[str, float | int]:
    """:func:`build` into a file; returns seconds (parsing and building) and bytes.

    ``output`` is there once it is whole: it is written under another name and then renamed.
    """
    started = time.perf_counter()
    engine = build(trt, graph, profiles)
    seconds = time.perf_counter() - started
    part = output.with_name(f"{output.name}.part")
    with part.open("wb") as file:
        file.write(engine)
    os.replace(part, output)
    return {"seconds": round(seconds, 2), "bytes": output.stat().st_size}


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds every graph that ``profiles.json`` beside this file names; returns an exit status."""
    parser = argparse.ArgumentParser(description="Builds the TensorRT engines of this folder.")
    parser.add_argument("--flavour", choices=tuple(MODULES), default="trt")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    given = parser.parse_args(arguments)
    try:
        trt = load_bindings(given.flavour)
        for name, profiles in json.loads((given.folder / "profiles.json").read_text()).items():
            output = given.folder / (name + SUFFIXES[given.flavour])
            facts = build_file(trt, given.folder / f"{name}.onnx", profiles, output)
            sys.stdout.write(f"{output.name}: {facts['bytes']} bytes in {facts['seconds']} s\n")
    except (BuildError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _strongly_typed(trt: Any) -> int:
    """The creation flag where there is one: TensorRT 11 and RTX know nothing else."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def error_logger(trt: Any) -> Any:
    """A logger of TensorRT's whose ``errors`` are what went wrong, in its words."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
        """Keeps what went wrong, for the error that is raised."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

    return Logger()


if __name__ == "__main__":
    raise SystemExit(main())
