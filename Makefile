# Commands that do their own set-up: `make demo`, `make test`, `make check-kernels`. `make clean` to start afresh.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
WORK   ?= runs/toy
CONFIG ?= configs/toy.py
# Kernels of GPUs need jax >= 0.11, which needs Python >= 3.12. A shim that has no Python behind it fails the test.
PYTHON312 ?= $(shell for p in python3.12 python3.13 python3 $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.1[23]*/bin/python; do \
	if "$$p" -c 'import sys; assert (3, 12) <= sys.version_info < (3, 14)' 2>/dev/null; then echo "$$p"; break; fi; done)
AOT    := .venv-aot

.PHONY: demo test check-kernels clean

demo: $(VENV)/.run  ## train the toy, score it, write runs/toy/report.html
	$(PY) -m cosmos_jax train    --config=$(CONFIG) --workdir=$(WORK)
	$(PY) -m cosmos_jax evaluate --config=$(CONFIG) --workdir=$(WORK)
	@echo "Open $(WORK)/report.html in a browser."

# Two processes, a file of tests each at a time: a file's tests share what they compile.
test: $(VENV)/.test  ## lint, types, and every test (about twenty minutes on two cores)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -e .
	touch $@

check-kernels: $(AOT)/.installed  ## compile kernels and train steps for chips that are not here (needs a Python >= 3.12)
	$(AOT)/bin/python -m pytest tests/kernels/gpu tests/kernels/aot
	$(AOT)/bin/python -m pallas_kernels.check

$(AOT)/.installed: pyproject.toml
	@test -n "$(PYTHON312)" || { \
		echo "check-kernels needs Python 3.12 or 3.13 and found none; name one: make check-kernels PYTHON312=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON312) -m venv $(AOT)
	$(AOT)/bin/python -m pip install --quiet 'jax[tpu,cuda13-local]==0.11.2' 'pytest>=8.4' \
		'flax>=0.12.8' 'optax>=0.2.8' 'ml-collections>=1.1'
	touch $@

# The oracles (torch for CPU, diffusers, transformers) come only with the tests.
$(VENV)/.test: $(VENV)/.run
	$(PY) -m pip install --quiet torch==2.13.0
	$(PY) -m pip install --quiet -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(AOT) runs build *.egg-info .pytest_cache .ruff_cache .mypy_cache
