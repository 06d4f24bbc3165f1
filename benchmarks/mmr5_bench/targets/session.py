"""One run of all targets: what matters most first, every figure on disk as soon as it is there.

Ceilings -> single kernels -> the first configurations -> transformers on the same lists -> memory,
first rerank -> the other configurations. What time, memory or the machine do not allow is listed
with the reason; nothing is estimated in its place.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mmr5_bench.evidence.ceilings import measure_ceilings
from mmr5_bench.evidence.gpu import GpuSampler
from mmr5_bench.evidence.machine import describe_machine
from mmr5_bench.files import write_json
from mmr5_bench.kernels_bench.triton_here import allow_interpreter, coarse_tiles
from mmr5_bench.peers.base import ListWork
from mmr5_bench.provenance import provenance
from mmr5_bench.random_weights.engine_folder import write_random_engine
from mmr5_bench.random_weights.shapes import Quant, Shape, formats_of, spec_of
from mmr5_bench.runbook.steps import SCRATCH
from mmr5_bench.targets import engine_goals, first_rerank, list_goals
from mmr5_bench.targets.clock import TINY, TRUE, Sizes, free_memory
from mmr5_bench.targets.configurations import (
    PORTABLE,
    TRITON,
    TRITON_KV8,
    Configuration,
    decoding,
)
from mmr5_bench.targets.kernel_goals import kernel_figures
from mmr5_bench.targets.results import DRY, RANDOM, Figure, Missing, figure
from mmr5_bench.targets.work import ModelWork
from mmr5_runtime.loading import LoadedEngine
from mmr5_runtime.types import Mmr5Error

KIND, SCHEMA = "mmr5-targets", 1
QUANT: Quant = "int4"
RATES = ("bfloat16", "int8", "fp8", "float32")
_FIRST = 2  # configurations that are measured before everything else
_LOADING_ERRORS = (Mmr5Error, ValueError, RuntimeError, ImportError, OSError)


@dataclass
class Session:
    """A run and what it has found. ``ends`` is in ``time.monotonic``."""

    shape: Shape
    device: torch.device
    output: Path
    ends: float
    say: Callable[[str], None]
    vllm: Path | None = None
    ceilings: dict[str, Any] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    document: dict[str, Any] = field(default_factory=dict)

    @property
    def dry_run(self) -> bool:
        """Whether nothing that is measured means anything."""
        return self.shape == "tiny"

    @property
    def sizes(self) -> Sizes:
        return TINY if self.dry_run else TRUE

    @property
    def left(self) -> float:
        """Seconds; not below zero."""
        return max(0.0, self.ends - time.monotonic())

    def add(self, found: Figure) -> None:
        """Keeps a figure, on disk as well."""
        self.figures.append(found)
        self.write()
        self.say(
            f"{found['goal']} by {found['configuration']}: {found['value']:.4g} {found['unit']}"
        )

    def skip(self, key: str, configuration: str, reason: str) -> None:
        """Lists something as not measured."""
        line = next(iter(reason.strip().splitlines()), "no reason given")
        self.missing.append({"goal": key, "configuration": configuration, "reason": line})
        self.write()
        self.say(f"{key} by {configuration}: not measured, {line}")

    def attempt(self, key: str, configuration: str, measure: Callable[[], Figure]) -> Figure | None:
        """Measures one figure and keeps it, or the reason why there is none."""
        if self.left <= 0:
            self.skip(key, configuration, "the time of the whole run was over")
            return None
        try:
            found = measure()
        except torch.OutOfMemoryError as error:
            reason = str(error)
        except _LOADING_ERRORS as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            self.add(found)
            return found
        # Not in the handler: until its end the error holds on to what is to be freed.
        self.skip(key, configuration, reason)
        free_memory(self.device)
        return None

    def write(self) -> None:
        """The whole document as it stands."""
        self.document |= {"ceilings": self.ceilings, "figures": self.figures}
        self.document["missing"] = self.missing
        write_json(self.document, self.output)


def run_targets(
    shape: Shape,
    device: torch.device,
    configurations: Sequence[Configuration],
    output: Path,
    *,
    seconds: float,
    vllm: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures every goal and returns what stands in ``output``, which is renewed after each.

    ``vllm`` is the file of vLLM's operators, for the single kernels beside ours.
    """
    allow_interpreter(device)
    session = Session(shape, device, output, time.monotonic() + seconds, say, vllm)
    session.document = {
        "kind": KIND,
        "schema": SCHEMA,
        "title": f"Targets of the GPU engine{' (dry run)' if session.dry_run else ''}",
        "note": DRY if session.dry_run else RANDOM,
        "dry_run": session.dry_run,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(str(device)),
        "provenance": provenance(),
        "kernels": [],
    }
    session.ceilings = measure_ceilings(
        str(device), RATES, seconds=min(1.0, seconds / 100), dry_run=session.dry_run
    )
    session.write()
    gpu = GpuSampler(str(device))
    with gpu, coarse_tiles(device):
        _measure(session, configurations)
    session.document["gpu"] = gpu.summary()
    session.write()
    return session.document


def _measure(session: Session, configurations: Sequence[Configuration]) -> None:
    lists = list_goals.draw_lists(session.shape, session.sizes)
    _kernels(session)
    for configuration in configurations[:_FIRST]:
        _engine(session, configuration, lists)
    _transformers(session, lists)
    _memory(session, configurations)
    _first_rerank(session, configurations)
    for configuration in configurations[_FIRST:]:
        _engine(session, configuration, lists)
    _ratios(session)


