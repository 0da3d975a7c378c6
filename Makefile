# make serve   set up what serving needs and serve ./models (PORT=9000 make serve moves the port)
# make test    set up everything and run all tests
# make lint    ruff (lint and format), mypy and import-linter
# make sanitize  the kernels' tests, watched by AddressSanitizer and UndefinedBehaviorSanitizer
PYTHON ?= python3
PORT ?= 8000
SERVE := .venv-serve
DEV := .venv
WORKERS := 4
NATIVE := $(wildcard native/*.c native/*.h)

.PHONY: serve test lint sanitize format setup clean

serve: $(SERVE)/ready
	DE3_PORT=$(PORT) $(SERVE)/bin/de3 serve

test: $(DEV)/ready
	$(DEV)/bin/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(DEV)/ready
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports

sanitize: $(DEV)/ready
	tests/sanitize.sh $(DEV)/bin/python

format: $(DEV)/ready
	$(DEV)/bin/ruff check --fix .
	$(DEV)/bin/ruff format .

setup: $(DEV)/ready

# The environment is made anew only when pyproject.toml or the kernels changed. Serving has one of its own, so that it
# installs neither torch nor transformers.
$(SERVE)/ready: pyproject.toml $(NATIVE)
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/pip install --quiet --editable .
	touch $@

$(DEV)/ready: pyproject.toml $(NATIVE)
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(SERVE) $(DEV) build *.egg-info
