# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLD := $(VENV)/transformers-4.57
# x86-64 Linux without a GPU takes the CPU build of torch, never several GB of CUDA (elsewhere pip's own choice is small);
# set TORCH to choose another build.
NEEDS_CPU_BUILD := $(shell test "$$(uname -sm)" = "Linux x86_64" && ! command -v nvidia-smi >/dev/null 2>&1 && echo yes)
TORCH ?= $(if $(NEEDS_CPU_BUILD),torch==2.13.0+cpu,torch>=2.11)
export HF_HUB_OFFLINE = 1

.PHONY: setup demo test soak lint types bench gpu dist clean

setup: $(VENV)/.installed $(OLD)/.installed

# Runs again only when what it depends on changed: seconds otherwise.
$(VENV)/.installed: pyproject.toml setup.py $(wildcard csrc/*)
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel ninja packaging
	@$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet "$(TORCH)" || \
	  { echo "No CPU build of torch was found by pip. Say where it is: PIP_EXTRA_INDEX_URL=<the CPU index of PyTorch's install page> make setup,"; \
	    echo "or choose a build: make setup TORCH=torch  (on x86-64 Linux that is the CUDA build, several GB)."; exit 1; }
	@$(BIN)/python -c "import deepspeed" 2>/dev/null || DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-build-isolation "deepspeed>=0.19.8,<0.20"
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev,all]"
	@touch $@

# The other release of transformers that people have, with its clients, in a folder of its own: 260 MB, half a minute.
$(OLD)/.installed: tests/transformers-4.57.txt | $(VENV)/.installed
	@rm -rf $(OLD)
	$(BIN)/pip install --quiet --no-deps --target $(OLD) --requirement $<
	@touch $@

demo: setup
	$(BIN)/python -m benchmarks.demo

# Operators three times: as this processor runs them, what is C++ in the build for AVX2, what is Triton in its interpreter.
test: setup
	$(BIN)/python -m pytest -q
	ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest -q -m "cpp and not soak" tests/kernels
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m "triton and not soak" tests/kernels

# Faults for some three hours: killed ranks, half an hour of everything, fuzzing, 50 times the tests of interruptions. And what
# `make test` tries with the same cases each time, with random ones.
soak: setup
	@$(BIN)/pip install --quiet "atheris>=3" || echo "no atheris for this Python: fuzzing is not led by coverage"
	$(BIN)/python -m pytest -q -s -m soak --timeout 7200
	$(BIN)/python -m pytest -q -m "hypothesis and not soak" --hypothesis-profile=soak --timeout 7200
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m "triton and soak" --timeout 7200 tests/kernels
	$(BIN)/python -m tests.support.repeat 50 tests/run/test_interruptions.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# And what of the standard library macOS and Windows do not have.
types: setup
	$(BIN)/pyright
	$(BIN)/pyright --pythonplatform Darwin fastdistil
	$(BIN)/pyright --pythonplatform Windows fastdistil

# RESULTS=benchmarks/results puts what is measured among the results that are committed.
RESULTS ?= runs/bench
bench: setup
	$(BIN)/python -m pytest benchmarks/bench_*.py --ignore=benchmarks/bench_prepare.py -q -s --results $(RESULTS)
	$(BIN)/python -m benchmarks._harness $(RESULTS)
	$(BIN)/python -m benchmarks.bench_data --results $(RESULTS)
	$(BIN)/python -m benchmarks.step --results $(RESULTS)
	$(BIN)/python -m benchmarks.step --precision bf16 --results $(RESULTS)

# An sdist, and of it the wheel for any system: without csrc/, since it is built without torch.
dist:
	$(PYTHON) -m pip install --quiet --upgrade build
	$(PYTHON) -m build

gpu:
	python3 -m benchmarks.first_light runs/first-light

clean:
	rm -rf $(VENV) build *.egg-info fastdistil/*.so
