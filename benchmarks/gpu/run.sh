#!/bin/sh
# Everything that needs a GPU, in order of importance, from a bare checkout:
#   benchmarks/gpu/run.sh --out results [--minutes 25] [--only reranks peers] [--dry-run]
set -eu
checkout=$(cd "$(dirname "$0")/../.." && pwd)
export PYTHONPATH="$checkout:$checkout/kernels:$checkout/export:$checkout/benchmarks:$checkout/tests${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m mmr5_bench.runbook "$@"
