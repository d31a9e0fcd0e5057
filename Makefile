# Every target creates .venv if it does not exist. Other pytest options: make test PYTEST_ARGS="-k newton".
PYTHON ?= python3
# loadfile: tests of one file share compiled programs, which would otherwise be compiled by each worker. A restarted worker
# repeats the test that crashed the last one, so one restart is enough.
PYTEST_ARGS ?= -n 2 --dist loadfile --max-worker-restart 1
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test test-slow coverage test-legs lint notebooks notebook-outputs docs counts gpu-counts bench peers clean

demo: $(STAMP)
	$(BIN)/python -m pmcmc demo

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# Reports the lines that `make test` executes.
coverage: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS) --cov=pmcmc --cov-report=term-missing:skip-covered

# Runs a short test file under other Pythons and package versions, if this machine has those Pythons.
test-legs: leg-newest leg-colab
leg-%:
	.ci/leg $*

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Runs every notebook at small size, two at a time. The committed outputs do not change.
notebooks: $(STAMP)
	ls notebooks/*.ipynb | PMCMC_SMALL=1 xargs -n 1 -P 2 $(BIN)/python -m nbconvert --log-level ERROR --execute \
		--to notebook --output-dir build/notebooks

# Regenerates the notebooks with outputs from their scripts; NOTEBOOKS=notebooks/gibbs.py selects one.
NOTEBOOKS ?= notebooks/*.py
notebook-outputs: $(STAMP)
	$(BIN)/python -m jupytext --quiet --to ipynb $(NOTEBOOKS)
	$(BIN)/python -m nbconvert --log-level ERROR --execute --inplace --ExecutePreprocessor.record_timing=False \
		$(patsubst %.py,%.ipynb,$(wildcard $(NOTEBOOKS)))

# Fails if a critical path, a number of compilations or the memory of a program has grown.
counts: $(STAMP)
	$(BIN)/python -m benchmarks.counts

# Compiles programs for an H100, in an environment of its own with the CUDA plugin and ptxas (225 MB to download), and fails
# if a step asks more of the card or of the host than before. Several versions of jax stand beside each other:
# make gpu-counts GPU_JAX=0.10.2. GPU_ARGS=--save writes the counts anew. jax 0.11 needs Python 3.12.
GPU_JAX ?= 0.11.2
GPU_PYTHON ?= python3.12
GPU_VENV := build/gpu-$(GPU_JAX)
gpu-counts: $(GPU_VENV)/.installed
	JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 $(GPU_VENV)/bin/python -m benchmarks.gpu_programs $(GPU_ARGS)

$(GPU_VENV)/.installed:
	test -x $(GPU_VENV)/bin/python || $(GPU_PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install -qq --disable-pip-version-check jax==$(GPU_JAX) jaxlib==$(GPU_JAX) \
		jax-cuda12-plugin==$(GPU_JAX) jax-cuda12-pjrt==$(GPU_JAX) nvidia-cuda-nvcc-cu12 numpyro blackjax jaxtyping
	touch $@

# Strict: any warning fails the build, including broken links and unknown names. Nothing is executed or fetched.
docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html -d build/doctrees docs build/docs

# Runs a small subset in about 5 minutes into build/benchmarks. For the full suites: .venv/bin/python -m benchmarks --help
bench: $(STAMP)
	$(BIN)/python -m benchmarks

# The samplers that benchmarks.whole_call compares with, in an environment of their own. pystan has wheels for x86-64 Linux
# and compiles models with g++. If Python 3.12 has another name: make peers PEERS_PYTHON=NAME.
PEERS_PYTHON ?= python3.12
peers:
	test -x build/peers/bin/python || $(PEERS_PYTHON) -m venv build/peers
	build/peers/bin/python -m pip install -qq --disable-pip-version-check nutpie pymc numba pystan setuptools

# Keeps .venv, which is slow to rebuild; remove it by hand if needed.
clean:
	rm -rf .coverage .pytest_cache .mypy_cache .ruff_cache build demo-output *.egg-info
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

# Reinstalls only if pyproject.toml has changed. -qq: show errors only.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev]'
	touch $@
