# make quickstart   set up, then SFT + RL on a real model, and a report
# make test         set up, then the checks and the tests
# make faults       set up, then runs of eight methods that are killed again and again
#
# PYTHON  the interpreter to make the environment with (3.11 to 3.13)
# VENV    where the environment is
# TORCH   what pip installs as torch, where the environment has none yet
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Errors only: what pip says of every index it looks at would bury them.
PIP    := $(BIN)/python -m pip -qq --disable-pip-version-check

.PHONY: setup quickstart test faults lint format typecheck bench docs clean

setup: $(STAMP)

# torch first and by plain pip, so that a local build of it is taken where one is provided. The
# stamp comes last: an installation that was interrupted is taken up again.
$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; \
	    sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	    { echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=/path/to/python3.12"; exit 2; }
	@echo "setting up $(VENV): a few minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) install "$(TORCH)"
	$(PIP) install --editable ".[dev]"
	@touch $@

quickstart: setup
	$(BIN)/align train smollm2-135m/quickstart

# One process a core, each with whole files: what a file's tests share is made once.
test: lint typecheck
	$(BIN)/pytest -n auto --dist loadfile

# For some methods, or other numbers of kills: .venv/bin/python tests/faults --help
faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/rollout.py
	$(BIN)/python benchmarks/grpo_vs_trl.py
	$(BIN)/python benchmarks/sft_vs_trl.py
	$(BIN)/python benchmarks/dpo_vs_trl.py
	$(BIN)/python benchmarks/rm_vs_trl.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/cpu_update.py

# The recipe reference, and the picture in the README where the quick start has been run.
docs: setup
	$(BIN)/python docs/build_reference.py
	test ! -d runs/quickstart || $(BIN)/python docs/build_figures.py runs/quickstart

clean:
	rm -rf $(VENV) build dist *.egg-info
