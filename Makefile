# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: demo test test-gpu check install clean

demo: $(VENV)/.installed  ## install, compare attention kinds over three seeds, print where the report is
	$(BIN)/headwise study configs/studies/demo.yaml

test: $(VENV)/.installed-test  ## install, run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test-gpu:  ## kernels against float64 on a GPU; needs torch, triton, numpy and pytest, installs nothing
	PYTHONPATH=. $(PYTHON) -m pytest -q -s -m gpu --confcutdir=tests/gpu tests/gpu

check: $(VENV)/.installed-test  ## ruff and mypy
	$(BIN)/ruff check headwise tests
	$(BIN)/ruff format --check headwise tests
	$(BIN)/mypy

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test,check,datasets]'
	touch $@

clean:  ## remove what is built; runs stay
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
