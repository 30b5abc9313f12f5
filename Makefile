# `make demo` and `make test` set everything up themselves; CONTRIBUTING.md names what the machine must have.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON := $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2> /dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.ready
WORKERS := 2# tests run side by side, one file at a time each
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo check test lint docs bench-recovery bench-demo bench-compression bench-export bench-scale bench-studies bench-orchestration drill setup

demo: $(READY)
	$(BIN)/edgepress run demo

# While editing: what is known in three minutes on two cores.
check: $(READY) lint
	$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow'

test: $(READY) lint
	$(BIN)/python -m pytest -n $(WORKERS) --durations=10

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy

# Writes build/site; a link that leads nowhere is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench-scale: $(READY)
	$(BIN)/python -m tests.benchmarks.bench_scale

bench-demo: $(READY)
	$(BIN)/python -m tests.benchmarks.bench_demo

# About an hour on two cores; ../shared/bench is the developers', everyone has the reference model.
BENCH := $(wildcard ../shared/bench)
bench-compression: $(READY)
	$(BIN)/python -m tests.benchmarks.bench_compression
	$(if $(BENCH),$(BIN)/python -m tests.benchmarks.bench_compression --bench $(BENCH))
	$(BIN)/python -m tests.benchmarks.bench_compression --at-size

bench-recovery: $(READY)
	$(BIN)/python -m tests.benchmarks.bench_recovery

# About 40 minutes on two cores.
bench-studies: $(READY)
	$(BIN)/python -m tests.benchmarks.bench_studies

bench-export: $(READY)
	$(BIN)/python -m tests.benchmarks.bench_export
	$(if $(BENCH),$(BIN)/python -m tests.benchmarks.bench_export --bench $(BENCH))

bench-orchestration: $(READY)
	$(BIN)/python -m tests.benchmarks.bench_orchestration

# About a quarter of an hour on two quiet cores. Checkpoints are more frequent than in the demo, or a kill would cost a whole training.
drill: $(READY)
	$(BIN)/python -m tests.drill --page --kills 30 --seed 0 --set stages.distilled.save_every=20 --set stages.tuned.save_every=10

setup: $(READY)

# torch goes first and pinned: a looser request pulls several GB of CUDA packages. llama-cpp-python is built from source here, once.
$(READY): pyproject.toml constraints.txt
	$(if $(PYTHON),,$(error edgepress needs python3.11, or a python3 from 3.11 to 3.13))
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
