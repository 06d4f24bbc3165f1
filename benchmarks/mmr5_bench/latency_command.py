"""``mmr5-bench latency``: the plugin's measurement without a test of one's own.

Runs pytest on the full product of the options and turns its recording into an evidence document,
so that there is one loop that measures and not two.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_AXES = {
    "pages": "list sizes",
    "cache": "cold, warm (pages seen), seen (prompt seen)",
    "stop": "determined, tag, eos",
    "think": "full, off, auto, or tokens",
}
_PASSED_ON = {
    "lists": "lists = rounds of a cell (12)",
    "warmup": "untimed lists before them (2)",
    "seed": "which lists are drawn (0)",
    "dtype": "compute type, as in Reranker.load",
    "device": "device, as in Reranker.load",
    "threads": "CPU threads; torch's unless given",
    "max-new-tokens": "most tokens of an answer (512)",
    "ceilings": "seconds for each of the machine's ceilings, 0 for none (0.2)",
    "reference": "engine folder that orders are held against; the bf16 one unless given",
    "title": "title of the evidence",
    "note": "what its figures are not",
}
_INTERRUPTED = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "engines",
        nargs="*",
        metavar="[QUANT=]DIR",
        help="engine folders; bf16, int8 and int4 of mini under build/mini unless given "
        "(make bench-engines exports them)",
    )
    for axis, meaning in _AXES.items():
        parser.add_argument(f"--{axis}", metavar="VALUE,VALUE", help=meaning)
    for option, meaning in _PASSED_ON.items():
        parser.add_argument(f"--{option}", metavar="VALUE", help=meaning)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON to write")


def run(options: argparse.Namespace) -> int:
    from mmr5_bench.evidence.document import load_evidence, write_evidence

    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        recording = Path(folder, "recording.json")
        # The journal stays beside the output: it has what was finished when a run is killed.
        passed = [f"--mmr5-journal={options.output.with_suffix('.jsonl')}"]
        passed += [f"--mmr5-engine={engine}" for engine in options.engines]
        for name in (*_AXES, *_PASSED_ON):
            if (value := getattr(options, name.replace("-", "_"))) is not None:
                passed.append(f"--mmr5-{name}={value}")
        code = _pytest(["--benchmark-only", f"--benchmark-json={recording}", *passed])
        if not recording.is_file():
            raise ValueError("nothing was measured; what pytest says above tells why")
        evidence = load_evidence(recording)
    evidence["provenance"]["command"] = " ".join(["mmr5-bench", *sys.argv[1:]])
    write_evidence(evidence, options.output)
    rows = [
        {"name": e["name"], "subject": e["subject"], "latency_ms": e["latency_ms"]}
        for e in evidence["entries"]
    ]
    print(json.dumps({**evidence, "entries": rows}))
    return 130 if code == _INTERRUPTED else int(code != 0)


def _pytest(arguments: list[str]) -> int:
    """What it prints goes to stderr: the last line on stdout is ours."""
    suite = Path(__file__).parent / "plugin" / "any_cell.py"
    # No settings of the project that happens to lie around, and no bytecode or cache left in it.
    fixed = ["-c", os.devnull, f"--rootdir={Path.cwd()}", "-p", "no:cacheprovider", "-q"]
    command = [sys.executable, "-m", "pytest", *fixed, *arguments, str(suite)]
    from mmr5_bench.runbook.bounded import terminations_interrupt

    # In a session of its own it is told once, by us, whatever reached us; it writes what it has.
    started = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
    with terminations_interrupt(), started as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            return process.wait()
