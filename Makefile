# Every target sets itself up from nothing: python >= 3.10 and g++ are enough. Try `make help`.

PYTHON ?= python3
# What to build against and run on; a CPU build of torch where your package index has one: make test TORCH=torch==2.13.0+cpu
TORCH ?= torch==2.13.0
VENV ?= .venv
# The CUDA version that nvcc and a wheel are of (make wheel CUDA=13.0). Where it is not given a wheel is for CPUs, and the
# CUDA kernels are built where NVIDIA's driver is.
CUDA ?=
export FASTNETS_CUDA ?= $(if $(CUDA)$(wildcard /proc/driver/nvidia/version),1,0)
# Options for the command behind a target: make bench ARGS='--op conv --threads 1', make test ARGS='-x -k softmax'
ARGS ?=

IN_VENV := $(VENV)/bin/python
PIP := $(IN_VENV) -m pip install --quiet --disable-pip-version-check
CXX_SOURCES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install bench test sanitize triton-offline wheel testwheel lint format clean

help:  ## what there is to make
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

$(VENV)/.needs: Makefile  # what the build needs; it runs without isolation, against the torch that is installed here
	$(PYTHON) -m venv $(VENV)
	$(PIP) 'setuptools>=77' wheel ninja pybind11 '$(TORCH)'
	@touch $@

$(VENV)/.toolchain: $(VENV)/.needs csrc/cuda/toolchain.txt  # nvcc
	$(PIP) $(if $(CUDA),$$(sed -n '/^nvidia-cuda-cccl/{p;d};s/==.*/==$(CUDA).*/p' csrc/cuda/toolchain.txt),-r csrc/cuda/toolchain.txt)
	@touch $@

# Editable: Python files are used where they are, only csrc/ and the metadata ask for a new build (an incremental one).
$(VENV)/.installed: $(VENV)/.needs $(if $(filter 1,$(FASTNETS_CUDA)),$(VENV)/.toolchain) setup.py pyproject.toml $(CXX_SOURCES)
	$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.with-%: $(VENV)/.installed
	$(PIP) --no-build-isolation --editable '.[$*]'
	@touch $@

# The Triton kernels' interpreter on the CPU reads the IR of one version of Triton; its metadata asks for a newer Python than
# it needs. Before Python 3.11 there is none: its tests are skipped and say so.
$(VENV)/.interpreter: $(VENV)/.with-test,networks
	@if $(IN_VENV) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	  $(PIP) --no-deps --ignore-requires-python triton==3.8.0 ttsem==0.1.0; \
	else echo 'Python is older than 3.11: the Triton kernels stay untested.'; fi
	@touch $@

# Tests run the CUDA kernels too, on the SIMT device.
$(VENV)/.with-test,networks: export FASTNETS_SIMT = 1

install: $(VENV)/.installed  ## create .venv, install what is needed, build the library

bench: $(VENV)/.with-networks  ## verify, then time everything beside PyTorch
	$(IN_VENV) -m fastnets bench $(ARGS)

# A process a core; passive, since the threads of several processes on few cores must not spin.
test: $(VENV)/.with-test,networks $(VENV)/.toolchain $(VENV)/.interpreter  ## run every test
	OMP_WAIT_POLICY=passive $(IN_VENV) -m pytest --numprocesses auto $(ARGS)

sanitize: $(VENV)/.with-test,networks  ## run the CUDA kernels under sanitizers, and without each barrier
	$(IN_VENV) tests/sanitizers.py $(ARGS)

$(VENV)/.wheel-tools: $(VENV)/.needs pyproject.toml
	$(PIP) rich $$(sed -n 's/^wheel = //p' pyproject.toml | tr -d '[]",')
	@touch $@

triton-offline: $(VENV)/.interpreter  ## compile the Triton kernels for four architectures and look at them, without a GPU
	$(IN_VENV) -m fastnets inspect --triton --static $(ARGS)

# The same commit in the same folder gives the same bytes: every time in the archive is the commit's. (nvcc makes names of
# the folder's.) CUDA_HOME's nvcc, where that is set, has to be of version CUDA: wheel-check compares.
wheel: export FASTNETS_CUDA = $(if $(CUDA),1,0)
wheel: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 315532800)
wheel: $(VENV)/.wheel-tools $(if $(CUDA),$(if $(CUDA_HOME),,$(VENV)/.toolchain))  ## a wheel for any Python >= 3.10 and torch >= 2.10, in dist/
	rm -rf build/wheel build/lib* build/bdist* && mkdir -p build/wheel dist
	$(IN_VENV) -W ignore setup.py --quiet egg_info --egg-base build/wheel --tag-build +$(if $(CUDA),cu$(subst .,,$(CUDA)),cpu) bdist_wheel --dist-dir build/wheel
	PATH="$(abspath $(VENV))/bin:$$PATH" $(IN_VENV) -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel/*.whl
	cd dist && PYTHONPATH="$$(ls -d $(CURDIR)/build/lib.*)" $(abspath $(IN_VENV)) -m fastnets wheel-check $$(cd ../build/wheel && ls *.whl | sed 's/-linux_.*//')-manylinux*.whl

WHEEL ?= $(lastword $(wildcard dist/*.whl))
testwheel:  ## test WHEEL=, by default the last in dist/, with TORCH=: in an environment and a folder of its own
	rm -rf build/testwheel && mkdir -p build/testwheel && cp -r tests pyproject.toml build/testwheel
	$(PYTHON) -m venv build/testwheel/venv
	build/testwheel/venv/bin/python -m pip install --quiet --disable-pip-version-check '$(TORCH)' '$(WHEEL)[test,networks]'
	cd build/testwheel && OMP_WAIT_POLICY=passive venv/bin/python -m pytest --numprocesses auto $(ARGS)

lint: $(VENV)/.with-dev  ## check style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(VENV)/.with-dev  ## mend style and formatting
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

clean:  ## remove what was built, .venv included
	rm -rf $(VENV) build dist fastnets.egg-info fastnets/*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
