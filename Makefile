# Everything runs in .venv, with the known-good set of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := -m pip install --quiet --disable-pip-version-check
PIP := $(BIN)/python $(INSTALL) --constraint constraints.txt
# Neighbouring tests share fixtures: a worker gets a stretch of them, and takes from the other's end when it is done.
XDIST := --numprocesses 2 --dist worksteal
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(XDIST) --quiet
OLDEST := 5.4.0
INTEGRATIONS := .venv-integrations
# Neighbours that bring another torch, or need a GPU, are not installed: their Python sources are read from here.
SOURCES := $(INTEGRATIONS)/sources
# What `test-newest` is to install otherwise than its newest release, such as a torch without GPU libraries.
NEWEST ?=

.DEFAULT_GOAL := help
.PHONY: help demo bench bench-quick bench-options test test-fast integrations trained test-oldest test-newest test-matrix fuzz check format hooks docs parity learn open-clip wheel release-check clean

help: ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: $(VENV)/.demo ## set up, then convert, classify, fine-tune and save a small CLIP on real handwriting
	$(BIN)/hfvlm demo --output demo-output

test: $(VENV)/.dev ## set up, then run all tests
	$(PYTEST)

test-fast: $(VENV)/.dev ## run the tests of a few seconds each
	$(PYTEST) -m "not slow and not integration and not trained"

integrations: $(INTEGRATIONS)/.ready ## run hfvlm with the newest releases of its neighbours
	HFVLM_NEIGHBOURS=$(SOURCES) OMP_NUM_THREADS=1 $(INTEGRATIONS)/bin/python -m pytest $(XDIST) --quiet -m integration --pythonwarnings default \
		$$(grep --recursive --files-with-matches --include='test_*.py' 'mark\.integration' tests)

trained: $(VENV)/.dev ## train the examples to the end, and test what their models learned
	$(PYTEST) -m trained tests/examples tests/learning

test-oldest: $(VENV)/.dev ## run all tests on the oldest transformers that pyproject.toml allows
	$(BIN)/python -m tests.matrix --base $(VENV) --versions $(OLDEST) --all

test-newest: ## run all tests on the newest release of everything; warnings are reported, not fatal
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python $(INSTALL) --upgrade --upgrade-strategy eager --editable '.[dev]' $(NEWEST)
	.venv-newest/bin/python $(INSTALL) --upgrade transformers $(NEWEST)
	.venv-newest/bin/python $(INSTALL) --no-deps open_clip_torch==3.3.0
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest $(XDIST) --quiet --pythonwarnings default

test-matrix: $(VENV)/.dev ## run generation, contracts, goldens and models on five versions of transformers
	$(BIN)/python -m tests.matrix --base $(VENV)

bench: $(VENV)/.dev ## measure everything next to transformers, and write it into docs/performance.md
	OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks --output docs/performance.json --page

bench-quick: $(VENV)/.dev ## assert that what is measured is equal, and grows as promised; no times
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks --quick

bench-options: $(VENV)/.dev ## measure lower precision and other engines, and write them into docs/performance.md
	OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.precision --page
	OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.engines --page

fuzz: $(VENV)/.dev ## try thousands of damaged files, folders and URLs (HFVLM_FUZZ=5000)
	HFVLM_FUZZ=$${HFVLM_FUZZ:-5000} $(PYTEST) tests/fuzz

check: $(VENV)/.dev ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: $(VENV)/.dev ## check every commit before it is made
	$(BIN)/python $(INSTALL) pre-commit
	$(BIN)/pre-commit install

docs: $(VENV)/.docs ## build the documentation's site into site/, every link checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

parity: $(VENV)/.dev ## write docs/parity.md from the golden cases (HFVLM_GOLDENS=folder for others), or some SECTIONS of it
	OMP_NUM_THREADS=1 $(BIN)/python -m docs.generators.parity $(SECTIONS)

learn: $(VENV)/.dev ## train a small model of every architecture, two seeds each, and write docs/learning.md
	OMP_NUM_THREADS=1 $(BIN)/python -m learning

open-clip: $(VENV)/.dev ## write docs/open_clip.md, the preset of each of open_clip's tags
	$(BIN)/python -m docs.generators.open_clip

wheel: $(VENV)/.dev ## build the package into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

release-check: ## build the package, install it in a new environment, and try it there without the repository
	rm -rf dist .venv-release
	$(MAKE) --no-print-directory wheel
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/python $(INSTALL) --constraint constraints.txt dist/hfvlm-*.whl
	cd .venv-release && bin/python -I ../tests/support/smoke.py

clean: ## remove what the other targets made
	rm -rf .venv .venv-newest .venv-matrix $(INTEGRATIONS) .venv-release dist site demo-output .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) hatchling editables
	$(PIP) --no-build-isolation --editable '.[demo]'
	@touch $@

# open_clip's wheel brings OpenAI's vocabulary file, for the tokenizer's goldens; it is never imported.
$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) hatchling editables
	$(PIP) --no-build-isolation --editable '.[dev]'
	$(PIP) --no-deps open_clip_torch==3.3.0
	@touch $@

# Everything is the newest but torch, for which the packages of constraints.txt are built.
$(INTEGRATIONS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(INTEGRATIONS)
	grep '^torch==' constraints.txt > $(INTEGRATIONS)/torch.txt
	$(INTEGRATIONS)/bin/python $(INSTALL) --constraint $(INTEGRATIONS)/torch.txt --upgrade --upgrade-strategy eager --editable '.[integrations]'
	$(INTEGRATIONS)/bin/python $(INSTALL) --no-deps open_clip_torch==3.3.0
	rm -rf $(SOURCES)
	$(INTEGRATIONS)/bin/python -m tests.support.neighbours $(SOURCES)
	@touch $@

$(VENV)/.docs: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) hatchling editables
	$(PIP) --no-build-isolation --editable '.[docs]'
	@touch $@
