# Run `make` for the list of targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
# What the demonstration needs, which is there in a third of the time; the whole, once that is there.
BENCH_STAMP := $(VENV)/.stamp-bench
DEMO_STAMP := $(if $(wildcard $(STAMP)),$(STAMP),$(BENCH_STAMP))
# -qq keeps errors, and drops pip's notes about the caller's own configuration.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
FASHION_MNIST := /usr/share/datasets/fashion-mnist

.PHONY: help setup data demo test test-quick test-torch test-models test-slow wheel sanitize lint format docs bench-kernels readme clean

help: ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1\t\2/p' Makefile | expand -t 14

setup: $(STAMP) ## Create .venv with torch, the tools and gls_fused (editable, native extension built)
	@:

SOURCES := pyproject.toml setup.py requirements-build.txt constraints.txt $(shell find csrc -type f)

$(STAMP): $(SOURCES)
	$(venv)
	@$(PIP) --no-build-isolation -e '.[dev]'
	@$(BIN)/python -c 'from runpy import run_path; \
	  built = run_path("gls_fused/_build_info.py"); \
	  kinds = {"native extension": built["native_failure"], "CUDA kernels": built["cuda_failure"]}; \
	  [print(f"setup: without the {kind}: {why}. Once mended, run `make clean setup`") \
	   for kind, why in kinds.items() if why]'
	@touch $@

# The demonstration runs on the CPU: nvcc's minutes are left to `make setup`.
$(BENCH_STAMP): $(SOURCES)
	$(venv)
	@GLS_FUSED_CUDA=0 $(PIP) --no-build-isolation -e '.[bench]'
	@$(BIN)/python -c 'from runpy import run_path; \
	  why = run_path("gls_fused/_build_info.py")["native_failure"]; \
	  why and print(f"demo: without the native extension: {why}. Once mended, run `make clean demo`")'
	@touch $@

define venv
	@[ -x $(BIN)/pip ] || { echo "setup: creating $(VENV), which takes minutes"; $(PYTHON) -m venv $(VENV); }
	@$(PIP) -r requirements-build.txt
endef

data: ## Install Fashion-MNIST, as Debian's package, where apt-get can
	@[ -f $(FASHION_MNIST)/train-images-idx3-ubyte.gz ] || { \
	  apt() { $$( [ "$$(id -u)" = 0 ] || echo sudo -n ) env DEBIAN_FRONTEND=noninteractive apt-get -qq \
	    -o Acquire::Retries=1 -o Acquire::http::Timeout=20 "$$@"; }; \
	  install() { apt install -y --no-install-recommends dataset-fashion-mnist; }; \
	  { install || { apt update && install; }; } >/dev/null 2>&1 </dev/null || \
	    echo "data: no Fashion-MNIST: could not install the Debian package dataset-fashion-mnist"; }

demo: $(DEMO_STAMP) data ## Run the demonstration; its last line is the report's path
	@$(BIN)/python -m benchmarks demo

# A test uses one thread. Tests of one file share what they compile.
WORKERS := -n auto --maxprocesses 4 --dist loadfile

test: lint test-quick ## Lint, then run the quick tests

test-quick: setup ## Run the quick tests
	@$(BIN)/python -m pytest $(WORKERS) -m "not slow"
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest $(WORKERS) -m "not slow" tests/backends/triton

# Of build/, only what was compiled may be older than the checkout.
wheel: setup ## Build dist/gls_fused-*.whl, for the torch of .venv, which needs no compiler
	@rm -rf build/lib.* build/bdist.* dist
	@GLS_FUSED_NATIVE=1 GLS_FUSED_WHEEL=1 $(BIN)/python -m pip wheel -qq --no-build-isolation --no-deps -w dist .
	@ls dist/*.whl

# In a copy of the checkout, whose own library is for another torch, with an environment of its own. NumPy
# as the interpreter of triton 3.6 and earlier takes it; torchvision is pip's choice, as it is tied to torch.
COPY := build/torch-$(TORCH)
test-torch: ## Run the quick tests with another torch, as `make test-torch TORCH=2.11`
	@[ -n "$(TORCH)" ] || { echo "test-torch: name a release of torch, as in TORCH=2.11"; exit 1; }
	@mkdir -p $(COPY)
	@find $(COPY) -type f ! -name '*.so' ! -name _build_info.py -delete
	@tar -c --exclude='./.venv*' --exclude=./build --exclude=./results --exclude=./.git --exclude='.*_cache' \
	  --exclude=__pycache__ --exclude='*.so' --exclude=_build_info.py . | tar -x -C $(COPY)
	@sed -i -e 's/^torch==.*/torch==$(TORCH).*\nnumpy<2.3/' -e '/^torchvision==/d' $(COPY)/constraints.txt
	@touch -r constraints.txt $(COPY)/constraints.txt
	@$(MAKE) --no-print-directory -C $(COPY) VENV=$(CURDIR)/.venv-torch-$(TORCH) test-quick

test-models: setup ## Run the tests of real models, the slow ones too
	@$(BIN)/python -m pytest $(WORKERS) tests/models

test-slow: setup ## Run the slow tests
	@$(BIN)/python -m pytest $(WORKERS) -m slow
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest $(WORKERS) -m slow tests/backends/triton

# Built apart from the package; ASan's runtime must be loaded before Python. Python and torch leak by
# design, and torch frees with `delete` what it allocated otherwise.
sanitize: setup ## Run the kernels' tests with AddressSanitizer and UndefinedBehaviorSanitizer
	@GLS_FUSED_NATIVE=1 GLS_FUSED_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitize \
	  --build-lib build/sanitize/lib >build/sanitize.log 2>&1 || { tail -n 30 build/sanitize.log; exit 1; }
	@LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 \
	  $(BIN)/python -m pytest -p no:cacheprovider -o "pythonpath=build/sanitize/lib tests tests/backends" \
	  -m "not slow" tests/backends/test_backends.py tests/backends/native
	@$(BIN)/python -m pytest -m slow tests/backends/cuda/test_sanitized.py

lint: docs ## Check style, format, types and the direction of imports, and build the site
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy --no-error-summary
	@found=$$($(BIN)/lint-imports --no-cache --no-logo 2>&1) || { echo "$$found"; exit 1; }

# A link, an anchor or a name in a docstring that leads nowhere is an error: a warning to mkdocs, which
# counts none under --quiet. The variable silences a note of the theme's on its own future.
docs: setup ## Build the site of docs/ and the docstrings: build/site/index.html
	@mkdir -p build
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict >build/site.log 2>&1 || { cat build/site.log; exit 1; }

format: setup ## Rewrite the Python files in the house format
	@$(BIN)/ruff check --quiet --fix
	@$(BIN)/ruff format --quiet

bench-kernels: setup ## Time every op against the machine's ceilings
	@$(BIN)/python -m benchmarks kernels

readme: setup ## Rewrite the tables of README and docs/ from benchmarks/published
	@$(BIN)/python -m benchmarks readme

clean: ## Remove what was built and cached; environments and results/ stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@rm -f gls_fused/*.so gls_fused/_build_info.py $(STAMP) $(BENCH_STAMP)
	@find gls_fused tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
