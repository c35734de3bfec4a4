# Two commands: `make demo` sets everything up and runs the main job, `make test` sets everything up and tests.
# Everything lives in .venv; PYTHON and TORCH can be overridden: make demo PYTHON=python3.12
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint types check-all registry clean

help:
	@echo "make demo   set up .venv and run the main job on the embedded teacher"
	@echo "make test   set up .venv and run all tests"
	@echo "make lint   ruff; make types: mypy --strict; make check-all: all of it"
	@echo "make registry  run Debian's docker-registry on 127.0.0.1:5000 (ARGS=\"--port N --root DIR\")"
	@echo "make clean  remove .venv and demo-out"

# torch is installed first and by itself: a resolver left to choose would fetch gigabytes of GPU libraries.
$(VENV)/base: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "nanokit needs Python 3.10 or newer; found: $$($(PYTHON) --version 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[all]"
	@touch $@

$(VENV)/dev: $(VENV)/base
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

demo: $(VENV)/base
	$(BIN)/nanokit demo

# One process a core, each with one thread: the tests are many small models, not large matrices.
test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev
	$(BIN)/mypy

check-all: lint types test

# Needs no .venv: the registry is Debian's own program, fetched without root where it is not installed.
registry:
	$(PYTHON) benchmarks/registry_server.py $(ARGS)

clean:
	rm -rf $(VENV) demo-out
