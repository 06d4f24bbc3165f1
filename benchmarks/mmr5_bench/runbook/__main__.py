"""``python -m mmr5_bench.runbook``: the command on a machine where nothing is installed."""

from __future__ import annotations

import sys

from mmr5_bench.runbook.call import main

if __name__ == "__main__":
    raise SystemExit(main(["mmr5_bench.runbook.command", *sys.argv[1:]]))
