"""Runs one command of ``mmr5-bench`` by its module, on a machine where nothing is installed.

    python -m mmr5_bench.runbook.call mmr5_bench.random_command --shape tiny -o random.json

A termination arrives as an interruption, so that a command which is stopped from outside keeps
what it measured, as it does at Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from mmr5_bench.runbook.bounded import terminations_interrupt
from mmr5_runtime.types import Mmr5Error


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 1 an error in one line on stderr, 2 usage, 130 interrupted."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not given:
        print("usage: python -m mmr5_bench.runbook.call MODULE [OPTIONS]", file=sys.stderr)
        return 2
    command = importlib.import_module(given[0])
    parser = argparse.ArgumentParser(prog=given[0], description=command.__doc__)
    command.add_arguments(parser)
    options = parser.parse_args(given[1:])
    try:
        with terminations_interrupt():
            return int(command.run(options))
    except (Mmr5Error, ValueError, OSError) as error:
        print(f"{given[0]}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{given[0]}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
