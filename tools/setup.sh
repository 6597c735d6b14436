# shellcheck shell=bash
# Sourced by run.sh and test.sh, which have moved to the repository's root: finds a Python that has the pinned
# requirements, or makes one in .venv. Runs on bash 3.2, the one macOS ships.

unset PYTHONSAFEPATH  # with it Python does not look for modules in this folder, where ours are

trap 'exit 130' INT  # or a Ctrl-C that pip answers with an error of its own would be reported as a failed install

die() {  # die CODE MESSAGE...
    local code=$1
    shift
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit "$code"
}

# probe PYTHON FILE...: prints "ready" if PYTHON has every pin of these requirement files, "old" if it is older than
# 3.10, otherwise the first pin it lacks; prints nothing if PYTHON cannot be started.
probe() {
    "$1" - "${@:2}" 2>/dev/null <<'EOF' || true
import re, sys
if sys.version_info < (3, 10):
    sys.exit(print("old"))
from importlib import metadata

PIN = re.compile(r"""([\w.-]+)==([\w.+!]+)(?:\s*;\s*python_version\s*(<|>=)\s*["']3\.(\d+)["'])?""")
for path in sys.argv[1:]:
    for line in open(path):
        line = line.partition("#")[0].strip()
        if not line or line.startswith("-r "):  # the file it names is among our arguments too
            continue
        pin = PIN.fullmatch(line)
        if pin is None:
            sys.exit(print(f"expected name==version in {path}, found {line}"))
        name, wanted, sign, minor = pin.groups()
        if sign and (sys.version_info < (3, int(minor))) != (sign == "<"):
            continue  # a pin for other Pythons
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "none"
        if wanted not in (found, found.partition("+")[0]):  # 2.13.0 accepts 2.13.0+cpu
            sys.exit(print(f"expected {name} {wanted}, found {found}"))
print("ready")
EOF
}

# choose_python FILE...: sets $python to an interpreter that has everything these requirement files pin.
choose_python() {
    local candidate state="" base=""
    if [[ -n ${PYTHON:-} ]]; then
        state=$(probe "$PYTHON" "$@")
        [[ -n $state && $state != old ]] || die 2 "PYTHON=$PYTHON: expected a Python 3.10 or newer, found" \
            "${state:-nothing that starts}${state:+er than that}; name another one, or unset PYTHON."
        base=$PYTHON
    else
        for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
            state=$(probe "$candidate" "$@")
            if [[ -n $state && $state != old ]]; then
                base=$candidate
                break
            fi
        done
        [[ -n $base ]] || die 2 "expected Python 3.10 or newer on PATH, found none;" \
            "install one, or name it: PYTHON=/path/to/python ./${0##*/}"
    fi
    python=$base
    [[ $state != ready ]] || return 0

    [[ -z ${PYTHON:-} ]] || echo "PYTHON=$PYTHON: $state; using .venv" >&2
    python=.venv/bin/python
    ! venv_is_ready "$@" || return 0
    [[ -w . ]] || die 2 "expected a folder in which .venv can be made, found $PWD not writable;" \
        "copy the repository elsewhere, or set PYTHON to a Python that has requirements.txt installed."
    exec 9>.venv.lock  # of several starts at once, one installs and the others wait; the kernel frees it if we die
    "$base" - <<'EOF'
import fcntl, sys
try:
    try:
        fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("waiting for another start, which is installing into .venv", file=sys.stderr)
        fcntl.flock(9, fcntl.LOCK_EX)
except OSError as error:  # some network file systems
    print(f"note: no locks on this file system ({error.strerror}); start once only while .venv is made", file=sys.stderr)
EOF
    venv_is_ready "$@" || install_venv "$base" "$@"
    exec 9>&-
}

# .venv/installed.txt is written last, so it exists only after a complete install. It is the text of the installed
# requirement files, requirements.txt first, so a .venv that test.sh extended still suits run.sh.
venv_is_ready() {
    [[ -f .venv/installed.txt && $(cat .venv/installed.txt) == "$(cat "$@")"* && $(probe "$python" "$@") == ready ]]
}

# install_venv BASE FILE...: makes or updates .venv; the caller holds the lock.
install_venv() {
    local base=$1 files="${*:2}" file state
    local options=(--disable-pip-version-check)
    shift
    [[ -t 2 ]] || options+=(--quiet --quiet)  # errors only
    for file in "$@"; do options+=(-r "$file"); done
    echo "installing $files into .venv: once, a few minutes" >&2
    if [[ ! -f .venv/installed.txt || -z $(probe "$python" "$@") ]]; then  # no .venv, half of one, or its Python is gone
        "$base" -m venv --clear .venv >&2 || die 1 "expected '$base -m venv .venv' to work, found the error above;" \
            "install venv (Debian, Ubuntu: apt install python3-venv) or start from another Python: PYTHON=... ./${0##*/}"
    fi
    rm -f .venv/installed.txt
    "$python" -m pip install "${options[@]}" >&2 || die 1 "expected pip to install $files, found the error above;" \
        "check network and free disk space and start again, or from another Python: PYTHON=python3.12 ./${0##*/}" \
        "(on a Mac, torch needs Apple silicon and macOS 14)"
    state=$(probe "$python" "$@")
    [[ $state == ready ]] ||
        die 1 "after pip installed $files into .venv: $state; check the pins, remove .venv and start again."
    cat "$@" > .venv/installing.txt
    mv .venv/installing.txt .venv/installed.txt
}
