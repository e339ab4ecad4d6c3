# Every target sets up what it needs, once: all that is wanted beforehand is make and a Python of at least 3.11.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTHON_CODE := d2o server client tests benchmarks scripts
ARGS ?=

.PHONY: help setup serve test load lint proto bench quality lock format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Create .venv with everything at its locked version

# Newer than the lock and both project files means: installed as they say.
$(READY): requirements.lock pyproject.toml client/pyproject.toml scripts/setup.sh
	@scripts/setup.sh $(VENV)
	@touch $@

serve: $(READY) ## Start the server; flags go into ARGS="--model ... --port ..."
	@exec $(BIN)/d2o-serve $(ARGS)

# A file's tests share servers, so one process runs them all; tests/conftest.py has the order.
test: $(READY) ## Run the tests, on up to four cores; pytest's flags go into ARGS
	@$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

load: $(READY) ## Load a tiny server with Locust, report in load-report/; its flags go into ARGS
	@$(BIN)/python -m tests.load.run $(ARGS)

lint: $(READY) ## Check style, types, contract, stubs, Dockerfile, scripts and manifests
	@scripts/lint.sh $(VENV) $(PYTHON_CODE)

format: $(READY) ## Rewrite the Python files in the house format
	@$(BIN)/ruff check --fix $(PYTHON_CODE)
	@$(BIN)/ruff format $(PYTHON_CODE)

proto: $(READY) ## Regenerate the gRPC stubs from proto/
	@scripts/proto.sh $(BIN)/python client

bench: $(READY) ## Run every benchmark, or ONLY="concurrency"; its flags go into ARGS
	@for name in $(or $(ONLY),$(basename $(notdir $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))))); do \
		echo "bench: $$name"; $(BIN)/python -m benchmarks.$$name $(ARGS); \
	done

quality: $(READY) ## Measure what compression costs in quality, a reduced set; flags go into ARGS
	@$(BIN)/python -m benchmarks.quality --name quality_reduced --texts 2 --questions 3 --prompt-tokens 2048 \
		--follow-tokens 128 --ratios 0.4 0.2 --batch 18 $(ARGS)

lock: $(READY) ## Resolve all dependencies afresh into requirements.lock
	@$(BIN)/python scripts/lock.py > requirements.lock.new
	@mv requirements.lock.new requirements.lock
	@git --no-pager diff --stat -- requirements.lock

clean: ## Remove .venv, caches and build outputs (downloaded models stay)
	@rm -rf $(VENV) build dist client/dist .pytest_cache .mypy_cache .ruff_cache .hypothesis requirements.lock.new
	@find . -type d -name __pycache__ -prune -exec rm -rf {} +
