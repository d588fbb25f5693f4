# make          install everything into .venv/
# make demo     align the embedded generator and write runs/demo/report.html
# make live     the page on which that run is directed while it streams
# make test     the tests (make test-slow: the long ones)
# make lint     style, format and types
# make bench    the benchmarks
# make mutants  whether the tests notice small changes of the source

SEED ?= 0
OUT ?= runs/demo
BIN := .venv/bin
SUPPORTED := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
NEEDED := kvpo needs Python 3.11 or newer with venv (on Debian: python3-venv)
# The first Python that will do; set PYTHON to choose another.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c "$(SUPPORTED)" >/dev/null 2>&1 && echo $$python && break; done)

.PHONY: install demo live test test-slow lint bench mutants clean
.DELETE_ON_ERROR:

install: .venv/.complete

.venv/bin/python:
	@$(if $(PYTHON),,echo "$(NEEDED); install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1)
	@$(PYTHON) -c "$(SUPPORTED)" 2>/dev/null || { echo "$(NEEDED); $(PYTHON) will not do" >&2; exit 1; }
	@$(PYTHON) -m venv .venv

# What the demo needs, and everything. pip adds to the first what the second lacks.
.venv/.demo: EXTRAS =
.venv/.live: EXTRAS = [server]
.venv/.complete: EXTRAS = [wan,rewards,server,parquet,dev]
.venv/.demo .venv/.live .venv/.complete: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.$(EXTRAS)'
	@touch $@

# A run that was stopped continues; a finished one is left as it is (choose another OUT to run again). A new
# one is compared with runs that learned nothing; a run of an older version may have other settings than they.
demo: $(if $(wildcard .venv/.complete),.venv/.complete,.venv/.demo)
	$(BIN)/kvpo align --preset demo --seed $(SEED) --out $(OUT) \
		$(if $(wildcard $(OUT)/config.yaml),--resume,--null benchmarks/results/null.json)

# Base and aligned of the demo's run; without one, the base.
live: $(if $(wildcard .venv/.complete),.venv/.complete,.venv/.live)
	$(BIN)/kvpo live $(if $(wildcard $(OUT)/config.yaml),--run $(OUT))

# Files of tests on up to four cores at a time.
test: .venv/.complete
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-slow: .venv/.complete
	$(BIN)/python -m pytest -m slow

lint: .venv/.complete
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.complete
	$(BIN)/python benchmarks/engine.py

mutants: .venv/.complete
	$(BIN)/python benchmarks/mutants.py

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
