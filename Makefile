# `make book` and `make test` do everything, the environment included.
PYTHON ?= python3
VENV ?= .venv
CASE ?= cases/qwen-lora.yml
# Empty: the first profile of the case.
PROFILE ?=
DATA ?=
LABELS ?=
FILES ?=
ROWS ?= 0
SUSPECT ?=
REFERENCE ?=
DEVICE ?= auto
DTYPE ?= auto
CORES ?= 0
WORLDS ?= 3
EXECUTOR ?=

BIN := $(abspath $(VENV))/bin
# The graph calls `postmortem` and `snakemake` of this environment by name.
export PATH := $(BIN):$(PATH)
.DEFAULT_GOAL := book
.PHONY: book replay looks record confirm bench suite membership weights test lint clean environment \
  cluster

environment: $(VENV)/.installed

$(VENV)/.installed: requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --requirement requirements.txt --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

book: environment
	@postmortem book --case "$(CASE)" --profile "$(PROFILE)" --data "$(DATA)" \
	  --labels "$(LABELS)" --rows "$(ROWS)" --suspect "$(SUSPECT)" --reference "$(REFERENCE)" \
	  --device "$(DEVICE)" --dtype "$(DTYPE)" --cores "$(CORES)" --executor "$(EXECUTOR)"

replay: environment
	@postmortem replay --case "$(CASE)" --profile "$(PROFILE)" --worlds "$(WORLDS)" \
	  --cores "$(CORES)" --executor "$(EXECUTOR)"

looks: environment
	@postmortem looks --cores "$(CORES)"

record: environment
	@postmortem record --case "$(CASE)" --profile "$(PROFILE)" --files "$(FILES)" \
	  --device "$(DEVICE)" --dtype "$(DTYPE)" --cores "$(CORES)"

confirm: environment
	@postmortem confirm --case "$(CASE)" --profile "$(PROFILE)" \
	  --device "$(DEVICE)" --dtype "$(DTYPE)" --cores "$(CORES)"

bench: environment
	@postmortem bench --case "$(CASE)" --profile "$(or $(filter-out embedded,$(PROFILE)),smollm2)" \
	  --device "$(DEVICE)" --dtype "$(DTYPE)" --cores "$(CORES)"

suite: environment
	@$(BIN)/python scripts/make_suite.py --case "$(CASE)" --cores "$(CORES)"

membership: environment
	@$(BIN)/python scripts/measure_membership.py --case "$(CASE)" --cores "$(CORES)"

weights: environment
	@postmortem weights "$(PROFILE)"

# Snakemake's executors for SLURM and Kubernetes, which nothing else needs.
cluster: environment
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[cluster]'

test: environment
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile \
	  --no-loadscope-reorder

lint: environment
	@$(BIN)/ruff check src tests
	@$(BIN)/ruff format --check src tests
	@$(BIN)/mypy

clean:
	rm -rf _build .snakemake .pytest_cache .mypy_cache .ruff_cache .hypothesis
