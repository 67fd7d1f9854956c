# Everything runs in a virtual environment of its own, .venv, made on first use.

PYTHON ?= python3
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CONSTRAINTS ?= constraints.txt
TESTS ?= tests
JOBS ?= auto
FUZZ ?= models data_sets conversations
SECONDS ?= 600
PYTEST_RUN := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.PHONY: help setup quickstart test test-slow coverage hooks ci test-online test-llama test-gpu mutants fuzz check fix docs site dist dist-check clean

help:  ## Show what can be made
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

.venv/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(INSTALL) -c $(CONSTRAINTS) -e '.[dev,docs]'
	@touch $@

build/oldest.txt: pyproject.toml  # For CONSTRAINTS: the oldest versions that it allows.
	@mkdir -p build
	$(PYTHON) tests/oldest.py > $@

setup: .venv/installed  ## Make the virtual environment and install into it

quickstart: setup  ## Make a small language model from Python's documentation, offline
	$(BIN)/nope quickstart

test: setup  ## Run the tests, but for those that take long
	$(PYTEST_RUN) $(PYTEST) $(TESTS)

test-slow: setup  ## Run those that take long: kills, ranks, real processes
	$(PYTEST_RUN) -m slow $(PYTEST) $(TESTS)

coverage: setup  ## Report which lines the quick tests reach
	$(PYTEST_RUN) --cov=nope_gpt --cov-report=term:skip-covered $(PYTEST) $(TESTS)

hooks: setup  ## Have git run `make check` before each commit
	$(BIN)/pip install --quiet --disable-pip-version-check pre-commit
	$(BIN)/pre-commit install

ci: setup  ## Run what has to pass before anything lands
	.ci/run

test-online: setup  ## First contact with the real Hub: both published models
	$(BIN)/python -m pytest -m online $(PYTEST) $(TESTS)

test-llama: setup  ## Install llama.cpp, which compiles for minutes, and run the tests that need it
	$(INSTALL) -c $(CONSTRAINTS) llama-cpp-python
	$(BIN)/python -m pytest -m llama $(PYTEST) $(TESTS)

test-gpu: setup  ## Run what needs an NVIDIA GPU
	$(PYTEST_RUN) -m gpu $(PYTEST) $(TESTS)

mutants: setup  ## Plant faults, `MODULES="hub/storage"` for some, and see the tests catch them
	$(BIN)/python tests/mutants.py --jobs 2 $(MODULES)

fuzz: setup  ## Install atheris, and damage what is read for SECONDS=600 each: FUZZ="models data_sets"
	$(INSTALL) atheris
	mkdir -p .cache/fuzz
	for name in $(FUZZ); do (cd .cache/fuzz && ../../$(BIN)/python ../../fuzz/$$name.py -max_total_time=$(SECONDS)) || exit 1; done

check: setup  ## Lint, check types and see that the generated docs are fresh
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python docs/build_pages.py --check

fix: setup  ## Mend what the linter and formatter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: setup  ## Write the generated docs
	$(BIN)/python docs/build_pages.py

site: setup  ## Make the site of README and docs in build/site
	$(BIN)/mkdocs build --strict

dist: setup  ## Build the sdist, and from it the wheel, into dist/
	$(INSTALL) -c $(CONSTRAINTS) build twine
	rm -rf dist
	PIP_CONSTRAINT=$(abspath $(CONSTRAINTS)) $(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

dist-check: dist  ## Install the wheel alone elsewhere, and make a model with it
	$(BIN)/python tests/dist_check.py $(CONSTRAINTS)

clean:  ## Remove the virtual environment, what was built, and caches
	rm -rf .venv build dist .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
