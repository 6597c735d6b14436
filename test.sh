#!/usr/bin/env bash
# Does all set-up for the tests and runs them; arguments go to pytest: ./test.sh -k muon
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # sh test.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=tools/setup.sh
source ./tools/setup.sh
choose_python requirements.txt records/requirements.txt requirements-dev.txt

# Several tests at a time with one thread each: most start gloo processes of their own.
# TEST_WORKERS=0 runs them in this process, for a debugger.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m pytest -n "${TEST_WORKERS:-auto}" --maxprocesses=4 --dist=worksteal "$@"
