#!/bin/sh
# Everything that needs a GPU, in order of importance, from a bare checkout:
#   benchmarks/gpu/run.sh --out results [--minutes 25] [--only reranks peers] [--dry-run]
# Where a command is limited to ten minutes, give --minutes 9 and run it again with the same --out:
# it goes on, first with what was never tried, then with what failed or took too long.
# --archive FILE packs all results into one file, renewed after every step.
# MMR5_COMMIT=$(git describe --always --dirty) names the commit where the checkout travels without
# .git.
set -eu
checkout=$(cd "$(dirname "$0")/../.." && pwd)
export PYTHONPATH="$checkout:$checkout/kernels:$checkout/export:$checkout/benchmarks:$checkout/tests${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m mmr5_bench.runbook "$@"
