# Every target installs what it needs into .venv first; the second time that takes no time.
#
#   make demo                            prefill and decode in two processes, with a 2-bit KV cache between them
#   make demo ARGS="--link-gbps 10"      the same over a slower link; homkv demo --help lists the rest
#   make test                            all tests; ARGS="-k rope" for some
#   make test-vllm                       the plug-in in a real vLLM (CPU), in an environment of its own
#   make lint                            ruff, mypy, layering
#   make bench                           time attention on pages against the fastest torch call on unpacked KV
#   make doctor                          say what is here and what is missing
#   make clean                           remove .venv and everything built
#
# PYTHON=python3.12 names the Python to use, CXX=clang++ the compiler, PIP_ARGS="..." is added to pip install.

ARGS ?=
BIN := .venv/bin
# __init__.py: an editable install knows where each package lies, and has to be told when a module became one.
BUILD_INPUTS := pyproject.toml scripts/setup.sh $(wildcard CMakeLists.txt) \
	$(shell find homkv -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.inc' -o -name CMakeLists.txt \
		-o -name __init__.py)

export PYTHON CXX PIP_ARGS

.PHONY: help demo test test-vllm lint bench doctor setup clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

demo: setup
	@$(BIN)/homkv demo $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

test-vllm: setup
	@.ci/vllm

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: setup
	@$(BIN)/homkv bench attention $(ARGS)

doctor: setup
	@$(BIN)/homkv doctor $(ARGS)

setup: .venv/installed

.venv/installed: $(BUILD_INPUTS)
	@scripts/setup.sh

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
