#!/usr/bin/env bash
# The tests on the lowest versions that pyproject.toml claims: scripts/lower_bounds.sh [PYTEST ARGUMENT ...]
# PYTHON names the interpreter. KEEP="torch triton" takes constraints.txt's versions of these, where the lowest build
# cannot be had.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
bin=$work/venv/bin
# shellcheck disable=SC2086
"$bin/python" scripts/lower_bounds.py test datasets search ${KEEP:+$(printf -- '--keep %s ' $KEEP)} > "$work/lowest.txt"
"$bin/pip" --disable-pip-version-check install --quiet --requirement "$work/lowest.txt"
"$bin/pip" --disable-pip-version-check install --quiet --no-deps --editable .
"$bin/pip" --disable-pip-version-check check
OMP_NUM_THREADS=1 "$bin/python" -m pytest -q -n 2 "$@"
