# Every command that CI or a person runs. `make demo` and `make test` need python3 >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.ready-bench

.PHONY: demo demo-full paper test test-faults test-cluster lint bench clean

demo: $(READY)
	$(BIN)/lxscale demo

demo-full: $(READY)
	$(BIN)/lxscale demo --full

paper: $(READY)
	$(BIN)/python benchmarks/paper.py

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not faults"

test-faults: $(READY)
	$(BIN)/python -m pytest -m faults tests/cluster
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m faults \
		--ignore tests/cluster --ignore tests/network

test-cluster: $(READY)
	$(BIN)/python -m pytest -m faults tests/network

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(BENCH_READY)
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/order.py
	$(BIN)/python benchmarks/growth.py

# PIP_CONSTRAINT reaches the isolated environments in which packages are built, too.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet -e '.[demo,test]'
	touch $(READY)

# Why two peers come without what they ask for: see pyproject.toml.
$(BENCH_READY): $(READY)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet -e '.[bench]'
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --no-deps \
	    'mosaicml-streaming>=0.13' 'litdata>=0.2.76'
	touch $(BENCH_READY)

clean:
	rm -rf $(VENV) build *.egg-info
