# Every command that CI or a person runs. `make demo` and `make test` need python3 >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo demo-full test test-faults lint bench clean

demo: $(READY)
	$(BIN)/lxscale demo

demo-full: $(READY)
	$(BIN)/lxscale demo --full

test: lint
	$(BIN)/python -m pytest -m "not faults"

test-faults: $(READY)
	$(BIN)/python -m pytest -m faults

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/line.py

# PIP_CONSTRAINT reaches the isolated environments in which packages are built, too.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet -e '.[demo,test]'
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info
