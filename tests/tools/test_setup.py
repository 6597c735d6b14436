"""run.sh, test.sh and tools/setup.sh: what is installed and when, on which systems they start.

Nothing is installed here. FAKE_PYTHON runs the real Python but finds packages only in a folder of its own,
where its pip writes bare metadata; so the scripts do all their own work, in a copy of the repository whose
requirements are invented.
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.files import ROOT

SCRIPTS = ["run.sh", "test.sh", "tools/setup.sh", ".ci/run"]

FAKE_PYTHON = """#!/usr/bin/env bash
here=$(cd "$(dirname "$0")/.." && pwd)
case "$*" in
"-m venv "*) echo venv >> calls.txt; rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
"-m pip install"*)
    echo pip >> calls.txt
    while [[ -n ${PIP_WAITS_FOR:-} && ! -e $PIP_WAITS_FOR ]]; do sleep 0.05; done
    while (($#)); do
        if [[ $1 == -r ]]; then
            while IFS== read -r name _ version; do
                mkdir -p "$here/site/$name-$version.dist-info"
                printf 'Name: %%s\\nVersion: %%s\\n' "$name" "$version" \\
                    > "$here/site/$name-$version.dist-info/METADATA"
                if [[ -n ${PIP_FAILS:-} ]]; then exit 1; fi  # half-way
            done < <(grep == "$2")
        fi
        shift
    done ;;
*) PYTHONPATH=$here/site exec '%s' "$@" ;;
esac
""" % sys.executable
SHOW_ARGUMENTS = "import json, sys; print(json.dumps(sys.argv[1:]))"
AWKWARD = ["--text=two words", "--glob=*", "--quotes=\"'$HOME", "--empty=", ""]


class Repo:
    """A copy of the scripts with invented requirements and a Python that is a stand-in."""

    def __init__(self, path: Path):
        self.path = path
        (path / "tools").mkdir()
        for name in ["run.sh", "test.sh", "tools/setup.sh"]:
            shutil.copy(ROOT / name, path / name)
        self.write("requirements.txt", "one==1.0\ntwo==2.0\n")
        self.write("records/requirements.txt", "# nothing more\n")
        self.write("requirements-dev.txt", "-r requirements.txt\n-r records/requirements.txt\nthree==3.0\n")
        self.write("tools/launch.py", SHOW_ARGUMENTS)
        self.write("pytest.py", SHOW_ARGUMENTS)
        self.write("train_gpt.py", "print('help of the trainer')")
        self.write("bin/python3", FAKE_PYTHON).chmod(0o755)

    def write(self, name: str, text: str) -> Path:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def install(self, name: str, version: str):
        """Give the stand-in for python3 a package."""
        self.write(f"site/{name}-{version}.dist-info/METADATA", f"Name: {name}\nVersion: {version}\n")

    def start(self, *command: str, **env: str) -> subprocess.Popen:
        private = ("PYTHON", "PYTHONPATH", "TEST_WORKERS")
        clean = {key: value for key, value in os.environ.items() if key not in private}
        clean["PATH"] = f"{self.path / 'bin'}:{clean['PATH']}"
        return subprocess.Popen(command, env={**clean, **env}, text=True, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, script: str, *args: str, **env: str) -> SimpleNamespace:
        process = self.start(str(self.path / script), *args, **env)
        out, err = process.communicate(timeout=60)
        return SimpleNamespace(code=process.returncode, out=out, err=err)

    def calls(self) -> list[str]:
        """What was asked of venv and pip since the last look."""
        log = self.path / "calls.txt"
        calls = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return calls


@pytest.fixture
def repo(tmp_path):
    return Repo(tmp_path)


def probe(python, *files) -> str:
    """The answer of setup.sh's function of that name."""
    script = f'source "{ROOT}/tools/setup.sh"; probe "$@"'
    command = ["bash", "-c", script, "-", python, *files]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_valid_bash(name):
    done = subprocess.run(["bash", "-n", ROOT / name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert name == "tools/setup.sh" or os.access(ROOT / name, os.X_OK), f"{name} must be executable"


# --- requirements

def pinned(name: str) -> list[str]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("-r ")]


def imported(file: Path, whole: bool) -> set[str]:
    """Names of the packages that a file imports: anywhere in it, or only when it is itself imported."""
    tree = ast.parse(file.read_text())
    modules = []
    for node in ast.walk(tree) if whole else tree.body:
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.append(node.module)
    return {module.partition(".")[0] for module in modules}


@pytest.mark.parametrize("name", ["requirements.txt", "records/requirements.txt", "requirements-dev.txt"])
def test_every_requirement_is_pinned_exactly(name):
    assert pinned(name)
    for line in pinned(name):
        assert re.fullmatch(r'\w[\w.-]*==\d[\w.]*(; python_version (<|>=) "3\.\d+")?', line), line


def test_pins_hold_in_this_python():
    files = "requirements.txt", "records/requirements.txt", "requirements-dev.txt"
    assert probe(sys.executable, *(ROOT / file for file in files)) == "ready"


TRAINER_ROOMS = (".", "data", "engine", "muon_extras", "tools")
PARTS = {"triton", "tiktoken_ext", "markupsafe"}  # of torch (for CUDA), of tiktoken, of jinja2
OPTIONAL = {"quack"}  # kernels for Muon on Hopper


def test_what_the_code_imports_is_pinned():
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    ours = rooms | {path.stem for path in ROOT.glob("*.py")}
    known = set(sys.stdlib_module_names) | ours
    for pins, folders in (("requirements.txt", TRAINER_ROOMS), ("records/requirements.txt", ("records",))):
        wanted = {line.partition("==")[0] for line in pinned(pins)}
        files = [file for folder in folders for file in (ROOT / folder).glob("*.py")]
        found = {str(file.relative_to(ROOT)): imported(file, whole=True) - known for file in files}
        strangers = {file: names - wanted - PARTS - OPTIONAL for file, names in found.items()}
        assert not any(strangers.values()), strangers
        unused = wanted - set().union(*found.values())
        assert not unused, f"{pins} pins what no file imports: {unused}"
    for file in [ROOT / "train_gpt.py", *ROOT.glob("muon*.py")]:
        needed = imported(file, whole=False) - known
        assert needed <= {"torch", "numpy"}, f"{file.name}: imports more than torch and numpy: {needed}"


@pytest.mark.parametrize("installed, pin, answer", [
    ("1.0", "one==1.0", "ready"),
    ("1.0+cpu", "one==1.0", "ready"),
    ("1.0+cpu", "one==1.0+cu126", "expected one 1.0+cu126, found 1.0+cpu"),
    ("1.0.1", "one==1.0", "expected one 1.0, found 1.0.1"),
    ("1.0", "one==1.0\n# a remark\n\ntwo==2.0  # another", "expected two 2.0, found none"),
    ("1.0", 'one==1.0; python_version >= "3.10"\none==9.0; python_version < "3.10"', "ready"),
    ("1.0", 'one==9.0; python_version >= "3.10"\none==1.0; python_version < "3.10"', "expected one 9.0, "
                                                                                     "found 1.0"),
    ("1.0", "one>=0.9", "expected name==version in requirements.txt, found one>=0.9"),
])
def test_probe_compares_versions(repo, monkeypatch, installed, pin, answer):
    repo.install("one", installed)
    repo.write("requirements.txt", pin)
    monkeypatch.chdir(repo.path)
    assert probe("bin/python3", "requirements.txt") == answer


# --- one installation, and only in .venv

def test_python_that_has_everything_is_used_as_it_is(repo):
    repo.install("one", "1.0")
    repo.install("two", "2.0")
    done = repo.run("run.sh", *AWKWARD)
    assert (done.code, json.loads(done.out), done.err) == (0, AWKWARD, "")
    assert repo.calls() == [] and not (repo.path / ".venv").exists()


def test_second_start_installs_nothing_and_a_new_pin_is_installed_once(repo):
    first = repo.run("run.sh", *AWKWARD)
    assert (first.code, json.loads(first.out)) == (0, AWKWARD), first.err
    assert "installing requirements.txt" in first.err
    assert repo.calls() == ["venv", "pip"]
    (repo.path / ".venv.lock").unlink()
    second = repo.run("run.sh", *AWKWARD)
    assert not (repo.path / ".venv.lock").exists()  # nor does it wait for others, or need a writable folder
    assert (second.code, json.loads(second.out), second.err, repo.calls()) == (0, AWKWARD, "", [])

    repo.write("requirements.txt", "one==1.0\ntwo==2.0\nfour==4.0\n")
    assert repo.run("run.sh").code == 0
    assert repo.calls() == ["pip"]  # .venv itself is kept
    assert (repo.run("run.sh").code, repo.calls()) == (0, [])
    assert not (repo.path / "site").exists()  # python3 was left alone all along


def test_interrupted_install_is_done_again_from_the_start(repo):
    failed = repo.run("run.sh", PIP_FAILS="1")
    assert failed.code == 1 and "check network" in failed.err and failed.out == ""
    assert repo.calls() == ["venv", "pip"]
    assert repo.run("run.sh").code == 0
    assert repo.calls() == ["venv", "pip"]  # a half-filled .venv is not built upon

    repo.write("requirements.txt", "one==1.1\ntwo==2.0\n")
    assert repo.run("run.sh", PIP_FAILS="1").code == 1  # an update that stops half-way
    assert repo.calls() == ["pip"]
    assert (repo.run("run.sh").code, repo.calls()) == (0, ["venv", "pip"])


def test_venv_whose_python_is_gone_is_made_again(repo):
    repo.run("run.sh")
    repo.calls()
    (repo.path / ".venv/bin/python").unlink()
    assert (repo.run("run.sh").code, repo.calls()) == (0, ["venv", "pip"])


def test_two_starts_at_once_install_once(repo):
    go = repo.path / "go"
    first = repo.start(str(repo.path / "run.sh"), PIP_WAITS_FOR=str(go))
    while not (repo.path / "calls.txt").exists() or "pip" not in (repo.path / "calls.txt").read_text():
        time.sleep(0.02)
    second = repo.start(str(repo.path / "run.sh"))
    assert second.stderr.readline() == "waiting for another start, which is installing into .venv\n"
    go.touch()
    for process in (first, second):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert repo.calls() == ["venv", "pip"]


def test_a_file_system_without_locks_is_a_note(repo):
    """As on some network file systems, where flock is refused."""
    repo.write("site/sitecustomize.py", """
import fcntl
def flock(*_):
    raise OSError(37, "No locks available")
fcntl.flock = flock
""")
    done = repo.run("run.sh")
    assert done.code == 0 and repo.calls() == ["venv", "pip"], done.err
    assert "note: no locks on this file system (No locks available); start once only" in done.err
    assert "Traceback" not in done.err


# --- ways to start

def ready(repo) -> Repo:
    for name, version in (("one", "1.0"), ("two", "2.0"), ("three", "3.0")):
        repo.install(name, version)
    return repo


@pytest.mark.parametrize("script", ["run.sh", "test.sh"])
@pytest.mark.parametrize("shell", [name for name in ("sh", "dash", "bash", "zsh") if shutil.which(name)])
def test_scripts_start_from_any_shell(repo, shell, script):
    process = ready(repo).start(shell, str(repo.path / script), *AWKWARD)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert json.loads(out)[-len(AWKWARD):] == AWKWARD


def test_run_sh_is_found_through_symbolic_links(repo, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "absolute").symlink_to(ready(repo).path / "run.sh")
    (elsewhere / "relative").symlink_to("absolute")
    for name in ("absolute", "relative"):
        process = repo.start(str(elsewhere / name), *AWKWARD)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err, json.loads(out)) == (0, "", AWKWARD)


def test_a_checkout_with_autocrlf_starts_and_keeps_its_logs(tmp_path):
    """As of git for Windows, whose files a Linux there then uses."""
    git = ["git", "-C", str(ROOT), "-c", "core.autocrlf=true"]
    patterns = ["*.sh", "records/*/runs/*.txt"]
    listed = subprocess.run([*git, "ls-files", "-s", *patterns], capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("needs a checkout by git")
    entries = [line.split(maxsplit=3) for line in listed.stdout.splitlines()]
    logs = [entry for entry in entries if entry[3].endswith(".txt")]
    chosen = [entry for entry in entries if entry[3].endswith(".sh")] + logs[:2]
    names = [name for _, _, _, name in chosen]
    subprocess.run([*git, "checkout-index", "-q", f"--prefix={tmp_path}/", "--", *names], check=True)
    for _, blob, _, name in chosen:
        stored = subprocess.run([*git, "cat-file", "blob", blob], capture_output=True, check=True).stdout
        assert (tmp_path / name).read_bytes() == stored, name


def test_run_and_test_share_one_venv(repo):
    tests = repo.run("test.sh", "-k", "muon and not slow")
    assert json.loads(tests.out)[-2:] == ["-k", "muon and not slow"], tests.err
    assert repo.calls() == ["venv", "pip"]
    assert (repo.run("run.sh").code, repo.calls()) == (0, [])


def test_python_named_by_the_user(repo):
    for name in ["one-1.0", "two-2.0"]:
        repo.write(f"other/site/{name}.dist-info/METADATA", "Name: {}\nVersion: "
                                                            "{}\n".format(*name.split("-")))
    other = repo.write("other/bin/mine", FAKE_PYTHON)
    other.chmod(0o755)
    assert (repo.run("run.sh", PYTHON=str(other)).code, repo.calls()) == (0, [])
    lacking = repo.run("run.sh", PYTHON=str(repo.path / "bin/python3"))
    assert "expected one 1.0, found none; using .venv" in lacking.err and repo.calls() == ["venv", "pip"]


@pytest.mark.parametrize("minor, found", [(9, "older"), (None, "nothing that starts")])
def test_unusable_python_is_refused(repo, minor, found):
    old = f"import sys; sys.version_info = (3, {minor}); exec(sys.stdin.read())"
    python = repo.write("bin/old", f"#!/usr/bin/env bash\nexec '{sys.executable}' -c '{old}'\n")
    python.chmod(0o755 if minor else 0o644)
    done = repo.run("run.sh", PYTHON=str(python))
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "expected a Python 3.10 or newer" in done.err and found in done.err and "unset PYTHON" in done.err


def test_no_python_at_all(repo):
    for tool in ["bash", "dirname", "cat"]:
        (repo.path / "bin" / tool).symlink_to(shutil.which(tool))
    (repo.path / "bin/python3").unlink()
    done = repo.run("run.sh", PATH=str(repo.path / "bin"))
    assert (done.code, done.out) == (2, "")
    assert "expected Python 3.10 or newer on PATH, found none" in done.err and "PYTHON=/path" in done.err


def test_help_is_that_of_run_sh_and_of_the_trainer(repo):
    done = repo.run("run.sh", "--track=small", "--help")
    assert done.code == 0 and done.out.startswith("usage: "
                                                  "./run.sh") and done.out.endswith("help of the trainer\n")
    for name in ["PYTHON", "NPROC", "OMP_NUM_THREADS", "DATA_PATH"]:
        assert f"\n  {name} " in done.out


def test_exit_code_passes_through(repo):
    repo.write("tools/launch.py", "import sys; sys.exit(2)")
    assert repo.run("run.sh").code == 2
