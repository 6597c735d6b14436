"""run.sh, test.sh, setup.sh and launch.py: what is installed and when, what is started, which exit code comes back.

Nothing is installed here. FAKE_PYTHON runs the real Python but finds packages only in a folder of its own, where its pip
writes bare metadata; so the scripts do all their own work, in a copy of the repository whose requirements are invented."""
import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools import launch, machine

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ["run.sh", "test.sh", "tools/setup.sh", ".ci/run"]

FAKE_PYTHON = """#!/usr/bin/env bash
here=$(cd "$(dirname "$0")/.." && pwd)
case "$*" in
"-m venv "*) echo venv >> calls.txt; rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
"-m pip install"*)
    echo pip >> calls.txt
    sleep "${PIP_SECONDS:-0}"
    while (($#)); do
        if [[ $1 == -r ]]; then
            while IFS== read -r name _ version; do
                mkdir -p "$here/site/$name-$version.dist-info"
                printf 'Name: %%s\\nVersion: %%s\\n' "$name" "$version" > "$here/site/$name-$version.dist-info/METADATA"
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

    def start(self, script: str, *args: str, **env: str) -> subprocess.Popen:
        clean = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "PYTHONPATH", "TEST_WORKERS")}
        clean["PATH"] = f"{self.path / 'bin'}:{clean['PATH']}"
        return subprocess.Popen([self.path / script, *args], env={**clean, **env}, text=True, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, script: str, *args: str, **env: str) -> SimpleNamespace:
        process = self.start(script, *args, **env)
        out, err = process.communicate(timeout=30)
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
    return subprocess.run(["bash", "-c", script, "-", python, *files], capture_output=True, text=True).stdout.strip()


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
    """Top-level names of the modules a file imports: anywhere in it, or only when it is itself imported."""
    tree = ast.parse(file.read_text())
    nodes = ast.walk(tree) if whole else tree.body
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    nodes = ast.walk(tree) if whole else tree.body
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("name", ["requirements.txt", "records/requirements.txt", "requirements-dev.txt"])
def test_every_requirement_is_pinned_exactly(name):
    assert pinned(name)
    for line in pinned(name):
        assert re.fullmatch(r'\w[\w.-]*==\d[\w.]*(; python_version (<|>=) "3\.\d+")?', line), line


def test_pins_hold_in_this_python():
    files = "requirements.txt", "records/requirements.txt", "requirements-dev.txt"
    assert probe(sys.executable, *(ROOT / file for file in files)) == "ready"


def test_what_the_code_imports_is_pinned():
    ours = {"data", "records", "bench", "tests", *(path.stem for path in ROOT.glob("*.py")),
            *(path.stem for path in ROOT.glob("data/*.py"))}
    parts = {"triton", "tiktoken_ext", "markupsafe"}  # parts of torch (for CUDA), of tiktoken, of jinja2
    optional = {"quack"}  # kernels for Muon on Hopper
    for pins, files in (("requirements.txt", [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]),
                        ("records/requirements.txt", [*ROOT.glob("records/*.py")])):
        wanted = {line.partition("==")[0] for line in pinned(pins)}
        found = {str(file.relative_to(ROOT)): imported(file, whole=True) for file in files}
        known = wanted | set(sys.stdlib_module_names) | ours | parts | optional
        assert not {file: names - known for file, names in found.items() if names - known}
        unused = wanted - set().union(*found.values())
        assert not unused, f"{pins} pins what no file imports: {unused}"
    for file in [ROOT / "train_gpt.py", *ROOT.glob("muon*.py")]:
        needed = imported(file, whole=False) - set(sys.stdlib_module_names) - ours
        assert needed <= {"torch", "numpy"}, f"importing {file.name} must need only torch and numpy, found {needed}"


@pytest.mark.parametrize("installed, pin, answer", [
    ("1.0", "one==1.0", "ready"),
    ("1.0+cpu", "one==1.0", "ready"),
    ("1.0+cpu", "one==1.0+cu126", "expected one 1.0+cu126, found 1.0+cpu"),
    ("1.0.1", "one==1.0", "expected one 1.0, found 1.0.1"),
    ("1.0", "one==1.0\n# a remark\n\ntwo==2.0  # another", "expected two 2.0, found none"),
    ("1.0", 'one==1.0; python_version >= "3.10"\none==9.0; python_version < "3.10"', "ready"),
    ("1.0", 'one==9.0; python_version >= "3.10"\none==1.0; python_version < "3.10"', "expected one 9.0, found 1.0"),
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
    starts = [repo.start("run.sh", PIP_SECONDS="1") for _ in range(2)]
    ends = [(*start.communicate(timeout=30), start.returncode) for start in starts]
    assert [code for _, _, code in ends] == [0, 0], ends
    assert repo.calls() == ["venv", "pip"]
    assert sorted("waiting for another start" in err for _, err, _ in ends) == [False, True]


def test_run_and_test_share_one_venv(repo):
    tests = repo.run("test.sh", "-k", "muon and not slow")
    assert json.loads(tests.out)[-2:] == ["-k", "muon and not slow"], tests.err
    assert repo.calls() == ["venv", "pip"]
    assert (repo.run("run.sh").code, repo.calls()) == (0, [])


def test_python_named_by_the_user(repo):
    for name in ["one-1.0", "two-2.0"]:
        repo.write(f"other/site/{name}.dist-info/METADATA", "Name: {}\nVersion: {}\n".format(*name.split("-")))
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
    assert done.code == 0 and done.out.startswith("usage: ./run.sh") and done.out.endswith("help of the trainer\n")
    for name in ["PYTHON", "NPROC", "OMP_NUM_THREADS", "DATA_PATH"]:
        assert f"\n  {name} " in done.out


def test_exit_code_passes_through(repo):
    repo.write("tools/launch.py", "import sys; sys.exit(2)")
    assert repo.run("run.sh").code == 2


# --- launch.py: what is started

@pytest.mark.parametrize("num_gpus, cores, wanted, ranks", [
    (0, 1, "", 1), (0, 2, "", 2), (0, 64, "", 2), (0, 2, "4", 4), (1, 16, "", 1), (4, 16, "", 4), (8, 96, "", 8),
    (8, 96, "2", 2), (3, 16, "2", 2),
])
def test_number_of_ranks(num_gpus, cores, wanted, ranks):
    assert launch.choose_ranks(num_gpus, cores, wanted) == ranks


@pytest.mark.parametrize("num_gpus, wanted, message", [
    (3, "", "found 3 GPUs; set NPROC=2"), (6, "", "found 6 GPUs; set NPROC=4"), (16, "", "found 16 GPUs; set NPROC=8"),
    (2, "4", "found 4 ranks for 2 GPUs; set NPROC=2"), (0, "3", "found 3; set NPROC=2"), (8, "5", "found 5; set NPROC=4"),
    (0, "0", "found '0'"), (0, "two", "found 'two'"), (0, "-2", "found '-2'"),
])
def test_impossible_number_of_ranks_is_refused(num_gpus, wanted, message):
    with pytest.raises(ValueError, match="expected") as error:
        launch.choose_ranks(num_gpus, 2, wanted)
    assert message in str(error.value)


@pytest.mark.parametrize("num_gpus, args, track, ranks, threads", [
    (0, ["--seed=1"], "shakespeare", 2, "3"), (8, [], "small", 8, "1"), (4, ["--track=shakespeare"], "shakespeare", 4, "1"),
    (0, ["--track=small"], "small", 2, "3"),
])
def test_hardware_decides_track_ranks_and_threads(monkeypatch, capsys, num_gpus, args, track, ranks, threads):
    cuda = SimpleNamespace(is_available=lambda: num_gpus > 0, device_count=lambda: num_gpus)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(launch.os, "environ", {})
    monkeypatch.setattr(launch, "usable_cores", lambda: 6)
    monkeypatch.setattr(launch.subprocess, "run", lambda command: SimpleNamespace(returncode=0, args=data.extend(command)))
    monkeypatch.setattr(launch, "torchrun", lambda *call: calls.append(call) or 0)
    data, calls = [], []
    assert launch.main(args) == 0
    assert capsys.readouterr().err.startswith(f"{num_gpus or 'no'} GPU, 6 CPU cores: track {track}, ranks: {ranks}, ")
    expected = args if any("--track" in arg for arg in args) else [f"--track={track}", *args]
    assert calls == [(ranks, expected)]
    assert data == [sys.executable, launch.DATA_SCRIPTS[track]]
    assert launch.os.environ["OMP_NUM_THREADS"] == threads


def test_refused_ranks_are_one_sentence_and_exit_code_2(monkeypatch, capsys):
    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 3)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(launch.os, "environ", {})
    assert launch.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_data_scripts_exist_and_are_skipped_for_shards_of_the_user(monkeypatch):
    assert all((ROOT / script).is_file() for script in launch.DATA_SCRIPTS.values())
    monkeypatch.setattr(launch.subprocess, "run", lambda command: SimpleNamespace(returncode=2))
    assert launch.prepare_data("small", []) == 2
    assert launch.prepare_data("small", ["--train_files=mine/*.bin"]) == 0
    assert launch.prepare_data("no such track", []) == 0


def test_container_quota_limits_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    for text, cores in [("400000 100000", 4), ("50000 100000", 1), ("max 100000", 16), ("", 16)]:
        (tmp_path / "cpu.max").write_text(text)
        monkeypatch.setattr(machine, "open", lambda path: (tmp_path / "cpu.max").open(), raising=False)
        assert machine.usable_cores() == cores


@pytest.mark.parametrize("failures, code, message", [
    ({0: (2, 10), 1: (-15, 10)}, 2, ""), ({1: (1, 10), 0: (2, 10)}, 2, ""), ({0: (1, 10), 1: (-9, 41)}, 1, ""),
    ({0: (1, 10), 1: (-9, 10)}, 1, "rank 1 ended by SIGKILL"), ({1: (-11, 10), 0: (-15, 10)}, 1, "rank 1 ended by SIGSEGV"),
    ({0: (-15, 10)}, 1, "rank 0 ended by SIGTERM"),
])
def test_exit_code_of_failed_ranks(capsys, failures, code, message):
    failures = {rank: SimpleNamespace(exitcode=exitcode, timestamp=second) for rank, (exitcode, second) in failures.items()}
    assert launch.exit_code(failures) == code
    err = capsys.readouterr().err
    assert message in err and bool(message) == bool(err)


# --- launch.py with the real torchrun and a trainer of a few lines

def start_launch(tmp_path, trainer: str, *args: str, data: str = "") -> subprocess.Popen:
    (tmp_path / "tools").mkdir()
    for name in ("launch.py", "machine.py"):
        shutil.copy(ROOT / "tools" / name, tmp_path / "tools")
    (tmp_path / "data").mkdir()
    for script in launch.DATA_SCRIPTS.values():
        (tmp_path / script).write_text(data)
    (tmp_path / "train_gpt.py").write_text("import json, os, signal, sys, time\nrank = os.environ['RANK']\n" + trainer)
    env = {**os.environ, "NPROC": "2", "CUDA_VISIBLE_DEVICES": ""}
    env.pop("OMP_NUM_THREADS", None)
    return subprocess.Popen([sys.executable, "-m", "tools.launch", *args], cwd=tmp_path, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_ranks_get_the_arguments_and_their_threads(tmp_path):
    show = "open('rank' + rank, 'w').write(json.dumps([os.environ['WORLD_SIZE'], os.environ['OMP_NUM_THREADS'], sys.argv[1:]]))"
    process = start_launch(tmp_path, show, *AWKWARD)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, ""), err
    threads = str(max(1, launch.usable_cores() // 2))
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}").read_text()) == ["2", threads, ["--track=shakespeare", *AWKWARD]]
    assert re.fullmatch(r"no GPU, \d+ CPU cores: track shakespeare, ranks: 2, threads of each: \d+\n", err)  # no chatter


def test_failure_shows_only_the_message_of_the_rank(tmp_path):
    process = start_launch(tmp_path, "if rank == '1': sys.exit(print('my message', file=sys.stderr) or 2)\ntime.sleep(60)")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.splitlines()[1:]) == (2, "", ["my message"])


def test_ctrl_c_lets_all_ranks_end(tmp_path):
    trainer = """
