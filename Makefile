# Everything sets itself up: the first target that needs it makes .venv, once.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.set-up
PYTEST := $(BIN)/python -m pytest
# In the order of names: xdist's own, by number of tests, leaves files of few long ones for the end.
TWO_FILES := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo validate-demo test check format bench chaos gpu-bench gpu-test browser-test clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(SETUP) ## make .venv with the tested versions (about 6 GB; torch is most of it)

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(SETUP) ## planted images → head → scores and heatmaps, through the real jobs (at most 5 minutes)
	$(BIN)/python jobs/demo.py --config configs/demo.yaml

validate-demo: $(SETUP) ## are heatmaps true? planted images, three backbones, true and shuffled ratings (10 to 14 minutes)
	$(BIN)/python jobs/validate_demo.py --config configs/validate-demo.yaml

test: $(SETUP) ## all tests that need no GPU and no network (15 to 30 minutes on 2 cores)
	$(PYTEST) $(TWO_FILES) tests/cluster tests/s3 tests/unit

check: $(SETUP) ## ruff, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(SETUP) ## let ruff format and fix what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(SETUP) ## ratios that show the speed, measured side by side, into README.md (18 to 35 minutes)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python -m tests.benchmarks

gpu-bench: $(SETUP) ## every backbone on the GPU, part by part, against what the card can do (tests/benchmarks/results)
	$(BIN)/python -m tests.benchmarks.gpu

chaos: $(SETUP) ## a run on S3 while machines die and requests fail, and what became of it (at most 15 minutes)
	$(BIN)/python -m tests.chaos

gpu-test: $(SETUP) ## tests that need a CUDA device; they fail where there is none
	$(PYTEST) --override-ini addopts= -q tests/gpu

browser-test: $(SETUP) ## the report in a headless Chromium; it fails where there is none (apt-get install chromium)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[browser]'
	$(PYTEST) --override-ini addopts= -q tests/browser

clean: ## remove .venv and what the demo wrote
	rm -rf $(VENV) demo
