# Two commands that do their own set-up: `make demo` and `make test`. Delete .venv to start afresh.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
WORK   ?= runs/toy
CONFIG ?= configs/toy.py

.PHONY: demo test lint clean

demo: $(VENV)/.run  ## train the toy, score it, write runs/toy/report.html
	$(PY) -m cosmos_jax train    --config=$(CONFIG) --workdir=$(WORK)
	$(PY) -m cosmos_jax evaluate --config=$(CONFIG) --workdir=$(WORK)
	@echo "Open $(WORK)/report.html in a browser."

# Two processes: XLA keeps every compiled program of a process mapped, and Linux allows a process 65,530 maps.
test: $(VENV)/.test  ## lint, types, and every test (about a quarter of an hour on two cores)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PY) -m pytest --ignore=tests/parity
	$(PY) -m pytest tests/parity

$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -e .
	touch $@

# The oracles (torch for CPU, diffusers, transformers) come only with the tests.
$(VENV)/.test: $(VENV)/.run
	$(PY) -m pip install --quiet torch==2.13.0
	$(PY) -m pip install --quiet -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache .mypy_cache
