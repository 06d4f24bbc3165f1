"""Command line to frozen settings; a bad value is one usage error before anything is collected."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

AxisValue = str | int
T = TypeVar("T")

CACHES = ("cold", "warm", "seen")
STOPS = ("determined", "tag", "eos")
THINKS = ("full", "off", "auto")
DEFAULT_ENGINES = {"bf16": "bf16", "int8": "int8", "int4": "int4-gptq"}
ENGINES_FOLDER = Path("build", "mini")  # under pytest's root
MANIFEST = "mmr5_engine.json"  # as in mmr5_runtime.artifact, which would import torch
_LABEL = re.compile(r"([\w.+-]+)=(.+)")


@dataclass(frozen=True)
class Settings:
    """What the options ask for.

    ``engines`` by quantization, ``reference`` the folder whose orders count as right for agreement
    (None: nothing is). ``axes`` has the values of ``pages``, ``cache``, ``stop`` and ``think``;
    ``given`` names the axes (``quant`` too) that were set on the command line. ``ceilings_s`` are
    the seconds spent on each of the machine's ceilings, 0 for none of them; ``slowdown`` is the
    share of its time by which every call is held up.
    """

    engines: Mapping[str, Path]
    reference: Path | None
    axes: Mapping[str, tuple[AxisValue, ...]]
    given: frozenset[str]
    lists: int
    warmup: int
    seed: int
    dtype: str
    device: str
    threads: int | None
    max_new_tokens: int
    ceilings_s: float
    slowdown: float
    allow_machine_diff: bool
    title: str | None
    note: str | None
    journal: Path | None
    json: Path | None


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("mmr5", "rerank benchmarks (mmr5)")
    add = group.addoption
    add(
        "--mmr5-engine",
        metavar="[QUANT=]DIR",
        action="append",
        default=[],
        help="engine folder and what to call it, several times; default: bf16, int8 and int4 of "
        "mini under build/mini, which `make bench-engines` exports",
    )
    add(
        "--mmr5-reference",
        metavar="DIR",
        type=Path,
        help="engine whose orders others are held against; default: the first bf16 one",
    )
    add("--mmr5-pages", metavar="N,N", type=_listed(_count(1)), help="list sizes; default 5,10")
    add(
        "--mmr5-cache",
        metavar="STATE,STATE",
        type=_listed(_choice(CACHES)),
        help="cold: nothing remembered; warm: another question was asked about the same pages; "
        "seen: the prompt was read before, its answer was not kept; default cold,warm",
    )
    add(
        "--mmr5-stop",
        metavar="STOP,STOP",
        type=_listed(_choice(STOPS)),
        help="determined, tag, or eos, which also lifts the mask: plain decoding to the end; "
        "default determined",
    )
    add(
        "--mmr5-think",
        metavar="MODE,MODE",
        type=_listed(_think),
        help="full, off, auto, or a number of tokens; default full",
    )
    add("--mmr5-lists", metavar="N", type=_count(1), default=12, help="lists = rounds of a cell")
    add("--mmr5-warmup", metavar="N", type=_count(0), default=2, help="untimed lists before them")
    add("--mmr5-seed", metavar="N", type=_count(0), default=0, help="which lists are drawn")
    add("--mmr5-dtype", metavar="DTYPE", default="auto", help="compute type, as in Reranker.load")
    add("--mmr5-device", metavar="DEVICE", default="auto", help="device, as in Reranker.load")
    add("--mmr5-threads", metavar="N", type=_count(1), help="CPU threads; default: torch's")
    add(
        "--mmr5-max-new-tokens",
        metavar="N",
        type=_count(1),
        default=512,
        help="most tokens of an answer; random weights write all of them; default 512",
    )
    add(
        "--mmr5-ceilings",
        metavar="SECONDS",
        type=_share,
        default=0.2,
        help="time for each of the machine's ceilings (memory, matrix products); 0 for none",
    )
    add(
        "--mmr5-allow-machine-diff",
        action="store_true",
        help="let --benchmark-compare compare with a recording of another machine",
    )
    add("--mmr5-journal", metavar="FILE", type=Path, help="keeps every finished entry at once")
    add("--mmr5-title", metavar="TEXT", help="title of the evidence")
    add("--mmr5-note", metavar="TEXT", help="what its figures are not")
    # For tests of comparisons: a slowdown that is real.
    add("--mmr5-slowdown", type=_share, default=0.0, help=argparse.SUPPRESS)


def read_settings(config: pytest.Config) -> Settings:
    """Raises pytest.UsageError for engines that were named and are not there."""
    get = config.getoption
    axes: dict[str, tuple[AxisValue, ...]] = {
        "pages": (5, 10),
        "cache": ("cold", "warm"),
        "stop": ("determined",),
        "think": ("full",),
    }
    chosen = {axis: get(f"mmr5_{axis}") for axis in axes if get(f"mmr5_{axis}") is not None}
    named = _named_engines(get("mmr5_engine"))
    folder = config.rootpath / ENGINES_FOLDER
    engines = named or {label: folder / name for label, name in DEFAULT_ENGINES.items()}
    reference: Path | None = get("mmr5_reference")
    if reference is not None and not is_engine(reference):
        raise pytest.UsageError(_absent("--mmr5-reference", reference))
    written = get("benchmark_json", None)
    # An older pytest-benchmark in an environment that does not measure gives the opened file.
    if written is not None and not isinstance(written, str | os.PathLike):
        written = written.name
    json_path = Path(written) if written else None
    journal: Path | None = get("mmr5_journal")
    if journal is None and json_path is not None:
        journal = json_path.with_suffix(".jsonl")
    if journal is not None and journal == json_path:
        raise pytest.UsageError(
            f"{journal} cannot hold both the JSON and the journal; end --benchmark-json in .json, "
            "or pass another --mmr5-journal."
        )
    return Settings(
        engines=engines,
        reference=reference,
        axes={**axes, **chosen},
        given=frozenset(chosen) | (frozenset({"quant"}) if named else frozenset()),
        lists=get("mmr5_lists"),
        warmup=get("mmr5_warmup"),
        seed=get("mmr5_seed"),
        dtype=get("mmr5_dtype"),
        device=get("mmr5_device"),
        threads=get("mmr5_threads"),
        max_new_tokens=get("mmr5_max_new_tokens"),
        ceilings_s=get("mmr5_ceilings"),
        slowdown=get("mmr5_slowdown"),
        allow_machine_diff=get("mmr5_allow_machine_diff"),
        title=get("mmr5_title"),
        note=get("mmr5_note"),
        journal=journal,
        json=json_path,
    )


def is_engine(folder: Path) -> bool:
    """Whether ``folder`` looks like an engine; loading it is what checks it."""
    return (folder / MANIFEST).is_file()


def quant_name(folder: Path) -> str:
    """How an engine was quantized, by its manifest; its folder's name when that does not say."""
    return str(_manifest(folder).get("quant", {}).get("name") or folder.name)


