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
.PHONY: book world replay cause-profiles record confirm bench suite membership \
  peft-versions weights test test-slow lint clean environment cluster

# With uv on the path the environment is there in a third of the time.
UV := $(shell command -v uv)
INSTALL := $(if $(UV),uv pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install \
  --quiet --disable-pip-version-check)

environment: $(VENV)/.installed

$(VENV)/.installed: requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --requirement requirements.txt --constraint constraints.txt
	$(INSTALL) --no-deps --editable .
	@touch $@

# What only tests and lint need.
$(VENV)/.tested: tests/requirements.txt constraints.txt $(VENV)/.installed
	$(INSTALL) --requirement tests/requirements.txt --constraint constraints.txt
	@touch $@

book: environment
	@postmortem book --case "$(CASE)" --profile "$(PROFILE)" --data "$(DATA)" \
	  --labels "$(LABELS)" --rows "$(ROWS)" --suspect "$(SUSPECT)" --reference "$(REFERENCE)" \
	  --device "$(DEVICE)" --dtype "$(DTYPE)" --cores "$(CORES)" --executor "$(EXECUTOR)"

replay: environment
	@postmortem replay --case "$(CASE)" --profile "$(PROFILE)" --worlds "$(WORLDS)" \
	  --cores "$(CORES)" --executor "$(EXECUTOR)"

world: environment
	@$(BIN)/python -m tools.train_world --case "$(CASE)" --cores "$(CORES)" \
	  --against results/embedded

cause-profiles: environment
	@$(BIN)/python -m tools.cause_profiles --case "$(CASE)" --cores "$(CORES)"

record: environment
	@postmortem record --case "$(CASE)" --profile "$(PROFILE)" --files "$(FILES)" \
	  --worlds "$(WORLDS)" --device "$(DEVICE)" --dtype "$(DTYPE)" --cores "$(CORES)"

confirm: environment
	@postmortem confirm --case "$(CASE)" --profile "$(PROFILE)" \
	  --device "$(DEVICE)" --dtype "$(DTYPE)" --cores "$(CORES)"

bench: environment
	@postmortem bench --case "$(CASE)" --profile "$(or $(filter-out embedded,$(PROFILE)),smollm2)" \
	  --device "$(DEVICE)" --dtype "$(DTYPE)" --cores "$(CORES)"

suite: environment
	@$(BIN)/python -m tools.make_suite --case "$(CASE)" --cores "$(CORES)"

membership: environment
	@$(BIN)/python -m tools.measure_attribution --case "$(CASE)" --cores "$(CORES)"

held-out: environment
	@$(BIN)/python -m tools.held_out --case "$(CASE)" --data "$(DATA)"

peft-versions: environment
	@$(BIN)/python -m tools.peft_versions --case "$(CASE)"

weights: environment
	@postmortem weights "$(PROFILE)"

# Snakemake's executors for SLURM and Kubernetes, which nothing else needs.
cluster: environment
	@$(INSTALL) --constraint constraints.txt --editable '.[cluster]'

# A file's tests share what they build, so each stays in one worker; the longest start first.
PYTEST = $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.tested
	@$(PYTEST)

# Clusters, builds that are killed, and trainings of the whole world.
test-slow: $(VENV)/.tested
	@$(PYTEST) -m slow

lint: $(VENV)/.tested
	@$(BIN)/ruff check src tests tools
	@$(BIN)/ruff format --check src tests tools
	@$(BIN)/mypy
	@$(BIN)/actionlint -shellcheck= -pyflakes= .github/workflows/*.yml

clean:
	rm -rf _build .snakemake .pytest_cache .mypy_cache .ruff_cache .hypothesis
