# make demo and make test do everything on a fresh machine with Python 3.10+ and a C++ compiler.
# PYTHON chooses the interpreter; VENV= (empty) uses that interpreter's own PyTorch and packages as they are.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0 triton==3.7.1
# The CUDA compiler for machines that have none (100 MB): CUDA kernels compile, and are tested to, on all of them.
NVCC ?= nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
# Tests run on all cores, a thread each; PARALLEL= (empty) runs them one by one, without pytest-xdist.
PARALLEL ?= -n auto
SOURCES := setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)

ifeq ($(VENV),)
RUN := PYTHONPATH=. $(PYTHON)
READY := .built
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

.PHONY: demo study test test-kernels lint gpu verify clean

demo: $(READY)  ## train a small DTR-DiT on real digits, sample from it, compare fused and plain blocks: out/demo
	$(RUN) -m examples.demo --out out/demo

study: $(READY)  ## train with and without each method, compare: out/study and docs/study (QUICK=--quick: tiny, in a minute)
	$(RUN) -m benchmarks study $(QUICK)

test: $(READY) lint test-kernels  ## everything that needs no GPU

test-kernels: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -rs $(PARALLEL) $(if $(PARALLEL),--dist loadfile) tests
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(RUN) -m pytest -q $(PARALLEL) tests/test_ops.py -m "not gpu"

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

verify: $(READY)  ## kernels against the oracle on this machine
	$(RUN) -m dtr_kernels verify

# On a machine that has CUDA PyTorch, Triton, pytest and nvcc and can install nothing. OUT gets results and a summary.
OUT ?= out/gpu
gpu:  ## builds in the checkout, tests, checks every kernel with compute-sanitizer, measures; in under 9 minutes
	$(PYTHON) .ci/gpu $(OUT)

$(VENV)/.ready: pyproject.toml $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet $(TORCH)
	command -v nvcc || test -x "$$CUDA_HOME/bin/nvcc" || $(RUN) -m pip install --quiet $(NVCC) \
		|| echo "no CUDA compiler: CUDA kernels are not built"
	$(RUN) -m pip install --quiet --editable '.[demo,test]'
	touch $@

# Without a virtual environment the extension is built in place and nothing is installed.
.built: $(SOURCES)
	$(PYTHON) setup.py build_ext --inplace || echo "no compiled kernels: install setuptools, pybind11 and ninja"
	touch $@

clean:
	rm -rf .venv .built build out *.egg-info dtr_kernels/_C*.so
