"""The command line: a manual, help of each verb, each example as it stands, exit codes, errors that
fit in one sentence."""
import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.helpers.committed import ADAMW, MUON, ROOT, TRACK

from records.__main__ import VERBS, guarded

ALL = [verb for verbs in VERBS.values() for verb in verbs]
OURS = TRACK


def records(*arguments, cwd=ROOT, **environment):
    return subprocess.run([sys.executable, "-m", "records", *map(str, arguments)], cwd=cwd,
                          capture_output=True, text=True,
                          timeout=100, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


def test_the_manual(capsys):
    assert guarded(["--help"]) == 0
    out = capsys.readouterr().out
    for verb in ALL:
        module = importlib.import_module(f"records.{verb}")
        assert f"\n  {verb:<10} {module.HELP}\n             {module.EXAMPLE}\n" in re.sub(r" \\\n +", " ",
                                                                                          out)
        assert "\n" not in module.HELP and module.EXAMPLE.startswith(f"python -m records {verb} ")
    assert all(f"\n  {code}  " in out for code in (0, 1, 2))
    assert all(len(line) < 150 for line in out.splitlines())
    assert guarded([]) == 2 and capsys.readouterr().out == out


@pytest.mark.parametrize("verb", ALL)
def test_help_of_a_verb(verb, capsys):
    """It tells what the verb does, every argument with a meaning, and an example."""
    module = importlib.import_module(f"records.{verb}")
    with pytest.raises(SystemExit) as end:
        guarded([verb, "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and out.startswith(f"usage: python -m records {verb}")
    assert module.__doc__.strip() in out and f"example: {module.EXAMPLE}" in out
    import argparse
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert all(action.help for action in parser._actions)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that looks like the repository, for examples that write; its run.sh ends at once."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "bench").symlink_to(ROOT / "bench")
    (folder / "records").symlink_to(ROOT / "records")
    trainer = [sys.executable, str(ROOT / "tests/helpers/fake_trainer.py")]
    (folder / "run.sh").write_text(f"""#!/bin/sh
for a; do case $a in --seed=*) seed=$a;; esac; done
exec {shlex.join(trainer)} $seed
""")
    (folder / "run.sh").chmod(0o755)
    return folder


@pytest.mark.parametrize("verb", ALL)
def test_the_example_of_a_verb(verb, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    python, dash_m, package, *arguments = shlex.split(importlib.import_module(f"records.{verb}").EXAMPLE)
    assert (python, dash_m, package) == ("python", "-m", "records")
    code, (out, err) = guarded(arguments), capsys.readouterr()
    assert out and code in (0, 1), err
    if verb != "ab":
        assert (code, err) == (0, "")


@pytest.mark.parametrize("arguments,sentence", [
    (["shwo"], "expected a verb (show, compare, report, plan, ab, check, pack, verify, table), found 'shwo'; "
               "did you mean show?"),
    (["xyz"], "found 'xyz'; see python -m records --help"),
    (["show"],
     "expected the arguments of python -m records show, found: the following arguments are required: PATH; "
     "see python -m records show --help"),
    (["show", "--jsn", OURS], "found: unrecognized arguments: --jsn"),
    (["show", "--target"], "found: argument --target: expected one argument"),
    (["show", "no\x1b[2Jthing"],
     "no?[2Jthing: expected a log or a folder of logs, found nothing there; check the path"),
])
def test_usage_errors(arguments, sentence, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert guarded(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("records: ") and sentence in err and err.count("\n") == 1


def test_a_missing_package_is_named(tmp_path):
    """As of somebody who has installed nothing."""
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich/__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'rich'\", "
                                               "name='rich')")
    done = records("show", OURS, PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT))))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("records: expected the Python package rich, found none; run `")
    assert "pip install -r records/requirements.txt`" in done.stderr
    assert records("show", OURS, "--json",
                   PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT)))).returncode == 0


def test_a_reader_that_has_seen_enough():
    done = subprocess.run(f"{shlex.quote(sys.executable)} -m records show --json {OURS} | head -n 1",
                          shell=True, cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout == "[\n" and done.stderr == ""


def test_a_terminal_without_unicode():
    done = records("compare", ADAMW, MUON, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "") and "0.0042" in done.stdout


def test_nothing_runs_on_import():
    names = [path.stem for path in (ROOT / "records").glob("*.py") if path.stem != "__main__"]
    done = subprocess.run([sys.executable, "-c", f"import {', '.join(f'records.{name}' for name in names)}"],
                          cwd=ROOT,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
