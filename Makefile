# On a fresh machine `make demo` and `make test` do all their own set-up. `make` alone lists the targets.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help demo test check format bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.* ## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "make %-8s %s\n", $$1, $$2 }'

demo: $(VENV)/core.stamp ## run the whole loop on the bundled model; RUN=folder says where
	$(BIN)/mechreward demo --out $(RUN) --resume
	@echo "The report: $(abspath $(RUN))/report.html"

test: $(VENV)/dev.stamp ## run every test; ARGS="-k credit" is handed to pytest
	OMP_NUM_THREADS=1 PYTHONHASHSEED=0 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 $(ARGS)

check: $(VENV)/dev.stamp ## format, lint and type checks; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp ## rewrite the code as `make check` wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/dev.stamp ## run the benchmarks, but for one that takes hours; see benchmarks/README.md
	@for script in $(filter-out benchmarks/gate_error_rates.py,$(sort $(wildcard benchmarks/*.py))); do echo "== $$script"; $(BIN)/python $$script; done

clean: ## remove caches and build leftovers; keeps .venv and runs
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Set-up. A stamp is newer than what it was made from, so nothing is installed twice.
# torch comes first and alone, by its exact pin: a loose range pulls gigabytes of CUDA packages on Linux.
$(VENV)/torch.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("mechreward needs Python 3.11 or newer; run: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@echo "Setting up $(VENV), some minutes the first time ..."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/core.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) --editable .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) --editable '.[dev]'
	@touch $(VENV)/core.stamp $@
