# `make` or `make help` lists the targets. `setup` makes .venv; everything else stands on it.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.qwenrun-setup

# The repo root must stay off sys.path: transformers takes our kernels/ for a package of Hugging Face's
# of the same name.
export PYTHONSAFEPATH := 1
export TOKENIZERS_PARALLELISM := false

# Where there is no NVIDIA driver the CPU build of torch is enough, and gigabytes smaller. Triton is only
# needed beside a card (and by later checks of the GPU kernels).
TORCH_PIN := torch==2.13.0
# What the kernels for cards were interpreted and compiled with. On a card torch brings its own.
TRITON_PIN := triton==3.9.0
CPU_INDEX := https://download.pytorch.org/whl/cpu
ARGS ?=
DEMO_MODEL := qwenrun/demo/model
DEMO_PACK := build/demo.pack

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-model demo-eval demo-importance test test-gpu lint type fmt bench bench-budget bench-gpu bench-peer torture gpu-aot gpu-traffic sanitize synth docs wheel clean

# What `make synth` writes, and where; what the budget and peer benchmarks run on.
MODEL ?= 122b
LAYERS ?= 4
EXPERTS ?= 256
RECIPE ?= int4
SKEW ?= 0
OUT ?= build/synth.pack
BENCH := build/bench
PEER_VENV ?= build/peer-venv
LIMIT ?= none,1500MiB,1000MiB

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything the other targets need

