# Everything builds and uses .venv in this checkout. `make` alone lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
NATIVE := build/native
LOCK   := $(if $(shell command -v flock),flock build/native.lock)

.DEFAULT_GOAL := help
.PHONY: help setup native wheel demo test faults sanitize bench gpu-check lint format docs kernel-report clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1|\2/' | column -t -s '|'

setup: $(STAMP) native  ## create .venv and install the project with its development tools (quick when up to date)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' || { \
	    echo "error: $(PYTHON) is `$(PYTHON) -V 2>&1`; Python 3.10 to 3.13 is needed: make setup PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints-dev.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-dev.txt -e '.[dev,docs]'
	@touch $@

# The extension lies beside the Python files it belongs to; objects in build/. cmake and ninja come
# with the development tools. Where there is no compiler everything else still works.
native: $(STAMP)  ## compile the CPU kernels into aam_kernels/ (seconds after a change)
	@mkdir -p build
	@if command -v "$${CXX:-c++}" >/dev/null; then $(LOCK) $(MAKE) --no-print-directory $(NATIVE)/build.ninja && \
	    $(LOCK) $(BIN)/cmake --build $(NATIVE) -j 2 -- --quiet; \
	else echo "no C++ compiler (c++ or CXX): the CPU kernels are not built, torch's own serve instead"; fi

$(NATIVE)/build.ninja: aam_kernels/native/CMakeLists.txt $(STAMP)
	@PATH="$(abspath $(BIN)):$$PATH" cmake -G Ninja -S aam_kernels/native -B $(NATIVE) --log-level=WARNING \
	    -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DAAM_OUTPUT=$(abspath aam_kernels) >/dev/null
	@touch $@

wheel: setup  ## build a wheel into dist/ that runs on older processors too
	@rm -rf build/wheel-* build/wheels
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheels .
	AAM_REQUIRE_TOOLS=1 AAM_NATIVE_BUILD="$$(echo build/wheel-*)" $(BIN)/python -m pytest -q tests/kernels/native/test_objects.py
	@if [ "$$(uname)" = Linux ]; then PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --only-plat --wheel-dir dist build/wheels/*.whl; \
	else mkdir -p dist && cp build/wheels/*.whl dist; fi

demo: setup  ## simulate a community, pretrain, fine-tune, predict and write a report, in minutes
	$(BIN)/python -m aam.train demo

test: setup  ## run all tests; each benchmark runs once and checks its numbers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests benchmarks -n 2 $(ARGS)

faults: setup  ## kill small runs at random moments and continue them: nothing may be lost (a quarter of an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s tests/faults/kills.py $(ARGS)

sanitize: $(STAMP)  ## run the kernels' C++ tests under sanitizers: addresses, undefined behaviour, data races (minutes)
	@for sanitizers in address,undefined thread; do \
	    PATH="$(abspath $(BIN)):$$PATH" cmake -G Ninja -S tests/native -B build/sanitize-$$sanitizers --log-level=WARNING \
	        -DAAM_SANITIZE=$$sanitizers >/dev/null && $(BIN)/cmake --build build/sanitize-$$sanitizers -j 2 -- --quiet && \
	    for tests in native_tests thread_tests; do \
	        echo "$$tests with -fsanitize=$$sanitizers"; build/sanitize-$$sanitizers/$$tests || exit 1; done || exit 1; done

bench: setup  ## time everything against its baselines (half an hour on 2 cores; ARGS="-m kernels": 2 minutes)
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
