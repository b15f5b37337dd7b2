# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: demo test test-random test-gpu check install clean

demo: $(VENV)/.installed  ## install, compare attention kinds over three seeds, print where the report is
	$(BIN)/headwise study configs/studies/demo.yaml

test: $(VENV)/.installed-test  ## install, run the tests; they draw the same numbers each time
	OMP_NUM_THREADS=1 PYTHONHASHSEED=0 $(BIN)/python -m pytest -q -n 2

ROUNDS ?= 10
test-random: $(VENV)/.installed-test  ## the laws on numbers drawn anew: ROUNDS=10 rounds, from SEED on (default: the time)
	@first=$${SEED:-$$(date +%s)}; for seed in $$(seq $$first $$((first + $(ROUNDS) - 1))); do \
	    echo "seed $$seed"; \
	    OMP_NUM_THREADS=1 PYTHONHASHSEED=0 $(BIN)/python -m pytest -q -n 2 -m hypothesis \
	        --hypothesis-profile=random --hypothesis-seed=$$seed || exit 1; \
	done

test-gpu:  ## kernels against float64 on a GPU; needs torch, triton, numpy and pytest, installs nothing
	PYTHONPATH=. $(PYTHON) -m pytest -q -s -m gpu --confcutdir=tests/gpu tests/gpu

check: $(VENV)/.installed-test  ## ruff and mypy
	$(BIN)/ruff check headwise tests scripts examples
	$(BIN)/ruff format --check headwise tests scripts examples
	$(BIN)/mypy

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test,check,datasets,search,cluster,slurm]'
	touch $@

clean:  ## remove what is built; runs stay
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
