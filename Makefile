# Every target makes .venv from nothing if need be. Other pytest options: make test PYTEST_ARGS="-k newton".
PYTHON ?= python3
# loadfile: tests of one file share programs, which each worker would compile for itself. A new worker begins again with
# the test that ended the last one: once is enough.
PYTEST_ARGS ?= -n 2 --dist loadfile --max-worker-restart 1
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test test-slow coverage test-legs lint notebooks notebook-outputs docs counts bench clean

demo: $(STAMP)
	$(BIN)/python -m pmcmc demo

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# Which lines the tests of `make test` reach.
coverage: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS) --cov=pmcmc --cov-report=term-missing:skip-covered

# A short file of tests under other Pythons and packages, where this machine has them.
test-legs: leg-newest leg-colab
leg-%:
	.ci/leg $*

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Runs every notebook at small size, two at a time; the committed outputs stay as they are.
notebooks: $(STAMP)
	ls notebooks/*.ipynb | PMCMC_SMALL=1 xargs -n 1 -P 2 $(BIN)/python -m nbconvert --log-level ERROR --execute \
		--to notebook --output-dir build/notebooks

# Writes the notebooks anew from their scripts, with outputs: NOTEBOOKS=notebooks/gibbs.py for one of them.
NOTEBOOKS ?= notebooks/*.py
notebook-outputs: $(STAMP)
	$(BIN)/python -m jupytext --quiet --to ipynb $(NOTEBOOKS)
	$(BIN)/python -m nbconvert --log-level ERROR --execute --inplace --ExecutePreprocessor.record_timing=False \
		$(patsubst %.py,%.ipynb,$(wildcard $(NOTEBOOKS)))

# A gate: fails where a critical path, a number of compilations or a program's memory has grown.
counts: $(STAMP)
	$(BIN)/python -m benchmarks.counts

# Strict: any warning, a broken link or an unknown name among them, fails. Nothing is executed or fetched.
docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html -d build/doctrees docs build/docs

# A small subset, about 5 minutes, into build/benchmarks. In full: .venv/bin/python -m benchmarks --help
bench: $(STAMP)
	$(BIN)/python -m benchmarks

# Leaves .venv, which is slow to rebuild: remove it by hand for a fresh start.
clean:
	rm -rf .coverage .jax_cache .pytest_cache .mypy_cache .ruff_cache build demo-output *.egg-info
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

# Installs again only when pyproject.toml has changed since. -qq: errors only.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev]'
	touch $@
