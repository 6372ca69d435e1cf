# make demo | test | test-slow | rehearse | lint | format | bench | docs | setup | clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: setup dev demo test test-slow rehearse lint format bench docs clean

setup: $(VENV)/.runtime
dev: $(VENV)/.dev

$(VENV)/.runtime: pyproject.toml constraints.txt
	@echo "Installing New-LLM into $(VENV) (about a minute)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "Installing the development tools into $(VENV)"
	@$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.runtime
	@echo "Installing the documentation tools into $(VENV)"
	@$(PIP) --editable '.[docs]'
	@touch $@

$(VENV)/.bench: $(VENV)/.runtime
	@echo "Installing the packages that benchmarks compare with into $(VENV)"
	@$(PIP) --editable '.[bench]'
	@touch $@

demo: setup
	$(BIN)/new-llm experiment --config quick

# Runs in two processes; `make test JOBS=8` on a machine with more cores.
JOBS ?= 2
test: dev
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

test-slow: dev
	$(BIN)/python -m pytest -m slow

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A small version of the GPU check, on the CPU.
rehearse: dev
	$(BIN)/python -m pytest -m slow tests/benchmarks/test_benchmark_programs.py -k rehearsal

# Takes hours; `make bench BENCH="--only generation"` or `BENCH=--quick` for less. Writes docs/benchmarks/measured.md.
bench: $(VENV)/.bench
	$(BIN)/python benchmarks/all.py $(BENCH)

# Writes site/index.html; fails on any warning, such as a dead link or a missing name.
docs: $(VENV)/.docs
	$(BIN)/zensical build --clean --strict

clean:
	rm -rf $(VENV) build dist site src/*.egg-info
