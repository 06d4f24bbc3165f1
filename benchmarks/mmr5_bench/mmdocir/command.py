"""``mmr5-bench mmdocir``: freeze candidates, run an engine over them, read and compare results."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmr5_bench.mmdocir.records import Record

EVERY = 10  # questions between two lines of progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``freeze``, ``run`` and ``summary``."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="mmdocir")
    _add_freeze(commands.add_parser("freeze", help="candidate lists from a first stage's scores"))
    _add_run(commands.add_parser("run", help="rerank every question; goes on where it stopped"))
    summary = commands.add_parser("summary", help="figures of a run, or of two on equal lists")
    summary.add_argument("results", type=Path, help="output of `run`")
    summary.add_argument("--against", type=Path, help="output of a run of the reference engine")
    summary.add_argument("--evidence", type=Path, help="also write an evidence file for reports")


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="folder of the MMDocIR download")
    parser.add_argument("--annotations", type=Path, help="annotation file, if not in that folder")


def _add_freeze(parser: argparse.ArgumentParser) -> None:
    _add_data(parser)
    parser.add_argument(
        "--scores",
        type=Path,
        required=True,
        help='JSON lines {"question": id, "scores": [one per page of its document]}',
    )
    parser.add_argument("--first-stage", help="its name in results (default: name of the file)")
    parser.add_argument("--depth", type=int, default=20, help="pages kept (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON to write")


def _add_run(parser: argparse.ArgumentParser) -> None:
    _add_data(parser)
    parser.add_argument("--candidates", type=Path, required=True, help="file of `freeze`")
    parser.add_argument("--engine", type=Path, required=True, help="engine folder")
    parser.add_argument("--reference", type=Path, help="results to compare with, of equal lists")
    parser.add_argument("--k", type=int, default=10, help="candidates (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only the first questions")
    parser.add_argument("--top-k", type=int, help="stop once so many places are known")
    parser.add_argument("--stop", choices=("determined", "tag", "eos"), default="determined")
    parser.add_argument("--think", type=_think, default="full", help="full, off, auto or tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--seed", type=int, help="needed to sample")
    parser.add_argument("--max-new-tokens", type=int, default=2048)
    parser.add_argument(
        "--plan",
        choices=("single", "auto", "sliding", "anchored", "tournament", "cascade"),
        default="single",
        help="single (default): a list that does not fit the context is an error",
    )
    parser.add_argument("--min-pixels", type=int, help="instead of the engine's")
    parser.add_argument("--max-pixels", type=int, help="instead of the engine's")
    parser.add_argument("--profile", help="prompts instead of the engine's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    parser.add_argument(
        "--cache",
        choices=("off", "on"),
        default="off",
        help="on: pages are remembered between questions, as in a service (default: off)",
    )
    parser.add_argument("--no-text", action="store_true", help="keep only hashes of the replies")
    parser.add_argument("--evidence", type=Path, help="also write an evidence file for reports")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="JSON to write; the .jsonl beside it keeps finished questions for the next run",
    )


def _think(text: str) -> str | int:
    if text in ("full", "off", "auto"):
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither full, off, auto nor a number of tokens"
        ) from None


def run(options: argparse.Namespace) -> int:
    """Runs the chosen command; ValueError, OSError or Mmr5Error for what went wrong.

    1 when not a single question could be asked, 130 after Ctrl-C.
    """
    commands = {"freeze": _freeze, "run": _run, "summary": _summary}
    try:
        return commands[options.mmdocir](options)
    except KeyboardInterrupt:
        _say("interrupted; finished questions are kept, and the same command goes on from them")
        return 130


def _freeze(options: argparse.Namespace) -> int:
    from mmr5_bench.mmdocir.annotations import find_annotations, read_annotations
    from mmr5_bench.mmdocir.candidates import from_scores

    annotations = read_annotations(options.annotations or find_annotations(options.data))
    name = options.scores.stem if options.first_stage is None else options.first_stage
    candidates = from_scores(options.scores, annotations, first_stage=name, depth=options.depth)
    candidates.save(options.output)
    _say(f"{options.output}: {len(candidates.lists)} lists of up to {candidates.depth} pages")
    frozen = {
        "kind": "mmdocir-candidates",
        "output": str(options.output),
        "sha256": candidates.sha256,
        "dataset_sha256": candidates.dataset_sha256,
        "published": annotations.published,
        "first_stage": candidates.first_stage,
        "depth": candidates.depth,
        "questions": len(candidates.lists),
    }
    print(json.dumps(frozen))
    return 0


def _run(options: argparse.Namespace) -> int:
    import torch

    from mmr5_bench.files import write_json
    from mmr5_bench.mmdocir.results import check_alike, load_results, results_document
    from mmr5_bench.mmdocir.run import run as run_work
    from mmr5_bench.mmdocir.work import Options, open_work

    if options.output.suffix == ".jsonl":
        raise ValueError(f"{options.output} is where finished questions go; name a .json")
    fields = {name: getattr(options, name) for name in Options.__dataclass_fields__}
    reference = load_results(options.reference) if options.reference else None
    work = open_work(
        options.data, options.candidates, options.engine, Options(**fields), options.annotations
    )
    journal = options.output.with_suffix(".jsonl")
    if reference is not None:  # before hours of work, not after
        check_alike(work.identity, len(work.questions), reference)
    try:
        records = run_work(work, journal, keep_text=not options.no_text, progress=_progress)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ValueError(
            "the model or a list does not fit into memory; lower --max-pixels or --k (finished "
            "questions are kept)"
        ) from error
    document = results_document(work, records)
    write_json(document, options.output)  # whatever becomes of the summary
    _summarise(document, reference)
    write_json(document, options.output)
    return _finish(document, options.evidence)


def _summary(options: argparse.Namespace) -> int:
    from mmr5_bench.mmdocir.results import load_results

    against = load_results(options.against) if options.against else None
    document = load_results(options.results)
    _summarise(document, against)
    return _finish(document, options.evidence)


def _summarise(document: dict[str, Any], reference: dict[str, Any] | None) -> None:
    from mmr5_bench.mmdocir.summary import summarise

    document["summary"] = summarise(document, reference)


def _finish(document: dict[str, Any], evidence: Path | None) -> int:
    """Prints the summary, then writes the evidence; 1 when not a question was answered."""
    from mmr5_bench.evidence.document import write_evidence
    from mmr5_bench.mmdocir.evidence_entry import evidence_of
    from mmr5_bench.mmdocir.table import table_of

    _say(table_of(document))
    print(json.dumps({**document, "records": None}), flush=True)
    if document["summary"]["failed"] == document["summary"]["questions"]:
        _say("not one question could be asked; see the errors above")
        if evidence is not None:
            _say(f"{evidence} was not written: there is nothing to report")
        return 1
    if evidence is not None:
        write_evidence(evidence_of(document), evidence)
    return 0


def _progress(done: int, total: int, record: Record | None) -> None:
    if record is not None and record["error"] is not None:
        _say(f"question {record['question']}: {record['error']['message']}")
    if record is None or done % EVERY == 0 or done == total:
        _say(f"{done} of {total} questions")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
