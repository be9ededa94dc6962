# Needs nothing but make and Python 3.10 or newer.
PYTHON ?= python3
DEMO_VENV := .venv-demo
EXAMPLE := examples/efficientnet_lite
DEMO_PYTHON := $(DEMO_VENV)/bin/python

DEMO_TF_VENV := .venv-demo-tf
EXAMPLE_TF := examples/efficientnet_lite_tf
DEMO_TF_PYTHON := $(DEMO_TF_VENV)/bin/python

TEST_VENV := .venv-test

BOTH_VENV := .venv-example-both
FASHION_MNIST := .cache/fashion-mnist

.PHONY: help test demo demo-tf bench example-torch-calibration example-torch-retraining example-tf-calibration \
	example-tf-retraining example-both example-data

help:
	@echo 'make test    the whole test matrix, by tox (python3.10, python3.11 and python3.12 are needed)'
	@echo 'make demo    a real network from strategy file to deployed model; options: make demo ARGS="--range mse"'
	@echo 'make demo-tf the same in a TensorFlow session; also: make demo-tf ARGS="--compare demo_output/quant_params.json"'
	@echo 'make example-torch-calibration, example-torch-retraining, example-tf-calibration, example-tf-retraining, example-both'
	@echo '             small examples on Fashion-MNIST (examples/README.md); on made-up pictures: ARGS=--smoke'
	@echo 'make bench   cost and accuracy on that network'

# Two rows at a time. One environment or part of it: make test ARGS="-e py311-torch -- -k export"
test: $(TEST_VENV)/.installed
	$(TEST_VENV)/bin/tox run-parallel --parallel 2 --parallel-live $(ARGS)

$(TEST_VENV)/.installed: Makefile
	$(PYTHON) -m venv --clear $(TEST_VENV)
	$(TEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check 'tox>=4.11'
	@touch $@

demo: $(DEMO_VENV)/.installed
	$(DEMO_PYTHON) $(EXAMPLE)/demo.py $(ARGS)

demo-tf: $(DEMO_TF_VENV)/.installed
	$(DEMO_TF_PYTHON) $(EXAMPLE_TF)/demo.py $(ARGS)

example-torch-calibration: $(DEMO_VENV)/.installed example-data
	$(DEMO_PYTHON) examples/torch_fashion_mnist/calibrate.py $(ARGS)

example-torch-retraining: $(DEMO_VENV)/.installed example-data
	$(DEMO_VENV)/bin/torchrun --nproc_per_node 2 examples/torch_fashion_mnist/retrain.py $(ARGS)

example-tf-calibration: $(DEMO_TF_VENV)/.installed example-data
	$(DEMO_TF_PYTHON) examples/tf_fashion_mnist/calibrate.py $(ARGS)

example-tf-retraining: $(DEMO_TF_VENV)/.installed example-data
	$(DEMO_TF_PYTHON) examples/tf_fashion_mnist/retrain.py $(ARGS)

example-both: $(BOTH_VENV)/.installed example-data
	$(BOTH_VENV)/bin/python examples/both_frameworks/same_numbers.py $(ARGS)

# Debian's package with the pictures, unpacked here rather than installed; not needed with ARGS=--smoke
example-data:
ifeq ($(findstring --smoke,$(ARGS))$(findstring --data,$(ARGS))$(wildcard /usr/share/datasets/fashion-mnist $(FASHION_MNIST)/usr),)
	@command -v apt-get >/dev/null || { echo 'error: the pictures are a package of Debian, and there is no apt-get here: give ARGS="--data FOLDER" with the four IDX files, or ARGS=--smoke'; exit 1; }
	mkdir -p $(FASHION_MNIST)
	cd $(FASHION_MNIST) && apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb .
endif

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

$(BOTH_VENV)/.installed: pyproject.toml plugins/dopt_torch/pyproject.toml plugins/dopt_tf/pyproject.toml $(EXAMPLE)/requirements.txt $(EXAMPLE_TF)/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: $(PYTHON) is Python %d.%d; 3.10 or newer is needed: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv --clear $(BOTH_VENV)
	$(BOTH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check 'pip>=22'
	$(BOTH_VENV)/bin/python -m pip install --disable-pip-version-check -e . -e plugins/dopt_torch -e plugins/dopt_tf -r $(EXAMPLE)/requirements.txt -r $(EXAMPLE_TF)/requirements.txt
	@touch $@
