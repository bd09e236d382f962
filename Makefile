# From a bare machine with python3 (3.11 or newer) and make: `make test` and `make demo` install what they need first.
#   make test                   install, then check: style, types, tests
#   make demo                   install, then compress a ResNet20 on scikit-learn's digits, about two minutes on two cores
#   make coverage               every torchvision model and one of each of timm's files into docs/coverage.md, an hour
#   make docs                   the documentation site into build/site; a dead link is an error
#   make format                 write the style that `make check` asks for
#   make test VENV=/some/venv PYTHON=python3.12

VENV ?= .venv
PYTHON ?= python3
PIP_FLAGS ?=
DEMO_OUT ?= runs/demo
DOCS_OUT ?= build/site

BIN := $(VENV)/bin
STAMP := $(VENV)/.dspfx-installed

.PHONY: test check demo coverage docs format clean

test: check

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

demo: $(STAMP)
	$(BIN)/python -m dspfx compress --model resnet20 --data digits --budget flops=0.35 --out $(DEMO_OUT)

coverage: $(STAMP)
	$(BIN)/python -m pip install $(PIP_FLAGS) -e ".[zoo]"
	$(BIN)/python tools/coverage_table.py --again

docs: $(STAMP)
	$(BIN)/python -m pip install $(PIP_FLAGS) -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir $(abspath $(DOCS_OUT))

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# The stamp is written last: an interrupted or outdated installation is made again.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dspfx needs Python 3.11 or newer; run make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -e ".[dev]"
	touch $@
