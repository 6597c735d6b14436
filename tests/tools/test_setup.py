"""run.sh, test.sh and tools/setup.sh: what is installed and when, on which systems they start.

The scripts run in a copy of the repository whose requirements are invented: packages without code, in wheels
that pip finds in a folder.
"""
import ast
import fcntl
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.files import ROOT

SCRIPTS = ["run.sh", "test.sh", "tools/setup.sh", ".ci/run"]
PINS = ["requirements.txt", "records/requirements.txt", "requirements-dev.txt"]
SHOW_ARGUMENTS = "import json, sys; print(json.dumps(sys.argv[1:]))"
AWKWARD = ["--text=two words", "--glob=*", "--quotes=\"'$HOME", "--empty=", ""]


class Repo:
    """A copy of the scripts with invented requirements and a python3 that sees packages in site/."""

    def __init__(self, path: Path):
        self.path = path
        (path / "tools").mkdir()
        for name in SCRIPTS[:3]:
            shutil.copy(ROOT / name, path / name)
        self.write("requirements.txt", "one==1.0\ntwo==2.0\n")
        self.write("records/requirements.txt", "# nothing more\n")
        self.write("requirements-dev.txt", "-r requirements.txt\n-r records/requirements.txt\nthree==3.0\n")
        self.write("tools/launch.py", SHOW_ARGUMENTS)
        self.write("train_gpt.py", "print('help of the trainer')")
        self.write("site/pytest.py", SHOW_ARGUMENTS)
        self.write_python("python3", f"PYTHONPATH='{path}/site' exec '{sys.executable}' \"$@\"")

    def write(self, name: str, text: str) -> Path:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def write_python(self, name: str, script: str) -> Path:
        python = self.write(f"bin/{name}", f"#!/usr/bin/env bash\n{script}\n")
        python.chmod(0o755)
        return python

    def install(self, *pins: str) -> "Repo":
        """Give python3 packages."""
        for pin in pins:
            name, version = pin.split("==")
            self.write(f"site/{name}-{version}.dist-info/METADATA", f"Name: {name}\nVersion: {version}\n")
        return self

    def write_wheel(self, name: str, version: str):
        (self.path / "wheels").mkdir(exist_ok=True)
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(self.path / f"wheels/{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")

    def start(self, *command: str, **env: str) -> subprocess.Popen:
        private = ("PYTHON", "PYTHONPATH", "TEST_WORKERS")
        clean = {key: value for key, value in os.environ.items() if key not in private}
        clean["PATH"] = f"{self.path / 'bin'}:{clean['PATH']}"
        clean |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.path / "wheels")}
        return subprocess.Popen(command, env={**clean, **env}, text=True, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, script: str, *args: str, **env: str) -> SimpleNamespace:
        return finished(self.start(str(self.path / script), *args, **env))


def finished(process: subprocess.Popen) -> SimpleNamespace:
    out, err = process.communicate(timeout=600)
    return SimpleNamespace(code=process.returncode, out=out, err=err)


@pytest.fixture
def repo(tmp_path):
    return Repo(tmp_path)


@pytest.fixture
def ready(repo):
    """A repository whose python3 has all that is needed."""
    return repo.install("one==1.0", "two==2.0", "three==3.0")


def test_scripts_are_valid_bash():
    for name in SCRIPTS:
        done = subprocess.run(["bash", "-n", ROOT / name], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert name == "tools/setup.sh" or os.access(ROOT / name, os.X_OK), f"{name} must be executable"


# ------------------------------------------------------------------------------------------------------------
# Requirements


def probe(python, *files) -> str:
    """The answer of setup.sh's function of that name."""
    script = f'source "{ROOT}/tools/setup.sh"; probe "$@"'
    command = ["bash", "-c", script, "-", python, *files]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def pinned(name: str) -> list[str]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("-r ")]


