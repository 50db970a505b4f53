# make quickstart   set up, then SFT + RL on a real model, and a report
# make test         set up, then the tests
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: setup quickstart test lint format typecheck bench docs clean

setup: $(STAMP)

# torch first, by plain pip: where a local CPU build is provided it is taken instead of the CUDA one.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $(STAMP)

quickstart: setup
	$(BIN)/align train smollm2-135m/quickstart

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/rollout.py
	$(BIN)/python benchmarks/grpo_vs_trl.py

docs: setup
	$(BIN)/python docs/build_figures.py

clean:
	rm -rf $(VENV) build dist *.egg-info
