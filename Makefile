# Needs nothing but make and Python 3.10 or newer.
PYTHON ?= python3
DEMO_VENV := .venv-demo
EXAMPLE := examples/efficientnet_lite
DEMO_PYTHON := $(DEMO_VENV)/bin/python

DEMO_TF_VENV := .venv-demo-tf
EXAMPLE_TF := examples/efficientnet_lite_tf
DEMO_TF_PYTHON := $(DEMO_TF_VENV)/bin/python

TEST_VENV := .venv-test

.PHONY: help test demo demo-tf bench

help:
	@echo 'make test    the whole test matrix, by tox (python3.10, python3.11 and python3.12 are needed)'
	@echo 'make demo    a real network from strategy file to deployed model; options: make demo ARGS="--range mse"'
	@echo 'make demo-tf the same in a TensorFlow session; also: make demo-tf ARGS="--compare demo_output/quant_params.json"'
	@echo 'make bench   cost and accuracy on that network'

# One environment or part of it: make test ARGS="-e py311-torch -- -k export"
test: $(TEST_VENV)/.installed
	$(TEST_VENV)/bin/tox $(ARGS)

$(TEST_VENV)/.installed: Makefile
	$(PYTHON) -m venv --clear $(TEST_VENV)
	$(TEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check 'tox>=4.11'
	@touch $@

demo: $(DEMO_VENV)/.installed
	$(DEMO_PYTHON) $(EXAMPLE)/demo.py $(ARGS)

demo-tf: $(DEMO_TF_VENV)/.installed
	$(DEMO_TF_PYTHON) $(EXAMPLE_TF)/demo.py $(ARGS)

bench: $(DEMO_VENV)/.installed
	mkdir -p benchmarks/results
	$(DEMO_PYTHON) benchmarks/cost.py --output benchmarks/results/cost.json
	$(DEMO_PYTHON) benchmarks/accuracy.py --output benchmarks/results/accuracy.json

# Environments of their own, each made anew when what is to be installed has changed
$(DEMO_VENV)/.installed: pyproject.toml plugins/dopt_torch/pyproject.toml $(EXAMPLE)/requirements.txt $(EXAMPLE)/requirements-no-deps.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: $(PYTHON) is Python %d.%d; 3.10 or newer is needed: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv --clear $(DEMO_VENV)
	$(DEMO_PYTHON) -m pip install --quiet --disable-pip-version-check 'pip>=22'
	$(DEMO_PYTHON) -m pip install --disable-pip-version-check -e . -e plugins/dopt_torch -r $(EXAMPLE)/requirements.txt
	$(DEMO_PYTHON) -m pip install --disable-pip-version-check --no-deps -r $(EXAMPLE)/requirements-no-deps.txt
	@touch $@

$(DEMO_TF_VENV)/.installed: pyproject.toml plugins/dopt_tf/pyproject.toml $(EXAMPLE_TF)/requirements.txt $(EXAMPLE_TF)/requirements-no-deps.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: $(PYTHON) is Python %d.%d; 3.10 or newer is needed: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv --clear $(DEMO_TF_VENV)
	$(DEMO_TF_PYTHON) -m pip install --quiet --disable-pip-version-check 'pip>=22'
	$(DEMO_TF_PYTHON) -m pip install --disable-pip-version-check -e . -e 'plugins/dopt_tf[tensorflow]' -r $(EXAMPLE_TF)/requirements.txt
	$(DEMO_TF_PYTHON) -m pip install --disable-pip-version-check --no-deps -r $(EXAMPLE_TF)/requirements-no-deps.txt
	@touch $@
