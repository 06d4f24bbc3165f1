"""The ``mmr5-export`` command."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mmr5_export.source import DEFAULT_MODEL, MINI
from mmr5_runtime.types import Mmr5Error

_STAGES = {"hash": "hashing the checkpoint", "write": "writing tensors"}


def parser() -> argparse.ArgumentParser:
    """The command line as documented by ``--help``."""
    made = argparse.ArgumentParser(
        prog="mmr5-export",
        description="Turn a Qwen2.5-VL checkpoint into an engine folder for mmr5-rerank.",
    )
    made.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=f"checkpoint folder, {MINI} (ships with the package) or hub id (default: %(default)s)",
    )
    made.add_argument("--revision", help="branch, tag or commit of a hub id")
    made.add_argument(
        "--quant",
        choices=("bf16", "int8", "int4"),
        default="int4",
        help="how decoder linears are stored; the rest is bf16 (default: %(default)s)",
    )
    made.add_argument("--output", required=True, type=Path, help="engine folder to create")
    made.add_argument("--force", action="store_true", help="replace an engine folder at --output")
    made.add_argument(
        "--min-pixels", type=int, help="least pixels of a page (default: the model's)"
    )
    made.add_argument("--max-pixels", type=int, help="most pixels of a page (default: the model's)")
    made.add_argument("--json", action="store_true", help="print one JSON document as last line")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 after an error, 130 after Ctrl-C.

    A wrong usage leaves through argparse with status 2.
    """
    options = parser().parse_args(arguments)
    try:
        _export(options)
    except Mmr5Error as error:
        print(f"mmr5-export: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mmr5-export: interrupted; no unfinished engine was kept.", file=sys.stderr)
        return 130
    return 0


def _export(options: argparse.Namespace) -> None:
    # Imported late: they load torch, which --help and a wrong usage need not wait for.
    from mmr5_export.pipeline import export
    from mmr5_export.verify import export_document, summarize_sqnr

    started = time.perf_counter()
    with _progress() as progress:
        manifest = export(
            options.model,
            options.quant,
            options.output,
            revision=options.revision,
            force=options.force,
            min_pixels=options.min_pixels,
            max_pixels=options.max_pixels,
            progress=progress,
        )
    seconds = time.perf_counter() - started
    print(
        f"{options.output}: {manifest.source.name} as {options.quant}, "
        f"{manifest.num_bytes / 1e6:,.1f} MB in {seconds:.1f} s"
    )
    if summary := summarize_sqnr(manifest):
        print(
            f"SQNR of {summary.layers} quantized linears: median {summary.median_db:.1f} dB, "
            f"lowest {summary.lowest_db:.1f} dB ({summary.lowest_layer})"
        )
    if options.json:
        print(json.dumps(export_document(manifest, options.output, seconds)))


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A rich progress bar on a terminal where rich is installed, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda stage, done, total: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        tasks = {name: bar.add_task(text, total=None) for name, text in _STAGES.items()}

        def show(stage: str, done: int, total: int) -> None:
            bar.update(tasks[stage], completed=done, total=total)

        yield show


if __name__ == "__main__":
    sys.exit(main())
