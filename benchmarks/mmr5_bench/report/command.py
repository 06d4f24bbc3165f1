"""``mmr5-bench compare`` and ``mmr5-bench report``: options, files in, files out."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

from mmr5_bench.files import write_text
from mmr5_bench.report.rules import EXAMPLES, Rule, parse_rule


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmr5-bench compare``."""
    parser.add_argument("before", type=Path, help="evidence of before, or pytest-benchmark's JSON")
    parser.add_argument("after", type=Path, help="the same of after")
    parser.add_argument(
        "--fail",
        type=_rule,
        action="append",
        default=[],
        metavar="RULE",
        help=f"what fails, repeatable: {EXAMPLES}".replace("%", "%%"),
    )
    parser.add_argument(
        "--allow-machine-diff", action="store_true", help="compare runs of different machines"
    )
    parser.add_argument(
        "--strict", action="store_true", help="fail on what is suspect, not only on what is certain"
    )


def run_compare(options: argparse.Namespace) -> int:
    """Table on stderr, JSON on stdout; 1 when a rule or the pairing failed."""
    from mmr5_bench.evidence.document import load_evidence
    from mmr5_bench.report.compare import compare
    from mmr5_bench.report.markdown import comparison_text

    result = compare(
        load_evidence(options.before),
        load_evidence(options.after),
        options.fail,
        allow_machine_diff=options.allow_machine_diff,
        strict=options.strict,
    )
    print(comparison_text(result), file=sys.stderr)
    print(json.dumps(result))
    return 1 if result["failed"] else 0


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmr5-bench report``."""
    parser.add_argument("files", type=Path, nargs="+", help="evidence, the baseline first")
    parser.add_argument("-o", "--output", type=Path, required=True, help="HTML page to write")
    parser.add_argument(
        "--baseline", type=Path, help="what to compare with; else the first of several files"
    )
    parser.add_argument("--markdown", type=Path, help="the tables for a README or a pull request")
    parser.add_argument(
        "--action-json", type=Path, help="customSmallerIsBetter for github-action-benchmark"
    )


def run_report(options: argparse.Namespace) -> int:
    """Writes what was asked for; the last line on stdout says where it is."""
    from mmr5_bench.evidence.document import load_evidence
    from mmr5_bench.report.action import action_results
    from mmr5_bench.report.markdown import markdown_report
    from mmr5_bench.report.material import Source, gather
    from mmr5_bench.report.page import render_page

    def source(path: Path) -> Source:
        evidence = load_evidence(path)
        return Source(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), evidence)

    baseline = source(options.baseline) if options.baseline else None
    material = gather([source(path) for path in options.files], baseline)
    written = {"html": options.output}
    write_text(render_page(material), options.output)
    if options.markdown:
        written["markdown"] = options.markdown
        write_text(markdown_report(material), options.markdown)
    if options.action_json:
        written["action_json"] = options.action_json
        write_text(json.dumps(action_results(material), indent=1) + "\n", options.action_json)
    for path in written.values():
        print(f"{path}: {path.stat().st_size:,} bytes", file=sys.stderr)
    print(
        json.dumps(
            {
                "kind": "mmr5-report",
                "files": len(material.sources),
                "entries": len(material.views),
                **{name: str(path) for name, path in written.items()},
            }
        )
    )
    return 0


def _rule(text: str) -> Rule:
    try:
        return parse_rule(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