def _kernels(session: Session) -> None:
    """At most a quarter of the time: it is four rows."""
    try:
        found, missing, rows = kernel_figures(
            session.shape, session.device, session.output, session.left / 4, session.vllm
        )
    except _LOADING_ERRORS as error:
        session.skip("gate-up", "kernels", f"{type(error).__name__}: {error}")
        return
    session.document["kernels"] = rows
    for one in found:
        session.add(one)
    session.missing += missing
    session.write()


def _engine(session: Session, configuration: Configuration, lists: Sequence[ListWork]) -> None:
    name, shape = configuration.name, session.shape
    keys: tuple[str, ...] = ("decode-step", "prefill-13k")
    if not session.dry_run or configuration in (TRITON, PORTABLE):
        keys = ("decode-step", "rerank-cold", "rerank-seen", "prefill-13k", "vision-20")
    reason = configuration.why_not(session.device)
    if reason is None and session.left <= 0:
        reason = "the time of the whole run was over"
    loaded: LoadedEngine | None = None
    if reason is None:
        try:
            loaded = configuration.load(shape, QUANT, session.device)
        except (*_LOADING_ERRORS, torch.OutOfMemoryError) as error:
            reason = f"{type(error).__name__}: {error}"
    if loaded is None:
        for key in keys:
            session.skip(key, name, reason or "it was not loaded")
        free_memory(session.device)
        return
    with decoding(configuration):
        _figures(session, configuration, loaded, keys, lists)
    del loaded
    free_memory(session.device)


def _figures(
    session: Session,
    configuration: Configuration,
    loaded: LoadedEngine,
    keys: Sequence[str],
    lists: Sequence[ListWork],
) -> None:
    shape, sizes, dry = session.shape, session.sizes, session.dry_run
    formats = formats_of(shape, QUANT)
    work = ModelWork(spec_of(shape), formats, configuration.prefill, configuration.kv)
    common = (loaded, configuration.name, work, session.ceilings)
    measures: dict[str, Callable[[], Figure]] = {
        "decode-step": lambda: engine_goals.decode_step(*common, sizes, dry_run=dry),
        "rerank-cold": lambda: list_goals.rerank(
            *(*common, lists), seen=False, dry_run=dry, ends=session.ends
        ),
        "rerank-seen": lambda: list_goals.rerank(
            *(*common, lists), seen=True, dry_run=dry, ends=session.ends
        ),
        "prefill-13k": lambda: engine_goals.prefill(*common, sizes, dry_run=dry),
        "vision-20": lambda: engine_goals.vision(*common, sizes, dry_run=dry),
    }
    for key in keys:
        session.attempt(key, configuration.name, measures[key])


def _transformers(session: Session, lists: Sequence[ListWork]) -> None:
    """On the same lists as ours; its seconds stand in the document, the ratios come at the end."""
    if session.left <= 0:
        return
    try:
        seconds = list_goals.transformers_seconds(
            session.shape, session.device, lists, ends=session.ends
        )
        session.document["transformers_s"] = seconds
        session.say(f"{list_goals.TRANSFORMERS}: {statistics.median(seconds):.4g} s a list")
    except (*_LOADING_ERRORS, torch.OutOfMemoryError) as error:
        session.document["transformers_error"] = f"{type(error).__name__}: {error}"
    free_memory(session.device)
    session.write()


def _ratios(session: Session) -> None:
    theirs = session.document.get("transformers_s")
    cold = [one for one in session.figures if one["goal"] == "rerank-cold"]
    for ours in cold:
        if theirs:
            session.add(list_goals.against(ours, theirs, dry_run=session.dry_run))
    if not theirs or not cold:
        reason = session.document.get("transformers_error", "there is nothing to compare")
        session.skip("against-transformers", list_goals.TRANSFORMERS, reason)


def _memory(session: Session, configurations: Sequence[Configuration]) -> None:
    for configuration in (TRITON, TRITON_KV8)[: 1 if session.dry_run else 2]:
        if configuration not in configurations:
            continue
        if reason := configuration.why_not(session.device):
            session.skip("memory", configuration.name, reason)
            continue

        def measure(configuration: Configuration = configuration) -> Figure:
            loaded = configuration.load(session.shape, QUANT, session.device)
            return list_goals.memory(
                *(loaded, configuration.name, session.shape, session.sizes), dry_run=session.dry_run
            )

        session.attempt("memory", configuration.name, measure)
        free_memory(session.device)


def _first_rerank(session: Session, configurations: Sequence[Configuration]) -> None:
    """From a folder on disk; kernels are compiled in the first process, cached in the second."""
    on_gpu = session.device.type == "cuda"
    configuration = TRITON if on_gpu and TRITON in configurations else PORTABLE
    pages, written = (2, 2) if session.dry_run else (10, session.sizes.written)
    with tempfile.TemporaryDirectory(dir=session.output.parent, prefix=SCRATCH) as held:
        folder, compiled = Path(held) / "engine", Path(held) / "compiled"
        try:
            write_random_engine(folder, session.shape, QUANT, session.device)
        except _LOADING_ERRORS as error:
            session.skip("first-rerank", configuration.name, f"{type(error).__name__}: {error}")
            return
        free_memory(session.device)
        for state in ("kernels not compiled yet", "kernels compiled before"):
            name = f"{configuration.name}, {state}"

            def measure(name: str = name) -> Figure:
                found = first_rerank.measure(
                    *(folder, str(session.device), configuration.kernels, compiled),
                    pages=pages,
                    written=written,
                )
                imported = [found["import_s"]]
                session.add(figure("import", name, imported, dry_run=session.dry_run))
                return figure(
                    "first-rerank",
                    name,
                    [found["total_s"]],
                    dry_run=session.dry_run,
                    details=dict(found),
                    note="files in the page cache",
                )

            session.attempt("first-rerank", name, measure)
