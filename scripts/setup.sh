#!/usr/bin/env bash
# setup.sh VENV: a virtual environment with the locked packages and both distributions, editable.
set -euo pipefail
venv=$1

usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local name names=${PYTHON:-python3.14 python3.13 python3.12 python3.11 python3}
    # A name on the PATH may be a version manager's shim that refuses to start: each one is tried.
    for name in $names; do
        if usable "$name"; then
            echo "$name"
            return
        fi
    done
    {
        echo "error: no Python of at least 3.11 with the venv module was found (tried: $names)."
        echo "Install one (Debian and Ubuntu: python3 and python3-venv), or name one: make setup PYTHON=/path/to/python"
    } >&2
    return 1
}

install() {
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@"
}

if ! usable "$venv/bin/python"; then
    python=$(find_python)
    echo "setup: creating $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi
echo "setup: installing the packages of requirements.lock (the first time this takes a few minutes)"
install --progress-bar off --requirement requirements.lock | sed -E '/^(Requirement already satisfied|Looking in )/d' | cut -c1-160
echo "setup: installing d2o-serve and d2o-client from this folder"
install --quiet --no-deps --no-build-isolation --editable . --editable client
echo "setup: ready"
