# Everything is made in .venv; nothing else of ours is needed. PYTHON=... picks another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard opsqueue/_speedups/*.pyx opsqueue/_speedups/*.pxd)

.PHONY: help demo test check format bench bench-full bench-peers bench-sizes load build docs clean prerequisites

help: ## say what the targets do
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile

demo: $(VENV)/.installed ## count the identifiers of Python's standard library, through the queue
	@$(BIN)/opsqueue demo $(DEMO)

test: $(VENV)/.installed-test ## the whole test suite, by two processes: most tests wait for servers to start
	@$(BIN)/python -m pytest -n 3 --dist loadfile

check: $(VENV)/.installed-test ## ruff, mypy --strict, and pyright as programs see the types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-test ## what ruff can put right by itself
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(VENV)/.installed-generator ## measure every subject at a small size, beside the reference implementation (2 min); BENCH="--only idle"
	@$(BIN)/python -m load_tests.bench --quick $(BENCH)

bench-full: $(VENV)/.installed-generator ## measure every row of docs/benchmarks.md at its size (half an hour)
	@$(BIN)/python -m load_tests.bench --full $(BENCH)

bench-peers: $(VENV)/.installed-bench ## compare with redis, beanstalkd and PostgreSQL, those that are installed
	@$(BIN)/python -m load_tests.bench_peers $(BENCH)

bench-sizes: $(VENV)/.installed-bench ## one reservation as the backlog grows to a billion chunks, and the plot of it
	@$(BIN)/python -m load_tests.bench_sizes --svg docs/reservations.svg $(BENCH)

load: $(VENV)/.installed-bench ## locust's page with producers and consumers; LOAD="--headless -u 20 -r 20 -t 1m" runs without it
	@$(BIN)/python -m load_tests.load $(LOAD)

build: $(VENV)/.installed ## install the package into .venv and compile what has changed

docs: $(VENV)/.installed-test ## write what is generated: docs/configuration.md, and the pages with the API reference in build/docs
	@$(BIN)/python -m opsqueue.server.settings_doc > docs/configuration.md
	@rm -rf build/docs
	@$(BIN)/python -m docs_site.build build/docs

clean: ## remove .venv and everything that was compiled
	rm -rf $(VENV) build *.egg-info
	rm -f opsqueue/_speedups/*.so opsqueue/_speedups/*.c load_tests/*.so load_tests/*.c

# Each names what is missing and the command that installs it, in one line.
prerequisites:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "Python 3.11 or later is missing ($(PYTHON)): apt-get install python3 python3-venv python3-dev"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$$($(PYTHON) -V) is too old, 3.11 or later is needed: apt-get install python3.11-venv python3.11-dev, then make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	@command -v cc >/dev/null || command -v gcc >/dev/null || \
	  { echo "a C compiler is missing: apt-get install gcc libc6-dev"; exit 1; }
	@test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || \
	  { echo "Python's header files (Python.h) are missing: apt-get install python3-dev"; exit 1; }

$(BIN)/python:
	@$(MAKE) --no-print-directory prerequisites
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	@echo "installing opsqueue into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-test: $(SOURCES) | $(BIN)/python
	@echo "installing opsqueue and its tools into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-generator: load_tests/generator.pyx $(VENV)/.installed-test
	@$(BIN)/cythonize -q -i -3 load_tests/generator.pyx
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed-generator
	@echo "installing what the load tests need into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@
