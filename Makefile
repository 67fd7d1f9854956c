# Everything runs in a virtual environment of its own, .venv, made on first use.

PYTHON ?= python3
BIN := .venv/bin
TESTS ?= tests
FUZZ ?= models data_sets conversations
SECONDS ?= 600

.PHONY: help setup quickstart test test-online test-llama fuzz check fix docs clean

help:  ## Show what can be made
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: .venv/installed  ## Make the virtual environment and install into it

quickstart: setup  ## Make a small language model from Python's documentation, offline
	$(BIN)/nope quickstart

test: setup  ## Run the tests
	$(BIN)/python -m pytest $(PYTEST) $(TESTS)

test-online: setup  ## First contact with the real Hub: both published models
	$(BIN)/python -m pytest -m online $(PYTEST) $(TESTS)

test-llama: setup  ## Install llama.cpp, which compiles for minutes, and run the tests that need it
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt llama-cpp-python
	$(BIN)/python -m pytest -m llama $(PYTEST) $(TESTS)

fuzz: setup  ## Install atheris, and damage what is read for SECONDS=600 each: FUZZ="models data_sets"
	$(BIN)/pip install --quiet --disable-pip-version-check atheris
	mkdir -p .cache/fuzz
	for name in $(FUZZ); do (cd .cache/fuzz && ../../$(BIN)/python ../../fuzz/$$name.py -max_total_time=$(SECONDS)) || exit 1; done

check: setup  ## Lint, check types and see that the generated docs are fresh
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python docs/build_cli.py --check

fix: setup  ## Mend what the linter and formatter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: setup  ## Write the generated docs
	$(BIN)/python docs/build_cli.py

clean:  ## Remove the virtual environment and caches
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
