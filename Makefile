# make train and make test are the README's two commands; each makes .venv if needed.
#   PYTHON=python3.12   interpreter of a new environment
#   CONFIG=... WORKDIR=...  what make train runs, and where
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/quickstart.py
WORKDIR ?= runs/quickstart
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install train test test-thorough durations test-slow test-hf test-browser docs lint types check bench clean

help:
	@echo "make train | test | check (lint, types, more tests) | test-slow | test-hf | test-browser | docs | bench"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "moex needs Python >= 3.11; choose one with make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $(STAMP)

train: $(STAMP)
	$(BIN)/moex train --config=$(CONFIG) --workdir=$(WORKDIR)

# Three workers, each with whole files, for two cores: tests of processes wait a lot.
# The order is that of tests/durations.json.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder
NEEDS_NOTHING := not slow and not gpu and not tpu and not hf and not browser and not aot

test: $(STAMP)
	$(PYTEST)

# The tests that tell little beside those of `make test`, too.
test-thorough: $(STAMP)
	$(PYTEST) -m '$(NEEDS_NOTHING)'

# Writes how long each test file takes, by which files are ordered.
durations: $(STAMP)
	$(PYTEST) -m '$(NEEDS_NOTHING)' --record-durations --durations=100

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m slow

# Beside transformers itself; brings several GB of packages.
test-hf: $(STAMP) constraints-hf.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
	  --constraint constraints-hf.txt --editable '.[test,hf,eval]'
	$(BIN)/python -m pytest -m hf

# Opens pages of `moex report` in a headless Chromium, which must be installed.
test-browser: $(STAMP)
	$(BIN)/python -m pytest -m browser

# The API reference, made from docstrings; build/api/moex.html is its first page.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -W error docs/api build/api

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# What .ci/run calls.
check: lint types test-thorough

bench: $(STAMP)
	$(BIN)/python -m benchmarks.train_step --config=$(CONFIG)

clean:
	rm -rf $(VENV)
