# Everything builds and uses .venv in this checkout. `make` alone lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench gpu-check lint format docs kernel-report clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1|\2/' | column -t -s '|'

setup: $(STAMP)  ## create .venv and install the project with its development tools (quick when up to date)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' || { \
	    echo "error: $(PYTHON) is `$(PYTHON) -V 2>&1`; Python 3.10 to 3.13 is needed: make setup PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints-dev.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-dev.txt -e '.[dev,docs]'
	@touch $@

demo: setup  ## simulate a community, pretrain, fine-tune, predict and write a report, in minutes
	$(BIN)/python -m aam.train demo

test: setup  ## run all tests; each benchmark runs once and checks its numbers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests benchmarks -n 2 $(ARGS)

bench: setup  ## time everything against its baselines (10 minutes on 2 cores)
	$(BIN)/python -m pytest benchmarks --benchmark $(ARGS)

gpu-check:  ## check and time everything on this machine's GPU, with the torch of PYTHON=... (8 minutes)
	@$(PYTHON) -m benchmarks.gpu_check $(ARGS)

lint: setup  ## ruff, mypy and the floors of the house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: setup  ## format and apply safe fixes
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

docs: setup  ## build the documentation into site/
	$(BIN)/python docs/build.py site

kernel-report: setup  ## compile what has changed in the Triton kernels, and write profiling/kernel_report.json
	$(BIN)/python -m profiling.kernel_report --write

clean:  ## remove build products, keep .venv and runs/
	rm -rf build dist site benchmarks/results .pytest_cache .ruff_cache .mypy_cache .hypothesis
