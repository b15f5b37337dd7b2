#!/usr/bin/env bash
# `make check` and `make test` on every Python that headwise supports: scripts/matrix.sh [VERSION ...]
# Each version gets a fresh virtual environment; one that is not installed is named and skipped. Exit code 1 where
# a version fails, 2 where none is there.
set -uo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=() failed=() missing=()

# The interpreter of a version: `python3.12` where that runs, else pyenv's, else uv's.
interpreter() {
    if "python$1" -c '' 2> /dev/null; then
        command -v "python$1"
    elif command -v pyenv > /dev/null && pyenv prefix "$1" > /dev/null 2>&1; then
        echo "$(pyenv prefix "$1")/bin/python"
    elif command -v uv > /dev/null; then
        uv python find "$1" 2> /dev/null
    fi
}

for version in "${@:-3.11 3.12 3.13}"; do
    for one in $version; do
        python=$(interpreter "$one")
        if [ -z "$python" ]; then
            missing+=("$one")
        elif make PYTHON="$python" VENV="$work/$one" check test; then
            passed+=("$one")
        else
            failed+=("$one")
        fi
        rm -rf "${work:?}/$one"
    done
done

echo "passed: ${passed[*]:-none}; failed: ${failed[*]:-none}; not installed, skipped: ${missing[*]:-none}"
[ ${#failed[@]} -eq 0 ] || exit 1
[ ${#passed[@]} -gt 0 ] || exit 2
