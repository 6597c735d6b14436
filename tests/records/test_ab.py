"""records.ab with a fake trainer: interleaving, resumption after every kind of end, failures, and the
verdict."""
import errno
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import ttest_rel

from data.errors import UsageError
from data.files import ROOT
from records import ab, logs

FAKE = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'tests/helpers/fake_trainer.py'))}"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ab, "PATIENCE", 0.5)


def run(a=FAKE, b=FAKE, runs=2, out="out", limit=1.0) -> int:
    return ab.run(SimpleNamespace(a=a, b=b, runs=runs, out=Path(out), limit=limit))


def files(pattern: str) -> list[str]:
    return sorted(str(path) for path in Path().glob(pattern))


def start(a: str, runs: int):
    """ab as a program of its own."""
    return subprocess.Popen([sys.executable, "-m", "records", "ab", "--a", a, "--b", FAKE, "--out", "out",
                             "--runs", str(runs)],
                            env={**os.environ, "PYTHONPATH": str(ROOT)},
                            text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_until(condition):
    for _ in range(4000):  # of a busy machine; a free one needs a few
        if condition():
            return
        time.sleep(0.025)
    raise AssertionError("waited in vain")


def nobody_is_at_work() -> bool:
    """Runs inherit the lock of ab, so that it is free only where none is left."""
    with open("out/.lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_pairs_share_new_seeds_and_the_order_is_balanced():
    run(runs=6)
    plan = json.loads(Path("out/plan.json").read_text())
    assert sorted(pair["order"] for pair in plan["pairs"]) == ["ab"] * 3 + ["ba"] * 3
    assert len({pair["seed"] for pair in plan["pairs"]}) == 6
    for number, pair in enumerate(plan["pairs"], 1):
        for arm in "ab":
            assert ab.find_log(Path("out"), arm, number).runs[0].seed == pair["seed"]
        first, second = (os.stat(*files(f"out/{arm}/{number:03d}_*")).st_mtime for arm in pair["order"])
        assert first <= second
    assert {tuple(pair.order for pair in ab.make_experiment("a", "b", 4).pairs) for _ in range(200)} > {
        ("ab", "ab", "ba", "ba"), ("ba", "ab", "ba", "ab")}
    assert {ab.make_experiment("a", "b", 3).pairs[0].order for _ in range(50)} == {"ab", "ba"}


def test_verdict_is_the_paired_test_of_the_logs(capsys):
    run(a=f"{FAKE} --ms=60000", runs=5)  # far from the other, whatever seeds are drawn
    text = Path("out/verdict.md").read_text()
    arms = [[logs.read(path).runs[0] for path in files(f"out/{arm}/*")] for arm in "ab"]
    seconds = [[run.final_time_ms / 1000 for run in arm] for arm in arms]
    losses = [[run.final_val_loss for run in arm] for arm in arms]
    p = ttest_rel(*seconds, alternative="less").pvalue
    gap = np.mean(seconds[0]) - np.mean(seconds[1])
    assert f"Seconds: A is faster. A minus B is {gap:+.2f} (95 %: " in text
    assert f"one-sided p = {p:.2g}, " in text
    p, word = min((ttest_rel(*losses, alternative=side).pvalue, word)
                  for side, word in (("less", "A ends lower"), ("greater", "A ends higher")))
    assert f"Loss: {word if p < 0.01 else 'no difference shown'}. " in text
    assert f"one-sided p = {p:.2g}, " in text
    ratio = np.exp(np.mean(np.log(seconds[1]) - np.log(seconds[0])))
    assert f"Speed-up: {ratio:.4f} (95 %: " in text and text.count("\n| ") == 6
    out = capsys.readouterr().out
    assert all(line[2:] in out for line in text.splitlines() if line.startswith("- "))


@pytest.mark.parametrize("sign, word", [(1, "A is slower"), (-1, "A is faster")])
def test_the_sign_of_a_verdict(sign, word):
    b = [100.0, 101.0, 99.0, 102.0]
    a = [value + sign * (5 + value / 1000) for value in b]
    first, *_ = ab.sentences([a, b], [a, b])
    assert first.startswith(f"Seconds: {word}. A minus B is {5.1 * sign:+.2f} ")


def test_a_finished_experiment_only_repeats_its_verdict(capsys):
    run(a=f"{FAKE} --log_dir=other")
    assert "Loss: the same in every pair" in capsys.readouterr().out
    before = {path: Path(path).read_bytes() for path in files("out/*.*") + files("out/*/*")}
    run(a=f"{FAKE} --log_dir=other")
    assert before == {path: Path(path).read_bytes() for path in files("out/*.*") + files("out/*/*")}


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_in_mid_run_it_loses_that_run_only(kill):
    a = f"{FAKE} --wait=hold"
    run(a, runs=3)
    Path(*files("out/a/002*")).unlink()
    kept = {path: Path(path).read_bytes() for path in files("out/[ab]/*")}
    Path("hold").touch()
    process = start(a, runs=3)
    wait_until(Path("waiting").exists)
    process.send_signal(kill)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == (-kill if kill == signal.SIGKILL else 130)
    assert files("out/[ab]/*") == sorted(kept)
    # nobody could end the trainer: no second one beside it, for both would be slow
    if kill == signal.SIGKILL:
        assert not nobody_is_at_work()
        with pytest.raises(UsageError, match="expected no run at work, found .*; wait for it or end it"):
            run(a, runs=3)
        Path("hold").unlink()
        wait_until(nobody_is_at_work)
    else:
        assert "the same command goes on" in errors
        assert nobody_is_at_work()
        Path("hold").unlink()
    run(a, runs=3)
    now = {path: Path(path).read_bytes() for path in files("out/[ab]/*")}
    assert len(now) == 6 and kept.items() < now.items()
    assert "made again: 2 (" in Path("out/verdict.md").read_text()


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_signal_while_a_trainer_is_started_leaves_none_alone_at_work(kill, moment, monkeypatch):
    """The signal comes when there is a child of which nobody but Popen knows yet."""
    Path("hold").touch()
    popen = subprocess.Popen

    def started(*arguments, **options):
        if moment == "before":
            os.kill(os.getpid(), kill)
        process = popen(*arguments, **options)
        if moment == "after":
            os.kill(os.getpid(), kill)
        return process
    monkeypatch.setattr(subprocess, "Popen", started)
    before = [signal.getsignal(number) for number in ab.StopSignals.NUMBERS]
    with pytest.raises(KeyboardInterrupt):
        run(f"{FAKE} --wait=hold")
    assert nobody_is_at_work() and not files("out/[ab]/*")
    assert [signal.getsignal(number) for number in ab.StopSignals.NUMBERS] == before


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_was_ignored_at_the_start_is_obeyed(ignored):
    """A shell without job control starts a job in the background with SIGINT ignored, for itself and
    its children."""
    Path("hold").touch()
    before = signal.signal(ignored, signal.SIG_IGN)
    try:
        process = start(f"{FAKE} --wait=hold", runs=2)
    finally:
        signal.signal(ignored, before)
    wait_until(Path("waiting").exists)
    process.send_signal(ignored)
    assert process.communicate(timeout=600) and process.returncode == 130 and nobody_is_at_work()


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_is_closed_ends_it_with_its_trainer_unless_it_runs_under_nohup(nohup):
    Path("hold").touch()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        process = start(f"{FAKE} --wait=hold", runs=2)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_until(Path("waiting").exists)
    process.send_signal(signal.SIGHUP)
    if nohup:
        Path("hold").unlink()
    assert process.communicate(timeout=600) and process.returncode == (0 if nohup else 130)
    assert nobody_is_at_work() and len(files("out/a/*")) == 2 * nohup


def test_what_a_command_leaves_at_work_is_ended():
    """What is left stands in the process group of the command; the lock tells whether it is at work."""
    Path("hold").touch()
    run(a=f"sh -c '{FAKE} --seed=1{{seed}} --wait=hold >/dev/null & exec {FAKE} --seed={{seed}}'")
    assert nobody_is_at_work()


def test_a_file_system_without_locks_gets_a_note(monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", flock)
    run()
    note = "out cannot be locked (No locks available): see to it that no other ab uses it"
    assert note in capsys.readouterr().err


def test_a_command_that_does_not_use_its_seed_is_told_before_ten_equal_runs_are_made():
    with pytest.raises(UsageError, match="seed 7 in .* instead of"):  # the log names its seed
        run(b=f"sh -c '{FAKE} --seed=7'", out="named")
    silent = (f"{FAKE} --seed=7 > printed && sed -i -e /^seed:/d -e /^config:/d $(tail -n 1 printed) && cat "
              "printed")
    Path("silent.sh").write_text(f"{silent}\n")
    with pytest.raises(UsageError, match="the very losses of pair 1, as if the command did not"):
        run(b="sh silent.sh", out="unnamed")
    assert len(files("unnamed/b/*")) == 1


@pytest.mark.parametrize("options, message", [
    ("--fail=crash", "found exit code 3"), ("--fail=silent", "no line with the path"),
    ("--fail=seed", "instead of"),
    ("--fail=half", "no validation at the last"), ("--fail=twice", "2 runs in"),
    ("--nonsense", "found exit code 2"),
    ("--wait=hold", "still at work after 0.01 minutes"),
    ("--wait=hold --fail=stubborn", "still at work after 0.01 minutes")])
def test_failure_says_what_happened_and_can_be_made_good(options, message, capsys):
    Path("hold").touch()
    for _ in range(2):  # again and again the same run, with the same seed
        with pytest.raises(UsageError, match="expected .*, found .*; ") as error:
            run(b=f"{FAKE} {options}", limit=0.01 if "wait" in options else 1)
        text = str(error.value)
        assert message in text
        assert "\x1b" not in text
        assert "001_b_" in text
        assert len(text.splitlines()) <= 1 + ab.TAIL
    assert not files("out/b/*") and len(files("out/output/*_b_*")) == 2
    seeds = [line for line in capsys.readouterr().out.splitlines() if ", b, seed" in line]
    assert len({line.partition(":")[0] for line in seeds}) == 1


def test_stale_log_is_not_taken_for_a_new_one():
    run()
    old = files("logs/*.txt")[0]
    os.utime(old, (1, 1))
    with pytest.raises(UsageError, match="no line with the path"):
        run(a=f"sh -c 'echo {old}'", out="other")
    with pytest.raises(UsageError, match="no line with the path"):
        run(a="sh -c 'head -c 1000000 /dev/urandom'", out="noise")


def test_seed_goes_where_it_is_wanted():
    assert ab.words("./run.sh --x='a b'", 7) == ["./run.sh", "--x=a b", "--seed=7"]
    assert ab.words("env SEED={seed} python t.py {seed}", 7) == ["env", "SEED=7", "python", "t.py", "7"]
    for command in ("", "  ", "'open"):
        with pytest.raises(UsageError, match="expected a command, found"):
            ab.words(command, 7)


def test_log_beside_a_script_in_another_folder():
    """./run.sh changes to its own folder, so that the path it prints is relative to that."""
    Path("checkout").mkdir()
    script = Path("checkout/run.sh")
    script.write_text(f'#!/bin/sh\ncd "$(dirname "$0")"\nexec {FAKE} "$@"\n')
    script.chmod(0o755)
    run(a="checkout/run.sh")
    assert len(files("out/a/*")) == 2 and len(files("checkout/logs/*")) == 2


def test_damaged_log_in_place_is_named():
    run()
    Path(*files("out/a/001*")).write_text("")
    with pytest.raises(UsageError, match="expected the log of a complete run, .*, found 0 runs .*; remove"):
        run()


def test_another_experiment_wants_another_folder():
    run()
    for changes in (dict(a=f"{FAKE} --ms=1"), dict(b=f"{FAKE} --ms=1"), dict(runs=3)):
        with pytest.raises(UsageError, match="expected .*, found .*; choose another --out"):
            run(**changes)
    Path("full").mkdir()
    Path("full/thesis.txt").touch()
    for damage in ("", "{}", "[1]", '{"a": 1, "b": 2, "pairs": [3]}',
                   '{"a": "", "b": "", "pairs": [{"seed": "x"}]}'):
        Path("out/plan.json").write_text(damage)
        with pytest.raises(UsageError, match="expected the plan .*, found something else; "):
            run()
    with pytest.raises(UsageError, match="expected an empty folder"):
        run(out="full")
    Path("file").touch()
    with pytest.raises(UsageError, match="--out: expected a folder"):
        run(out="file")


@pytest.mark.parametrize("changes, message", [
    (dict(runs=1), "--runs: expected 2 to 999"), (dict(runs=10 ** 9), "--runs"),
    (dict(b="/"), "--b: expected a command"),
    (dict(limit=0.0), "--limit"), (dict(limit=float("nan")), "--limit"),
    (dict(a="no-such-program"), "--a: expected a command"), (dict(a="''"), "--a: expected a command")])
def test_impossible_experiments_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        run(**changes)


def test_difference_in_hardware_is_said():
    run()
    for path in files("out/b/*"):
        Path(path).write_text(Path(path).read_text().replace("world_size 2", "world_size 4"))
    run()
    text = Path("out/verdict.md").read_text()
    assert "same-hardware: CPU (x86_64, 1 threads), 2 ranks in 2 runs; CPU (x86_64, 1 threads), 4 " in text