$(STAMP): pyproject.toml Makefile setup.py $(wildcard kernels/cpu/csrc/*)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: qwenrun needs Python 3.11 or newer, $(PYTHON) is older" >&2; \
	       echo "hint: make setup PYTHON=python3.12" >&2; exit 1; }
	$(BIN)/pip install --quiet --upgrade pip 'setuptools>=77'
	@if [ -e /proc/driver/nvidia/version ]; then \
	  $(BIN)/pip install --quiet 'torch>=2.13' triton; \
	else \
	  $(BIN)/pip install --quiet $(TORCH_PIN)+cpu --index-url $(CPU_INDEX) 2>/dev/null \
	    || $(BIN)/pip install --quiet $(TORCH_PIN); \
	  $(BIN)/pip install --quiet $(TRITON_PIN) || true; \
	fi
	$(BIN)/pip install --quiet --no-build-isolation -e '.[test,dev]'
	@touch $@

demo: setup ## quantize the embedded model, show its memory, ask it two questions
	@set -e; run() { \
	  printf '\n$$ qwenrun'; \
	  for word in "$$@"; do case $$word in *' '*) printf ' "%s"' "$$word";; *) printf ' %s' "$$word";; esac; done; \
	  echo; $(BIN)/qwenrun "$$@"; }; \
	run quantize $(DEMO_MODEL) -o $(DEMO_PACK) --force; \
	run vram $(DEMO_PACK) --ctx 1k,4k; \
	run chat -m $(DEMO_PACK) -p "What is qwenrun?"; \
	run chat -m $(DEMO_PACK) -p "How many experts does the 122B have?" --stats; \
	run bench -m $(DEMO_PACK)

demo-model: setup ## train the embedded demo model again (CPU, under an hour)
	$(BIN)/python -m qwenrun.demo.train $(ARGS)

demo-eval: setup ## exact answers of the embedded model: bf16, balanced, nvfp4, int4
	@set -e; $(BIN)/qwenrun eval; \
	for recipe in balanced nvfp4 int4; do \
	  $(BIN)/qwenrun quantize $(DEMO_MODEL) -o build/demo-$$recipe.pack --recipe $$recipe --force --quiet >/dev/null; \
	  $(BIN)/qwenrun eval -m build/demo-$$recipe.pack; \
	done

demo-importance: setup ## what importance gains on the embedded model: packs made with and without it, beside bf16
	@mkdir -p build
	$(BIN)/python -m qwenrun.demo.dataset 7 400 > build/demo.txt
	$(BIN)/qwenrun observe build/demo.txt -o build/demo.importance --force --quiet
	@set -e; for recipe in balanced nvfp4 int4; do for with in "" "--importance build/demo.importance"; do \
	  echo "== $$recipe $$with"; \
	  $(BIN)/qwenrun quantize $(DEMO_MODEL) -o build/demo-importance.pack --recipe $$recipe $$with --force --quiet >/dev/null; \
	  $(BIN)/qwenrun eval -m build/demo-importance.pack --beside $(DEMO_MODEL) --quiet | sed '/^missed/,$$d'; \
	done; done

test: setup ## run the tests
	$(BIN)/pytest $(ARGS)

lint: setup ## ruff, and that the generated pages are up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python docs/generate.py --check

fmt: setup ## format and fix what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: setup ## mypy, on a folder of links laid out as the installed package is
	@rm -rf build/house && mkdir -p build/house/qwenrun
	@for f in qwenrun/*; do ln -s "$(CURDIR)/$$f" build/house/qwenrun/; done
	@ln -s "$(CURDIR)/quant" "$(CURDIR)/kernels" build/house/qwenrun/
	cd build/house && MYPYPATH=. $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p qwenrun

bench: setup ## prefill and decode speed of the demo model, bf16 beside its quantized packs
	@set -e; $(BIN)/qwenrun bench; \
	for recipe in balanced nvfp4 int4; do \
	  $(BIN)/qwenrun quantize $(DEMO_MODEL) -o build/demo-$$recipe.pack --recipe $$recipe --force --quiet >/dev/null; \
	  $(BIN)/qwenrun bench -m build/demo-$$recipe.pack; \
	done

synth: setup ## a pack of random weights: MODEL= LAYERS= EXPERTS= RECIPE= SKEW= OUT=
	$(BIN)/python -m qwenrun.measure.synth $(OUT) --model $(MODEL) --layers $(LAYERS) --experts $(EXPERTS) \
	  --recipe $(RECIPE) --skew $(SKEW) $(ARGS)

bench-budget: setup ## speed inside 25, 50, 75 and 100 % of the memory, even and skewed routing (13 GB of disk)
	@mkdir -p $(BENCH)
	@test -e $(BENCH)/even.pack || $(BIN)/python -m qwenrun.measure.synth $(BENCH)/even.pack --layers 4 --recipe int4
	@test -e $(BENCH)/skewed.pack \
	  || $(BIN)/python -m qwenrun.measure.synth $(BENCH)/skewed.pack --layers 4 --recipe int4 --skew 1
	$(BIN)/python -m qwenrun.measure.budget $(BENCH)/even.pack $(BENCH)/skewed.pack $(ARGS)

$(PEER_VENV)/bin/python:
	$(PYTHON) -m venv $(PEER_VENV)
	CMAKE_ARGS="-DGGML_NATIVE=on -DLLAMA_CURL=off" $(PEER_VENV)/bin/pip install 'llama-cpp-python>=0.3.36'

# The kernels with the compiler's checks; the interpreter is not built with them, so their runtime is loaded first.
TSAN := ignore_noninstrumented_modules=1:exitcode=66
SANITIZERS := address,undefined thread
sanitize: setup ## the CPU kernels' tests under AddressSanitizer and UBSan, then ThreadSanitizer
	@set -e; mkdir -p build; for kind in $(SANITIZERS); do \
	  echo "== -fsanitize=$$kind"; \
	  $(CXX) -std=c++17 -O1 -g -fsanitize=$$kind -fno-sanitize-recover=undefined -ffp-contract=off -fPIC -shared \
	    -pthread kernels/cpu/csrc/*.cpp -o build/_kernels-sanitized.so; \
	  case $$kind in thread) runtime=libtsan.so;; *) runtime=libasan.so;; esac; \
	  LD_PRELOAD=$$($(CXX) -print-file-name=$$runtime) ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS=$(TSAN) \
	    QWENRUN_CPU_LIBRARY=build/_kernels-sanitized.so QWENRUN_THREADS=4 OMP_NUM_THREADS=1 \
	    $(BIN)/pytest -q -p no:cacheprovider tests/unit/test_ops.py tests/unit/test_cpu_kernels.py \
	    -k "cpu and not fork and not without_the_library and not number_of_threads and not avx512"; \
	done

bench-peer: setup $(PEER_VENV)/bin/python ## beside llama.cpp in the same memory (root, cgroup v1, 8 GB of disk): LIMIT=
	$(BIN)/python -m qwenrun.measure.peer make $(BENCH)/peer
	$(BIN)/python -m qwenrun.measure.peer run $(BENCH)/peer --python $(PEER_VENV)/bin/python --limit $(LIMIT) $(ARGS)

torture: setup ## quantize killed and out of disk at random moments, then gone on with: ARGS="--kills 50 --enospc 10 --seed 1"
	PYTHONPATH=tests $(BIN)/python tests/torture.py $(ARGS)

test-gpu: setup ## on a machine with an NVIDIA card: every kernel, the demo's logits, speeds, then the demo on the card
	$(BIN)/qwenrun selftest --device cuda
	$(BIN)/qwenrun bench --vram 4GiB

bench-gpu: setup ## on a machine with an NVIDIA card: what a layer of the 122B asks of it, op by op
	$(BIN)/python -m qwenrun.kernels.gpu.speed $(ARGS)

gpu-aot: setup ## compile every kernel for sm_80 to sm_120 without a card, and write docs/kernels.md
	$(BIN)/python -m qwenrun.kernels.gpu.aot --page docs/kernels.md $(ARGS)

gpu-traffic: setup ## count what decoding one token moves, interpreted (minutes), and write docs/traffic.md
	TRITON_INTERPRET=1 $(BIN)/python -m qwenrun.kernels.gpu.traffic --page docs/traffic.md $(ARGS)

docs: setup ## write the generated pages (docs/cli.md, docs/ops.md)
	$(BIN)/python docs/generate.py

wheel: setup ## build dist/*.whl
	@rm -rf build/lib build/bdist.*
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove what was built (not .venv)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
