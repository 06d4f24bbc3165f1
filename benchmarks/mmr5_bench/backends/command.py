"""``mmr5-bench backends``: our engines against ``transformers`` on a CPU, in one run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmr5_bench.backends.names import DEFAULT_SHAPES, SHAPE_NAMES
from mmr5_bench.peers.names import MINI

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmr5_bench.backends.measure import Rounds, Timed
    from mmr5_bench.backends.shapes import Shape
    from mmr5_bench.evidence.document import Entry, Evidence

_PAGES = (5, 10)
_NOTE = (
    "One run, one request at a time, all contenders open at once; round by round, in an order "
    "drawn anew for each. Prompts and steps: everybody has the weights of the int4 engine, "
    "expanded for transformers, and the same tokens; logits are compared in every round. Mini "
    "(4.5 M parameters) is trained, the other shapes have random weights. Whole reranks are of "
    "mini, cold, decoding in full; they say nothing about MM-R5"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options; loads neither torch nor any contender."""
    parser.add_argument(
        "--shapes",
        default=",".join(DEFAULT_SHAPES),
        metavar="NAME,NAME",
        help=f"models that prompts and steps are timed on: some of {', '.join(SHAPE_NAMES)} "
        f"(default: %(default)s); with {MINI} also whole reranks",
    )
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds (%(default)s)")
    parser.add_argument(
        "--prompt-rounds",
        type=int,
        help="rounds in which prompts are timed too: transformers takes a minute for one in "
        "bfloat16 on a CPU without such arithmetic; default: half of --rounds",
    )
    parser.add_argument(
        "--lists", type=int, help="lists per size of whole reranks, 0 for none; default: --rounds"
    )
    parser.add_argument("--threads", type=int, default=2, help="of every contender")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/backends"),
        help="where engine folders are made and kept (%(default)s); remove it after changes of "
        "the export",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON to write")


def run(options: argparse.Namespace) -> int:
    """Runs and prints the table on stderr and the document, without samples, on stdout.

    The document is written after every round. Raises ValueError and Mmr5Error when a contender
    cannot take part or does other work than the reference.
    """
    import torch

    from mmr5_bench.backends.folders import engine_folder
    from mmr5_bench.backends.measure import Rounds
    from mmr5_bench.backends.reranks import QUANTS, measure_reranks
    from mmr5_bench.backends.shapes import SHAPES, shapes_of
    from mmr5_bench.backends.table import backends_table
    from mmr5_runtime.onnx.session import runtime

    lists = options.rounds if options.lists is None else options.lists
    if options.threads < 1 or lists < 0:
        raise ValueError(
            f"--threads {options.threads} --lists {lists}: threads are at least 1, lists at least 0"
        )
    asked = options.prompt_rounds
    plan = Rounds(options.rounds, -(-options.rounds // 2) if asked is None else asked)
    shapes = shapes_of(options.shapes)
    runtime()  # says what is missing before minutes go by
    torch.set_num_threads(options.threads)
    document = _new_document()
    finished: list[Entry] = []
    for shape in shapes:
        _measure(shape, plan, options, document, finished)
        finished = list(document["entries"])
    if lists and any(shape.name == MINI for shape in shapes):
        mini = SHAPES[MINI]
        engines: dict[str, Path] = {
            quant: engine_folder(mini, quant, options.work, _say) for quant in QUANTS
        }
        reranks = measure_reranks(engines, _PAGES, lists, options.seed, _say)
        _write([*finished, *reranks], document, options.output)
    _say(backends_table(document))
    entries: list[Any] = [{**entry, "samples_ms": None} for entry in document["entries"]]
    print(json.dumps({**document, "entries": entries}))
    return 0


def _measure(
    shape: Shape,
    plan: Rounds,
    options: argparse.Namespace,
    document: Evidence,
    finished: Sequence[Entry],
) -> None:
    from mmr5_bench.backends.contenders import contenders
    from mmr5_bench.backends.entries import compared, entries_of
    from mmr5_bench.backends.folders import engine_folder
    from mmr5_bench.backends.measure import measure_shape

    lengths = tuple(sorted({case.behind for case in shape.cases} | {0}))
    room = max(case.tokens for case in shape.cases)
    folder = engine_folder(shape, "int4", options.work, _say)

    def keep(tracks: Sequence[Timed]) -> None:
        entries = compared(entries_of(shape, tracks, options.seed))
        _write([*finished, *entries], document, options.output)

    taking_part = contenders(lengths, room)
    measure_shape(shape, folder, taking_part, plan, options.seed, keep, _say)


def _new_document() -> Evidence:
    from mmr5_bench.backends.machine import instructions, versions
    from mmr5_bench.evidence.document import new_evidence
    from mmr5_bench.evidence.machine import describe_machine

    machine = {**describe_machine(), "flags": instructions()}
    document = new_evidence("Engines for a CPU against transformers", _NOTE, machine)
    document["provenance"] = {**document["provenance"], **versions()}
    return document


def _write(entries: Sequence[Entry], document: Evidence, output: Path) -> None:
    from mmr5_bench.backends.entries import goals_of
    from mmr5_bench.evidence.document import write_evidence

    document["entries"] = list(entries)
    document["verdict"] = goals_of(entries)
    write_evidence(document, output)


def _say(line: str) -> None:
    print(line, file=sys.stderr)
