#!/usr/bin/env bash
# Does all set-up and trains: ./run.sh [--track=NAME] [--field=value ...]; ./run.sh --help tells the rest.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # sh run.sh
set -euo pipefail
script=${BASH_SOURCE[0]}
while [[ -L $script ]]; do  # a symbolic link to it; macOS has no readlink -f
    target=$(readlink "$script")
    [[ $target == /* ]] || target=$(dirname "$script")/$target
    script=$target
done
cd "$(dirname "$script")"
# shellcheck source=tools/setup.sh
source ./tools/setup.sh

usage() {
    cat <<'EOF'
usage: ./run.sh [--track=NAME] [--field=value ...]

Installs requirements.txt into .venv unless python3 already has it, prepares the track's data, and trains on every GPU
of this machine (track small), or on its CPU cores where there is no GPU (track shakespeare). All arguments go to
train_gpt.py. Paths are relative to the repository. Ctrl-C stops all ranks within a minute.
Exit code: 0 done, 1 the run failed, 2 the command or its input must be changed, 130 Ctrl-C.

environment:
  PYTHON                the Python to use, 3.10 or newer (default: python3)
  NPROC                 ranks, one process each (default: one per GPU; without a GPU 2, or 1 on a single core)
  OMP_NUM_THREADS       threads of each rank (default: cores / ranks)
  GOMP_SPINCOUNT        rounds that an idle thread spins before it sleeps (default: 1000)
  CUDA_VISIBLE_DEVICES  GPUs to use; set it empty to train on the CPU
  DATA_PATH             folder in which data/shakespeare and data/fineweb10B lie (default: the repository); with
                        --train_files=... of your own nothing is downloaded

EOF
}

for argument in "$@"; do
    if [[ $argument == --help || $argument == -h ]]; then
        usage
        choose_python requirements.txt records/requirements.txt
        exec "$python" train_gpt.py --help
    fi
done
choose_python requirements.txt records/requirements.txt
exec "$python" -m tools.launch "$@"
