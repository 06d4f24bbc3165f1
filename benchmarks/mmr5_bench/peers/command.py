"""``mmr5-bench peers``: our engines and other runtimes on the same lists, in the same run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from mmr5_bench.peers.names import ENGINES, MINI, PEERS, WorkloadName

if TYPE_CHECKING:
    from mmr5_bench.evidence.document import Entry, Evidence
    from mmr5_bench.peers.base import Setting
    from mmr5_bench.peers.workloads import Workload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options; loads neither torch nor any peer."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--checkpoint", help="unquantized Hugging Face folder, or mini (the default)"
    )
    source.add_argument(
        "--random", choices=("7b", "tiny"), help="random weights of a shape instead of a checkpoint"
    )
    parser.add_argument(
        "--engine",
        action="append",
        default=[],
        metavar="QUANT=FOLDER",
        help="engine folder made from the checkpoint, e.g. int4=build/mini-int4; repeatable",
    )
    parser.add_argument(
        "--packed", type=Path, help="folder of mmr5-export --checkpoint-out, for vllm-gptq"
    )
    parser.add_argument("--llama-server", metavar="URL", help="address of a running llama-server")
    parser.add_argument(
        "--workload",
        choices=get_args(WorkloadName),
        help=f"{MINI}: held-out MiniDocs lists with mini's own answers; the others: random pages "
        f"of as many visual tokens as a benchmark's; default {MINI} for mini, mmdocir otherwise",
    )
    parser.add_argument("--pages", type=int, nargs="+", default=[5, 10], help="pages per list")
    parser.add_argument("--lists", type=int, default=20, help="timed lists per size")
    parser.add_argument("--warmup", type=int, default=1, help="lists before them, not timed")
    parser.add_argument(
        "--generated",
        type=int,
        nargs="+",
        help="tokens to write: exactly with --random, at most otherwise; default 30 110 300",
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME",
        help=f"only these contenders, repeatable: {', '.join(PEERS)}",
    )
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="compute type; default bfloat16 on a GPU, float32 on a CPU",
    )
    parser.add_argument("--threads", type=int, help="of torch, on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="begin no list after this time")
    parser.add_argument(
        "--sequential", action="store_true", help="one contender after the other, for memory"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="JSON to write; every answer is added to the .jsonl beside it",
    )


def run(options: argparse.Namespace) -> int:
    """Runs and prints a table on stderr and the summary as one JSON document on stdout.

    0 when something was measured, 1 when every contender was skipped. Raises ValueError and
    Mmr5Error for options and files that cannot be used.
    """
    import torch

    from mmr5_bench.evidence.document import new_evidence
    from mmr5_bench.evidence.machine import describe_machine
    from mmr5_bench.peers.contenders import choose_peers
    from mmr5_bench.peers.journal import journal_path
    from mmr5_bench.peers.run import Plan, run_peers

    journal_path(options.output)  # refuses a name before anything is read
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads {options.threads} is no number of threads; pass 1 or more")
        torch.set_num_threads(options.threads)
    setting = setting_of(options)
    workloads = workloads_of(options, setting)
    plan = Plan(options.lists, options.warmup, options.seconds, options.sequential)
    peers = choose_peers(options.peer)
    evidence = new_evidence(
        *describe(options, setting, workloads), describe_machine(setting.device)
    )
    run_peers(peers, setting, workloads, plan, evidence, options.output, _say)
    _say(table_of(evidence))
    entries: list[Any] = [{**entry, "samples_ms": None} for entry in evidence["entries"]]
    print(json.dumps({**evidence, "entries": entries}))
    return 0 if entries else 1


def setting_of(options: argparse.Namespace) -> Setting:
    """What peers are opened with; ValueError for an engine that is not what it is given as."""
    from mmr5_bench.peers.base import Setting
    from mmr5_bench.peers.checkpoints import check_engines
    from mmr5_export.source import locate
    from mmr5_runtime.compute import resolve_device

    engines: dict[str, Path] = {}
    for given in options.engine:
        quant, equals, folder = given.partition("=")
        if not (quant and equals and folder):
            raise ValueError(f"--engine {given} names no folder; write it as int4=FOLDER")
        if quant not in ENGINES:
            raise ValueError(f"--engine {given}: no contender is {quant}; use {', '.join(ENGINES)}")
        if not Path(folder).is_dir():
            raise ValueError(f"--engine {given}: there is no folder {folder}; export it first")
        engines[quant] = Path(folder)
    if options.random and engines:
        raise ValueError("--random makes its own engines; leave out --engine")
    device = resolve_device(options.device)
    checkpoint = None if options.random else locate(options.checkpoint or MINI).folder
    if checkpoint is not None:
        check_engines(engines, checkpoint)
    gpu = device.type == "cuda"
    return Setting(
        checkpoint=checkpoint,
        engines=engines,
        random=options.random,
        device=str(device),
        dtype=options.dtype or ("bfloat16" if gpu else "float32"),
        seed=options.seed,
        packed=options.packed,
        llama_server=options.llama_server,
    )


def workloads_of(options: argparse.Namespace, setting: Setting) -> list[Workload]:
    """One workload per number of pages and forced length; ValueError for what does not fit."""
    from mmr5_bench.peers.checkpoints import is_mini
    from mmr5_bench.peers.prompts import PromptReader
    from mmr5_bench.peers.workloads import Workload

    if setting.checkpoint is not None:
        reader = PromptReader.from_checkpoint(setting.checkpoint)
    else:
        reader = PromptReader.from_random(options.random)
    mini = setting.checkpoint is not None and is_mini(setting.checkpoint)
    name = options.workload or (MINI if mini else "mmdocir")
    if name == MINI and not mini:
        raise ValueError(f"only mini answers the lists of --workload {MINI}; pass mmdocir")
    lengths: Sequence[int | None] = options.generated or (
        [None] if name == MINI else [30, 110, 300]
    )
    return [
        Workload(name, pages, generated, reader, options.seed, forced=setting.random is not None)
        for pages in options.pages
        for generated in lengths
    ]


def describe(
    options: argparse.Namespace, setting: Setting, workloads: Sequence[Workload]
) -> tuple[str, str]:
    """Title and note of the document: what the figures are of, and what they are not."""
    from mmr5_bench.peers.checkpoints import is_mini

    if setting.random is not None:
        title = f"Runtimes at the {setting.random} shape: random weights, forced length"
        what = "Random weights: time and memory are true to the shape, answers mean nothing."
    elif setting.checkpoint is not None and is_mini(setting.checkpoint):
        title = "Runtimes on mini"
        what = "Mini (4.5 M parameters) on synthetic pages: says nothing about MM-R5."
    else:
        title = f"Runtimes on {setting.checkpoint.name if setting.checkpoint else '?'}"
        what = "Pages of random pixels: time is true, answers are about nothing."
    order = (
        "one contender after the other, each over all lists"
        if options.sequential
        else "every list by all contenders before the next, in a random order"
    )
    tokens = workloads[0].page_tokens
    cells = f" ({tokens:,} visual tokens a page)" if tokens else ""
    return (
        title,
        f"{what} Workload {workloads[0].name}{cells}; {order}; caches cold; one request at a time.",
    )


def table_of(evidence: Evidence) -> str:
    """A line per entry and per contender that was skipped, for people."""
    lines = []
    for entry in evidence["entries"]:
        p50 = entry["latency_ms"]["p50"]
        cells = [
            f"{entry['subject']:<40}",
            f"{entry['name'][6:-1]:<58}",
            f"{len(entry['samples_ms']):>4} lists",
            f"p50 {p50['value']:9.1f} ms [{p50['low']:.1f}, {p50['high']:.1f}]",
            _compared(entry),
        ]
        lines.append("  ".join(cells).rstrip())
    lines += [f"skipped: {one['subject']}: {one['reason']}" for one in evidence.get("skipped", [])]
    return "\n".join(lines)


def _compared(entry: Entry) -> str:
    found: dict[str, Any] = dict(entry)
    parts = []
    if ratios := found.get("ratios"):
        ratio = ratios["p50"]
        parts.append(f"x {ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]")
    quality = found.get("quality", {})
    for metric in ("identical", "order_agreement", "recall@1"):
        if metric in quality:
            parts.append(f"{metric} {quality[metric]['value']:.3f}")
    return "  ".join(parts)


def _say(line: str) -> None:
    print(line, file=sys.stderr)
