# `make demo` and `make test` set up what they need in .venv and are safe to repeat.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo
# A file of tests is run by one process, several files side by side; each process takes about 1.5 GB.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Counting the lines that the tests run costs little from Python 3.12 on; before, only COVERAGE=1 does it, as in .ci/run.
MONITORS := $(shell $(PYTHON) -c 'import sys; print(*[1] * (sys.version_info >= (3, 12)))')
COVERAGE ?= $(MONITORS)
COUNTED := --cov=tinyllama_hf --cov=tinyllama_hf_cli --cov-report=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-upstream lint format clean

help:  ## Show the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.installed  ## Create .venv and install the package with everything that the tests and the demo need.

# torch comes first: asked for by name and version, the index offers the CPU build where there is one, while a range
# asked for by another package may draw gigabytes of CUDA libraries.
$(VENV)/.installed: pyproject.toml setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[all,dev]'
	@touch $@

demo: setup  ## From a corpus to a chat model on a local Hub with its run report, in runs/demo (about 15 minutes).
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.local_hub --storage $(RUN)/hub -- sh recipes/demo/demo.sh $(RUN)

test: setup  ## Run the fast tests.
	$(if $(MONITORS),COVERAGE_CORE=sysmon) $(PYTEST) $(if $(COVERAGE),$(COUNTED)) -m "not slow"
	@$(if $(COVERAGE),echo "lines run in the test processes: $$($(BIN)/python -m coverage report --format=total)%")

test-slow: setup  ## Run the slow tests, including the whole demo.
	$(PYTEST) -m slow

test-upstream: setup  ## Run transformers' own model tests on our class and on stock Llama; FROM=CHECKOUT completes them.
	folder="$$($(BIN)/python tests/upstream/fetch.py $(if $(FROM),--from "$(FROM)"))" && TRANSFORMERS_TESTS="$$folder" \
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal tests/upstream

lint: setup  ## Check style, types and spelling.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: setup  ## Fix style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove all build output, including .venv and runs.
	rm -rf $(VENV) build dist *.egg-info runs
