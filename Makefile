# make demo   the whole way on data that every machine has; sets itself up first
# make test   every test; sets itself up first
# make check  ruff and mypy

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check clean
.DELETE_ON_ERROR:

# One environment for everything, made anew when a requirement changes.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tercet needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/tercet demo

# Whole runs use all cores by themselves, and some watch the clock: two files at a time, fault tests first: they last longest.
test: $(VENV)/ready
	$(BIN)/python -m pytest -n auto --dist loadfile tests/architecture tests/unit tests/contract
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/faults tests/flow tests/gpu

check: $(VENV)/ready
	$(BIN)/ruff check src tests ray_jobs benchmarks
	$(BIN)/ruff format --check src tests ray_jobs benchmarks
	$(BIN)/mypy

clean:
	rm -rf $(VENV) tercet-store