def stop(*_):
    time.sleep(0.5)
    open('stopped' + rank, 'w').close()
    sys.exit(0)
signal.signal(signal.SIGINT, stop)
open('up' + rank, 'w').close()
time.sleep(60)
"""
    process = start_launch(tmp_path, trainer)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("up*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)  # an impatient one changes nothing
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, len(err.splitlines())) == (130, "", 1), err
    assert len(list(tmp_path.glob("stopped*"))) == 2


def test_without_data_nothing_is_started(tmp_path):
    process = start_launch(tmp_path, "print('started')", data="import sys; print('no network', file=sys.stderr); sys.exit(2)")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.splitlines()[1:]) == (2, "", ["no network"])


def test_track_of_the_arguments_of_the_hardware_or_of_the_checkpoint():
    assert launch.with_track(["--seed=1"], 0) == ("shakespeare", ["--track=shakespeare", "--seed=1"])
    assert launch.with_track(["--seed=1"], 8) == ("small", ["--track=small", "--seed=1"])
    assert launch.with_track(["--track=small"], 0) == ("small", ["--track=small"])
    assert launch.with_track(["--track", "small"], 0) == ("small", ["--track", "small"])
    for args in (["--resume=a.pt"], ["--resume", "a.pt", "--save_every=5"]):
        assert launch.with_track(args, 8) == ("", args) and launch.prepare_data("", args) == 0
