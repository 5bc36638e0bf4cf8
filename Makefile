# Everything runs in .venv, made by any Python >= 3.11 that has its venv module; uv, from PyPI, fills it.
#
#   make run ARGS="--help"               the daemon
#   make test                            lint, types and every test; make test ARGS="tests/unit -k regulator" for some
#   make run PYTHON=python3.12           with another Python
#   UV_TORCH_BACKEND=cpu make run        torch without CUDA, 200 MB in place of 3 GB

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
# --python: else uv fills whichever environment happens to be activated.
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable

# Where this is set, as on some build machines, every process would compile all of torch anew.
export PYTHONDONTWRITEBYTECODE :=

QUICK := $(if $(filter 1,$(HOMEOSTAT_CHAOS)),,-m "not slow")

.PHONY: help run test lint bench bench-auto bench-detect bench-fast bench-http bench-kafka bench-slow errors clean

help:
	@sed -n 's/^#   //p' Makefile

run: .venv/.installed
	$(BIN)/homeostat run $(ARGS)

# Tests that start processes and brokers come after the others and one at a time: they have deadlines. Those marked slow,
# and those that kill workers and brokers again and again, take longer than a person waits, and are asked for:
# HOMEOSTAT_CHAOS=1 make test, as CI does.
test: lint
ifeq ($(ARGS),)
	$(BIN)/python -m pytest -q -n 2 $(QUICK) --ignore tests/integration --ignore tests/chaos
	$(BIN)/python -m pytest -q $(QUICK) tests/integration $(if $(QUICK),,tests/chaos)
else
	$(BIN)/python -m pytest -q -n 2 $(ARGS)
endif

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.installed-dev
	$(BIN)/python -m tests.benchmarks $(ARGS)

bench-auto: .venv/.installed-dev
	$(BIN)/python -m tests.benchmarks.auto $(ARGS)

bench-detect: .venv/.installed-frouros
	$(BIN)/python -m tests.benchmarks.detect $(ARGS)

bench-fast: .venv/.installed-dev
	$(BIN)/python -m tests.benchmarks.fast $(ARGS)

bench-http: .venv/.installed-dev
	$(BIN)/python -m tests.benchmarks.http $(ARGS)

bench-kafka: .venv/.installed-quix
	$(BIN)/python -m tests.benchmarks.kafka $(ARGS)

bench-slow: .venv/.installed-dev
	$(BIN)/python -m tests.benchmarks.slow $(ARGS)

errors: .venv/.installed-dev
	$(BIN)/python -m tests.benchmarks.errors $(ARGS)

# The stamps go too, so that the next call installs what is missing; .venv stays, rm -rf it for a fresh one.
clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f .venv/.installed .venv/.installed-dev .venv/.installed-frouros .venv/.installed-quix
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml constraints.txt | $(BIN)/uv
	$(INSTALL) .
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | $(BIN)/uv
	$(INSTALL) '.[dev]'
	@touch $@

# --no-deps: it asks for numpy < 2.2, but runs with newer ones; scipy comes with river, and tqdm is all else it imports.
.venv/.installed-frouros: .venv/.installed-dev
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps frouros==0.9.0 tqdm==4.70.1 && touch $@ || \
	  echo >&2 'frouros could not be installed: the tables are made without it'

# In a folder of its own: it wants an older pydantic than the daemon runs with.
.venv/.installed-quix: .venv/.installed-dev
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target .venv/quix quixstreams==3.28.1 && touch $@ || \
	  echo >&2 'Quix Streams could not be installed: the tables are made without it'

$(BIN)/uv: | $(BIN)/python
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo >&2 '$(PYTHON) is missing or older than 3.11: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.11'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo >&2 '$(PYTHON) has no venv module: install it (Debian, Ubuntu: apt-get install python3-venv)'; exit 1; }
	$(PYTHON) -m venv .venv
