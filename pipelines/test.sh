#!/usr/bin/env bash
# Set up, then run every check: lint, format, types, tests. Options are passed on to pytest.
# All four always run; the status is that of the worst, the last lines are pytest's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash pipelines/setup.sh dev
python="${MICO_VENV:-.venv}/bin/python"
failed=

check() {
    local name=$1
    shift
    echo "== $name"
    "$python" -m "$@" || failed="$failed $name"
}

check lint ruff check .
check format ruff format --check .
check types mypy
if [ -n "$failed" ]; then echo "== failed before the tests:$failed"; fi
check tests pytest -q --durations=10 "$@"
[ -z "$failed" ]
