# Two commands a fresh clone needs nothing for but Python 3.11+: `make tune` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PACK ?= build/llama-3-8b.cpu.pack

.PHONY: help setup tune test test-all lint clean

help:
	@echo "make tune   tune Llama-3-8B decode for this CPU, build a pack, load it, decode with it"
	@echo "make test   run the tests"
	@echo "make lint   ruff and mypy"

setup: $(READY)

# torch first and by exact version: where an index offers a CPU build of it, that one is taken; an ordinary
# index gives the CUDA build, which pins the same Triton as constraints.txt.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all]'
	@command -v g++ >/dev/null || command -v clang++ >/dev/null || command -v c++ >/dev/null || test -n "$$CXX" \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt ziglang
	@touch $@

tune: $(READY)
	$(BIN)/pagedgen tune --cpu --model llama-3-8b --trace sample --effort quick --budget 8m --out $(PACK)

test: $(READY)
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow"

test-all: $(READY)
	$(BIN)/python -m pytest -q -n auto --dist worksteal

lint: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy -p pagedgen

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis
