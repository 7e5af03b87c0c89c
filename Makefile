# `make demo` and `make test` build .venv when it is missing or older than what it is built from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.built
# One worker per core, four at most: each may start seven ranks, of half a gigabyte each. WORKERS='-n 0': one after the other.
WORKERS ?= -n auto --maxprocesses 4 --dist loadgroup --no-loadscope-reorder

.PHONY: env demo demo-long test test-fast test-slurm test-all lint typecheck format clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,eval,test]'
	touch $@

env: $(STAMP)

demo: env
	$(BIN)/python tools/demo.py

# The demo's question on text, with seeds and each arm's own learning rate: an hour on two cores. Stopped, it resumes.
demo-long: env
	$(BIN)/python tools/sweep.py run configs/sweeps/learning_rate_fresh.yaml
	$(BIN)/python tools/sweep.py report configs/sweeps/learning_rate_fresh.yaml --tokens 64

# Every claim once.
test: env
	$(BIN)/python -m pytest tests $(WORKERS) -m "not slow"

# The inner loop: what needs neither several processes nor a whole command line.
test-fast: env
	$(BIN)/python -m pytest tests $(WORKERS) -m "not slow and not launcher and not ranks"

# The long drills of studies: preemption, hangs, crashes, lost nodes and full disks on a real SLURM.
test-slurm: env
	$(BIN)/python -m pytest tests/launching tests/scaling $(WORKERS) -m slow

# Whole matrices and long drills too.
test-all: env
	$(BIN)/python -m pytest tests $(WORKERS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The environment and caches, which are built again. Runs and data are yours: they are never deleted here.
clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build megagamma.egg-info
	find megagamma tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
