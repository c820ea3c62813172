# make demo   the whole way on data that every machine has; sets itself up first
# make test   each promise once, in minutes; sets itself up first
# make soak   the tests that `make test` leaves out: more combinations, a real S3 server, lost machines
# make check  ruff and mypy

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test soak check clean
.DELETE_ON_ERROR:

# One environment for everything, made again when a requirement changes.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tercet needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/tercet demo

# Whole runs use all cores by themselves, and some watch the clock: two files at a time. Fault tests last longest, so
# they go first.
WHOLE_RUNS := -n 2 --dist loadfile --no-loadscope-reorder tests/faults tests/flow tests/gpu
OTHERS := -n auto --dist loadfile tests/architecture tests/unit tests/contract

test: $(VENV)/ready
	$(BIN)/python -m pytest $(OTHERS)
	$(BIN)/python -m pytest $(WHOLE_RUNS)

soak: $(VENV)/ready
	$(BIN)/python -m pytest -m soak $(OTHERS)
	$(BIN)/python -m pytest -m soak $(WHOLE_RUNS)

check: $(VENV)/ready
	$(BIN)/ruff check src tests ray_jobs benchmarks
	$(BIN)/ruff format --check src tests ray_jobs benchmarks
	$(BIN)/mypy

clean:
	rm -rf $(VENV) tercet-store