def test_requirements_are_pinned_exactly_and_installed_here():
    for line in [line for name in PINS for line in pinned(name)]:
        assert re.fullmatch(r'\w[\w.-]*==\d[\w.]*(; python_version (<|>=) "3\.\d+")?', line), line
    assert probe(sys.executable, *(ROOT / name for name in PINS)) == "ready"


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


TRAINER_ROOMS = (".", "data", "engine", "muon_extras", "tools")
PARTS = {"triton", "tiktoken_ext", "markupsafe", "pydantic_core"}  # of torch, tiktoken, jinja2, pydantic
OPTIONAL = {"quack"}  # kernels for Muon on Hopper


def test_what_the_code_imports_is_pinned():
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    ours = rooms | {path.stem for path in ROOT.glob("*.py")}
    known = set(sys.stdlib_module_names) | ours
    for pins, folders in (("requirements.txt", TRAINER_ROOMS), ("records/requirements.txt", ("records",))):
        wanted = {line.partition("==")[0] for line in pinned(pins)}
        files = [file for folder in folders for file in (ROOT / folder).glob("*.py")]
        found = set().union(*(imported(file, whole=True) for file in files)) - known
        assert found - PARTS - OPTIONAL <= wanted, "imports what is not pinned"
        assert wanted <= found, f"{pins} pins what no file imports"
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
    ("1.0", 'one==9.0; python_version >= "3.10"', "expected one 9.0, found 1.0"),
    ("1.0", "one>=0.9", "expected name==version in requirements.txt, found one>=0.9"),
])
def test_probe_compares_versions(repo, monkeypatch, installed, pin, answer):
    repo.install(f"one=={installed}").write("requirements.txt", pin)
    monkeypatch.chdir(repo.path)
    assert probe("bin/python3", "requirements.txt") == answer


# ------------------------------------------------------------------------------------------------------------
# One installation, and only in .venv


def test_python_that_has_everything_is_used_as_it_is(ready):
    done = ready.run("run.sh", *AWKWARD)
    assert (done.code, json.loads(done.out), done.err) == (0, AWKWARD, "")
    assert not (ready.path / ".venv").exists()


NO_LOCKS = """
import fcntl
def flock(*_):
    raise OSError(37, "No locks available")
fcntl.flock = flock
"""


@pytest.mark.timeout(400)  # makes a real .venv
@pytest.mark.skipif(importlib.util.find_spec("ensurepip") is None, reason="needs python -m venv")
def test_a_venv_is_installed_once_by_one_start_and_shared(repo):
    for name, version in (("one", "1.0"), ("two", "2.0"), ("three", "3.0")):
        repo.write_wheel(name, version)
    half = repo.write(".venv/half", "of a start that was interrupted")
    with open(repo.path / ".venv.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another start that installs
        start = repo.start(str(repo.path / "run.sh"), *AWKWARD)
        assert start.stderr.readline() == "waiting for another start, which is installing into .venv\n"
    first = finished(start)
    assert (first.code, json.loads(first.out)) == (0, AWKWARD), first.err
    assert "installing requirements.txt" in first.err and not half.exists()  # which is not built upon

    (repo.path / ".venv.lock").unlink()
    second = repo.run("run.sh", *AWKWARD)
    assert (second.code, json.loads(second.out), second.err) == (0, AWKWARD, "")
    assert not (repo.path / ".venv.lock").exists()  # nor does it wait for others, or need a writable folder

    kept, no_locks = repo.write(".venv/kept", ""), repo.write("site/sitecustomize.py", NO_LOCKS)
    shutil.copy(repo.path / "site/pytest.py", next(repo.path.glob(".venv/lib/*/site-packages")))
    tests = repo.run("test.sh", "-k", "muon and not slow")
    assert json.loads(tests.out)[-2:] == ["-k", "muon and not slow"], tests.err
    assert "installing requirements.txt records/requirements.txt requirements-dev.txt" in tests.err
    assert "note: no locks on this file system (No locks available); start once only" in tests.err
    no_locks.unlink()
    assert repo.run("run.sh").err == "" and kept.exists()  # the .venv that test.sh has extended

    repo.write("requirements.txt", "one==1.0\ntwo==2.0\nfour==4.0\n")
    failed = repo.run("run.sh")  # there is no such package
    assert failed.code == 1 and "check network" in failed.err and failed.out == ""
    assert not (repo.path / ".venv/installed.txt").exists()
    assert list(repo.path.glob("site/*.dist-info")) == []  # python3 was left alone all along


# ------------------------------------------------------------------------------------------------------------
# Ways to start


@pytest.mark.parametrize("script", ["run.sh", "test.sh"])
@pytest.mark.parametrize("shell", [name for name in ("sh", "dash", "bash", "zsh") if shutil.which(name)])
def test_scripts_start_from_any_shell(ready, shell, script):
    done = finished(ready.start(shell, str(ready.path / script), *AWKWARD))
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)[-len(AWKWARD):] == AWKWARD


