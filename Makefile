# Everything runs in .venv, which is made anew when pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --quiet
OLDEST := 5.4.0

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz test-fast test-oldest check format wheel clean

help: ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: $(VENV)/.demo ## set up, then convert, classify, fine-tune and save a small CLIP on real handwriting
	$(BIN)/hfvlm demo --output demo-output

test: $(VENV)/.dev ## set up, then run all tests
	$(PYTEST)

test-fast: $(VENV)/.dev ## run the tests of a few seconds each
	$(PYTEST) -m "not slow"

fuzz: $(VENV)/.dev ## try thousands of damaged files, folders and URLs (HFVLM_FUZZ=5000)
	HFVLM_FUZZ=$${HFVLM_FUZZ:-5000} $(PYTEST) tests/fuzz

test-oldest: ## run all tests on the oldest transformers that pyproject.toml allows
	$(MAKE) VENV=.venv-oldest .venv-oldest/.dev
	.venv-oldest/bin/python -m pip install --quiet transformers==$(OLDEST)
	$(MAKE) VENV=.venv-oldest test

check: $(VENV)/.dev ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.dev ## build the package into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## remove what the other targets made
	rm -rf .venv .venv-oldest dist demo-output .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[demo]'
	@touch $@

# open_clip's wheel brings OpenAI's vocabulary file, for the tokenizer's goldens; it is never imported.
$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps open_clip_torch==3.3.0
	@touch $@
