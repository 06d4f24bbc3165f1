# check: ruff and mypy · test: check and the CPU test suite · demo: export mini and rank the sample
# pages · test-gpu: tests that need a CUDA device · bench*: measurements, each with its table ·
# report: one HTML page of the timed ones · bench-gpu: what waits for a GPU.
#
# The environment lives in .venv and is made on first use; one made by hand is used as it is and
# only completed. PY=<interpreter> runs test-gpu on an environment of your own instead.

VENV ?= .venv
PY ?= $(VENV)/bin/python
MINI_ENGINE ?= build/mini-int4
SAMPLES := mmr5_runtime/assets/samples
RESULTS := benchmarks/results/mini-quantization.json
REUSE_RESULTS := benchmarks/results/mini-reuse.json
LATENCY_RESULTS := benchmarks/results/mini-latency.json
PEERS_RESULTS := benchmarks/results/mini-peers.json
PEERS := transformers transformers-sampled transformers-static \
  $(foreach quant,bf16 int8 int4,ours-$(quant) ours-$(quant)-default) \
  tinygemm-g128 bitsandbytes-nf4 bitsandbytes-int8 vllm-bf16 vllm-fp8 vllm-gptq llama.cpp
MINI_ENGINES := $(shell benchmarks/mini-engines.sh --names)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -c constraints-cpu.txt
INPUTS := pyproject.toml constraints.txt constraints-cpu.txt
DEV := $(VENV)/.installed-dev
DEMO := $(VENV)/.installed-demo
# An interpreter given by hand is never installed into.
OWN_ENV := $(if $(filter $(BIN)/python,$(PY)),$(DEV))

# Without it the repository root is on sys.path and the folder kernels/ can be taken for the
# package of that name.
export PYTHONSAFEPATH := 1

.PHONY: check test demo test-gpu bench bench-engines bench-reuse bench-latency bench-peers \
  report bench-gpu
.DEFAULT_GOAL := test

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadfile

demo: $(DEMO)
	$(BIN)/mmr5-export --model mini --quant int4 --backend onnxruntime --output $(MINI_ENGINE) --force
	$(BIN)/mmr5-rerank --engine $(MINI_ENGINE) "$$(cat $(SAMPLES)/question.txt)" $(SAMPLES)/*.png

test-gpu: $(OWN_ENV)
	$(PY) -m pytest -m gpu

bench: $(DEV)
	benchmarks/mini-engines.sh $(BIN)/mmr5-export build/mini
	$(BIN)/mmr5-bench quantization --reference build/mini/bf16 -o $(RESULTS) \
	  $(filter-out build/mini/bf16,$(patsubst %,build/mini/%,$(MINI_ENGINES)))
	$(BIN)/mmr5-bench readme $(RESULTS)

bench-reuse: $(DEV)
	test -d $(MINI_ENGINE) || $(BIN)/mmr5-export --model mini --quant int4 --output $(MINI_ENGINE)
	$(BIN)/mmr5-bench reuse --engine $(MINI_ENGINE) -o $(REUSE_RESULTS)
	$(BIN)/mmr5-bench readme $(REUSE_RESULTS) --readme docs/reuse.md

bench-engines: $(DEV)
	benchmarks/mini-engines.sh $(BIN)/mmr5-export build/mini bf16 int8 int4-gptq

# One thread: mini is too small for more, and two of them wait for each other on a busy machine.
bench-latency: bench-engines
	$(BIN)/python -m pytest benchmarks --benchmark-only --mmr5-threads 1 \
	  --benchmark-json=$(LATENCY_RESULTS)
	$(BIN)/mmr5-bench readme $(LATENCY_RESULTS)

bench-peers: bench-engines
	$(BIN)/mmr5-bench peers --threads 1 --lists 15 $(addprefix --peer ,$(PEERS)) \
	  --engine bf16=build/mini/bf16 --engine int8=build/mini/int8 \
	  --engine int4=build/mini/int4-gptq -o $(PEERS_RESULTS)
	$(BIN)/mmr5-bench readme $(PEERS_RESULTS)

report: $(DEV)
	$(BIN)/mmr5-bench report $(LATENCY_RESULTS) $(PEERS_RESULTS) -o build/report.html

bench-gpu: $(OWN_ENV)
	PYTHON=$(PY) benchmarks/gpu/run.sh --out benchmarks/results/gpu

$(BIN)/python:
	@for python in $(PYTHON) python3 python3.11 python3.12 python3.13; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "$$python -m venv $(VENV)"; $$python -m venv $(VENV) && exit 0; rm -rf $(VENV); \
	  fi; \
	done; \
	echo "No Python >= 3.11 with venv found: install one (Debian: python3-venv), or name it with make PYTHON=/path/to/python." >&2; \
	exit 1

# torch first and alone: what is installed after it then cannot choose another build of it.
$(DEV): $(INPUTS) | $(BIN)/python
	$(PIP) torch==2.13.0
	$(PIP) -e '.[dev]'
	@touch $@

$(DEMO): $(INPUTS) | $(BIN)/python
	$(PIP) torch==2.13.0
	$(PIP) -e '.[export,onnxruntime]'
	@touch $@
