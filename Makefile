# make serve   set up what serving needs and serve ./models (PORT=9000 make serve: on port 9000)
# make test    set up everything and run the product's fast tests
# make test-all  run the other tests: of containers, Ray, emulators, wheels, load, and those of the laboratory
# make wheel   build the sdist and the wheel in dist/, then install the wheel elsewhere and classify a text
# make lint    ruff (lint and format), mypy and import-linter
# make lock    write requirements.lock, from which the image installs, with the newest releases
# make check-lock  fail if requirements.lock does not match pyproject.toml
# make sanitize  run the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
PYTHON ?= python3
PORT ?= 8000
SERVE := .venv-serve
DEV := .venv
# More than the two cores of most CI machines, because a test that waits leaves its core to another. Slow tests wait
# more; on the other hand, each worker imports all tests.
WORKERS := 3
SLOW_WORKERS := 4
PYTEST = $(DEV)/bin/pytest --dist loadfile --no-loadscope-reorder
# Show pip's progress bars only in a terminal.
QUIET := $(shell test -t 2 || echo --quiet)
# uv keeps the versions and hashes of an existing lock, unless --upgrade, so new releases do not change it.
COMPILE = $(DEV)/bin/uv pip compile pyproject.toml --extra otel --extra fit --group build --universal --generate-hashes \
	--python-version 3.11 --custom-compile-command "make lock" --quiet --output-file
# Some machines turn bytecode off; without it, each of the many processes would compile our code again, and pytest would
# rewrite the assertions of every test file again.
export PYTHONDONTWRITEBYTECODE :=
NATIVE := $(wildcard native/*.c native/*.h)

.PHONY: serve test test-all wheel lint lock check-lock sanitize format setup clean

serve: $(SERVE)/ready
	DE3_PORT=$(PORT) exec $(SERVE)/bin/de3 serve

test: $(DEV)/ready
	$(PYTEST) -n $(WORKERS) -m "not slow" tests

test-all: $(DEV)/ready
	$(PYTEST) -n $(SLOW_WORKERS) -m slow

wheel:
	deploy/release/build.sh $(PYTHON)
	deploy/release/try.sh dist/*.whl $(PYTHON)

lint: $(DEV)/ready
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports

lock: $(DEV)/ready
	$(COMPILE) requirements.lock --upgrade

check-lock: $(DEV)/ready
	mkdir -p build
	cp requirements.lock build/requirements.lock
	$(COMPILE) build/requirements.lock --constraint requirements.lock --no-annotate --no-header
	@grep -v '^ *#' requirements.lock | diff - build/requirements.lock > build/lock.diff \
		|| { head -20 build/lock.diff; echo "requirements.lock does not match pyproject.toml: run make lock"; exit 1; }

sanitize: $(DEV)/ready
	tests/sanitize.sh $(DEV)/bin/python

format: $(DEV)/ready
	$(DEV)/bin/ruff check --fix .
	$(DEV)/bin/ruff format .

setup: $(DEV)/ready

# An environment is recreated only if pyproject.toml or the kernels have changed. Serving has its own, which needs
# neither torch nor transformers. Modules are compiled when they are first imported: most never are.
$(SERVE)/ready: pyproject.toml $(NATIVE)
	@echo "Installing what serving needs into $(SERVE): once, about a minute (75 MB to download)."
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/pip install $(QUIET) --no-compile --editable .
	touch $@

$(DEV)/ready: pyproject.toml $(NATIVE)
	@echo "Installing everything into $(DEV), PyTorch included: once, several minutes."
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/pip install $(QUIET) --no-compile --editable '.[dev]'
	touch $@

clean:
	rm -rf $(SERVE) $(DEV) build dist native/*.so *.egg-info