def test_a_python_that_looks_for_no_modules_in_this_folder_is_told_to(ready):
    done = ready.run("run.sh", *AWKWARD, PYTHONSAFEPATH="1")
    assert (done.code, done.err, json.loads(done.out)) == (0, "", AWKWARD)


def test_run_sh_is_found_through_symbolic_links(ready, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "absolute").symlink_to(ready.path / "run.sh")
    (elsewhere / "relative").symlink_to("absolute")
    done = finished(ready.start(str(elsewhere / "relative"), *AWKWARD))
    assert (done.code, done.err, json.loads(done.out)) == (0, "", AWKWARD)


def test_a_checkout_with_autocrlf_starts_and_keeps_its_logs(tmp_path):
    """Git for Windows makes such a checkout, whose files a Linux there then uses."""
    git = ["git", "-C", str(ROOT), "-c", "core.autocrlf=true"]
    listed = subprocess.run([*git, "ls-files", "-s", "*.sh", "records/*/runs/*.txt"], capture_output=True,
                            text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("needs a checkout by git")
    entries = [line.split(maxsplit=3) for line in listed.stdout.splitlines()]
    chosen = {name: blob for _, blob, _, name in entries if name.endswith(".sh")}
    chosen |= {name: blob for _, blob, _, name in entries[:2]}
    subprocess.run([*git, "checkout-index", "-q", f"--prefix={tmp_path}/", "--", *chosen], check=True)
    for name, blob in chosen.items():
        stored = subprocess.run([*git, "cat-file", "blob", blob], capture_output=True, check=True).stdout
        assert (tmp_path / name).read_bytes() == stored, name


def test_unusable_pythons_are_refused(repo):
    old = f"exec '{sys.executable}' -c 'import sys; sys.version_info = (3, 9); exec(sys.stdin.read())'"
    broken = repo.write("bin/broken", "not executable")
    for python, found in ((repo.write_python("old", old), "older"), (broken, "nothing that starts")):
        done = repo.run("run.sh", PYTHON=str(python))
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        assert "expected a Python 3.10 or newer" in done.err and found in done.err
        assert "unset PYTHON" in done.err

    for tool in ["bash", "dirname", "cat"]:
        (repo.path / "bin" / tool).symlink_to(shutil.which(tool))
    (repo.path / "bin/python3").unlink()
    done = repo.run("run.sh", PATH=str(repo.path / "bin"))
    assert (done.code, done.out) == (2, "")
    assert "expected Python 3.10 or newer on PATH, found none" in done.err and "PYTHON=/path" in done.err


def test_python_named_by_the_user_gives_help_and_exit_code(ready):
    done = ready.run("run.sh", "--track=small", "--help", PYTHON=str(ready.path / "bin/python3"))
    assert done.code == 0 and done.out.startswith("usage: ./run.sh")
    assert done.out.endswith("help of the trainer\n")
    for name in ["PYTHON", "NPROC", "OMP_NUM_THREADS", "DATA_PATH"]:
        assert f"\n  {name} " in done.out
    ready.write("tools/launch.py", "import sys; sys.exit(2)")
    assert ready.run("run.sh").code == 2
