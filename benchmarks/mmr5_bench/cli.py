"""``mmr5-bench``: every measurement, comparison and report, by command.

A command is two functions of a module that imports nothing heavy: one adds its arguments, one runs
it. What it shows people goes to stderr; the last line on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmr5_bench import commands
from mmr5_bench import kernels_command as kernels
from mmr5_bench import latency_command as latency
from mmr5_bench import mteb_command as mteb
from mmr5_bench import prove_command as prove
from mmr5_bench import random_command as random
from mmr5_bench import targets_command as targets
from mmr5_bench.backends import command as backends
from mmr5_bench.mmdocir import command as mmdocir
from mmr5_bench.peers import command as peers
from mmr5_bench.report import command as report
from mmr5_bench.runbook import command as runbook
from mmr5_runtime.types import Mmr5Error


@dataclass(frozen=True)
class Command:
    """One command: ``run`` returns 0 done, 1 an error or a failed comparison."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS = (
    Command(
        "latency",
        "engines on held-out lists, timed",
        latency.add_arguments,
        latency.run,
    ),
    Command("accuracy", "held-out MiniDocs lists", commands.add_accuracy, commands.run_accuracy),
    Command("mmdocir", "the official MMDocIR protocol", mmdocir.add_arguments, mmdocir.run),
    Command("mteb", "a reranking task of MTEB", mteb.add_arguments, mteb.run),
    Command("targets", "the GPU engine's targets, all of them", targets.add_arguments, targets.run),
    Command(
        "kernels",
        "every kernel against its floor, and others' kernels",
        kernels.add_arguments,
        kernels.run,
    ),
    Command("prove", "which kernels are right on this GPU", prove.add_arguments, prove.run),
    Command(
        "backends",
        "engines for a CPU against transformers, in one run",
        backends.add_arguments,
        backends.run,
    ),
    Command("peers", "others on the same work, in the same run", peers.add_arguments, peers.run),
    Command(
        "random",
        "whole reranks at a shape, random weights",
        random.add_arguments,
        random.run,
    ),
    Command("runbook", "everything that waits for a GPU", runbook.add_arguments, runbook.run),
    Command(
        "compare",
        "two recordings; fails on a regression",
        report.add_compare_arguments,
        report.run_compare,
    ),
    Command(
        "report", "one HTML page of recordings", report.add_report_arguments, report.run_report
    ),
    Command(
        "quantization",
        "what quantizing costs, list by list",
        commands.add_quantization,
        commands.run_quantization,
    ),
    Command(
        "reuse",
        "what early stopping and reuse save and cost",
        commands.add_reuse,
        commands.run_reuse,
    ),
    Command("readme", "write a table into the README", commands.add_readme, commands.run_readme),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 done, 1 an error in one line on stderr or a failed comparison, 2 usage."""
    options = _parser().parse_args(argv)
    try:
        return int(options.run(options))
    except (Mmr5Error, ValueError, OSError) as error:
        print(f"mmr5-bench: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mmr5-bench: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmr5-bench", description="Measure engines.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.help)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser
