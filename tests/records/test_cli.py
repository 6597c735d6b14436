"""The command line: a manual, help of each verb, each example as it stands, exit codes, errors that
fit in one sentence."""
import argparse
import shlex
import subprocess
import sys

import pytest

from tests.helpers.committed import ADAMW, MUON, TRACK

from data.files import ROOT
from records.__main__ import VERBS, guarded, module_of

ALL = [verb for verbs in VERBS.values() for verb in verbs]


def test_the_manual_lists_every_verb_and_exit_code(capsys):
    assert guarded(["--help"]) == 0
    out = capsys.readouterr().out
    for verb in ALL:
        module = module_of(verb)
        assert f"\n  {verb:<10} {module.HELP}\n" in out and "\n" not in module.HELP
    assert all(f"\n  {code}  " in out for code in (0, 1, 2))
    assert guarded([]) == 2 and capsys.readouterr().out == out


@pytest.mark.parametrize("verb", ALL)
def test_the_help_of_a_verb_explains_it_and_every_argument(verb, capsys):
    """It tells what the verb does, every argument with a meaning, and an example."""
    module = module_of(verb)
    with pytest.raises(SystemExit) as end:
        guarded([verb, "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and out.startswith(f"usage: python -m records {verb}")
    assert module.__doc__.strip() in out and f"example: {module.EXAMPLE}" in out
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert all(action.help for action in parser._actions)


@pytest.mark.parametrize("how, code, said", [
    (">&-", 0, ""), ("2>&-", 0, ""), ("1</dev/null", 0, ""),  # as bash leaves it to what it executes
    (">/dev/full", 1, "records: expected files to open and to write, found: No space left on device; free ")])
def test_streams_that_are_closed_or_full(how, code, said):
    command = f"{shlex.quote(sys.executable)} -m records show {MUON} {how}"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that looks like the repository, for examples that write; its run.sh ends at once."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "bench").symlink_to(ROOT / "bench")
    (folder / "records").symlink_to(ROOT / "records")
    trainer = shlex.join([sys.executable, str(ROOT / "tests/helpers/fake_trainer.py")])
    (folder / "run.sh").write_text(f'#!/bin/sh\nfor last; do :; done\nexec {trainer} "$last"\n')
    (folder / "run.sh").chmod(0o755)
    return folder


@pytest.mark.parametrize("verb", ALL)
def test_the_example_of_a_verb_works_as_it_stands(verb, folder, records, monkeypatch):
    monkeypatch.chdir(folder)
    python, dash_m, package, *arguments = shlex.split(module_of(verb).EXAMPLE)
    assert (python, dash_m, package) == ("python", "-m", "records")
    code, out, err = records(*arguments)
    assert out and (code, err) == (0, "")


@pytest.mark.parametrize("arguments,sentence", [
    (["shwo"], "expected a verb (show, compare, report, plan, ab, check, pack, verify, table), found 'shwo'; "
               "see python -m records -h"),
    (["show"],
     "expected arguments as in python -m records show --help, found: the following arguments are required: "
     "PATH; correct them"),
    (["show", "--jsn", TRACK], "found: unrecognized arguments: --jsn"),
    (["show", "--target"], "found: argument --target: expected one argument"),
    (["show", "no\x1b[2Jthing"],
     "no?[2Jthing: expected a log or a folder of logs, found nothing there; check the path"),
])
def test_a_wrong_command_is_answered_in_one_sentence(arguments, sentence, records, at_root):
    code, out, err = records(*arguments)
    assert (code, out) == (2, "") and err.startswith("records: ") and sentence in err and err.count("\n") == 1


def test_a_missing_package_is_named(records, at_root, monkeypatch):
    """The import fails as it does for somebody who has installed nothing."""
    monkeypatch.setitem(sys.modules, "rich.console", None)
    code, out, err = records("show", TRACK)
    assert (code, out) == (2, "") and err.startswith("records: expected the Python package rich")
    assert "pip install -r records/requirements.txt`" in err
    assert records("show", TRACK, "--json")[0] == 0


def test_a_reader_that_has_seen_enough_and_a_terminal_without_unicode():
    """Both run as programs of their own."""
    program = f"{shlex.quote(sys.executable)} -m records"
    for command in (f"{program} show --json {TRACK} | head -n 1",
                    f"PYTHONIOENCODING=ascii {program} compare {ADAMW} {MUON}"):
        done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "") and (done.stdout == "[\n" or "0.0042" in done.stdout)