def source_name(folder: Path) -> str:
    """What an engine was exported from, without the folder that lay in."""
    return Path(str(_manifest(folder).get("source", {}).get("name") or folder.name)).name


def _manifest(folder: Path) -> Mapping[str, Any]:
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # Reranker.load says what is wrong with it
        return {}
    return data if isinstance(data, dict) else {}


def _named_engines(texts: Sequence[str]) -> dict[str, Path]:
    engines: dict[str, Path] = {}
    for text in texts:
        match = _LABEL.fullmatch(text)
        folder = Path(match[2] if match else text)
        if not is_engine(folder):
            raise pytest.UsageError(_absent("--mmr5-engine", folder))
        label = match[1] if match else quant_name(folder)
        if label in engines:
            raise pytest.UsageError(
                f"--mmr5-engine {text}: two engines would be called {label}; name them with "
                "QUANT=DIR."
            )
        engines[label] = folder
    return engines


def _absent(option: str, folder: Path) -> str:
    return f"{option}: there is no engine in {folder} ({MANIFEST}); export one with mmr5-export."


def _listed(read: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    def values(text: str) -> tuple[T, ...]:
        return tuple(dict.fromkeys(read(part.strip()) for part in text.split(",")))

    return values


def _count(least: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {least} or more")
        return int(text)

    return count


def _choice(known: Sequence[str]) -> Callable[[str], str]:
    def choice(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(known)}")
        return text

    return choice


def _think(text: str) -> AxisValue:
    if re.fullmatch(r"[1-9]\d*", text):
        return int(text)
    if text not in THINKS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {', '.join(THINKS)}, and no number of tokens"
        )
    return text


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 0 or more")
    return value
