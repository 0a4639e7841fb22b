# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all lint format bench bench-gpu bench-docs docs clean

demo: $(READY)  ## train four mixers on a real series, compare them, draw a report
	$(BIN)/mainstem compare -c forecasting/demo.yaml

# One thread in each of a few processes: two threads that wait for each other on a busy core are far slower.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8

test: $(READY)  ## the fast suite (ten minutes on two cores)
	$(PYTEST)

test-all: $(READY)  ## also what is marked slow
	$(PYTEST) -m 'not gpu'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## time every scan on this machine
	$(BIN)/mainstem bench

bench-gpu: $(READY)  ## on a CUDA device, beside flash-linear-attention, which is installed for it
	$(BIN)/python -m pip install --quiet flash-linear-attention==0.6.0
	$(BIN)/mainstem bench gpu

bench-docs: $(READY)  ## measure everything again and write the tables of docs/benchmarks.md (10 minutes)
	$(BIN)/mainstem bench document

docs: $(READY)  ## the reference of every public name, as HTML in build/docs
	$(BIN)/pdoc --docformat google --math --output-directory build/docs \
		mainstem.core mainstem.kernels mainstem.core.training mainstem.domains.forecasting

clean:  ## remove the virtual environment and what was built
	rm -rf .venv build dist

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt -e '.[test]'
	touch $@
