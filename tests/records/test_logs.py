"""The reader gives back what went into logs of every format: whole, cut at any byte, several in a
file, and hostile."""
import hashlib
import math
import os
import re
from pathlib import Path

import pytest
from tests.helpers.committed import ADAMW, MUON, YARDSTICK
from tests.helpers.synthetic import LINE, VALIDATION_DATA, VARIANTS, embedded, make, own
from tests.records.conftest import plan_text

from data.errors import UsageError
from data.files import ROOT
from records import logs

UNKNOWN = ("torch", "cuda", "triton", "python", "gpu_name", "num_gpus", "world_size", "seed", "peak_mib",
           "val_tokens")


def read(folder: Path, text: str | bytes, name: str = "log.txt") -> logs.LogFile:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return logs.read(path)


def points(run: logs.RunFacts) -> list[tuple]:
    return [(point.step, point.val_loss, point.train_time_ms) for point in run.val_points]


def facts(run: logs.RunFacts, names) -> dict:
    return {name: points(run) if name == "val_points" else getattr(run, name) for name in names}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_went_into_a_log_comes_out(tmp_path, variant):
    for seed in range(5):
        made = make(variant, seed)
        log = logs.read(made.write(tmp_path / "log.txt"))
        expected = [dict.fromkeys(UNKNOWN) | run for run in made.runs]
        assert [facts(run, names) for run, names in zip(log.runs, expected, strict=True)] == expected
        assert log.sources == made.sources
        assert log.size == len(made.text.encode())
        assert log.sha256 == hashlib.sha256(made.text.encode()).hexdigest()
        assert log.problems == (("this is no log of a training run",) if variant == "X" else ())


def test_our_committed_logs_are_read_as_they_are_written(tmp_path):
    """A plain reading of the same text is the oracle."""
    paths = logs.find([ROOT / ADAMW, ROOT / MUON, ROOT / YARDSTICK])
    assert len(paths) == 17
    for path in paths:
        text, log = path.read_text(encoding="utf-8"), logs.read(path)
        [run] = log.runs
        assert (log.problems, run.run_id, run.complete) == ((), path.stem, True)
        assert points(run) == [(int(a), float(b), float(c)) for a, b, c in
                               re.findall(r"^step:(\d+)/\d+ val_loss:(\S+) train_time:(\d+)ms", text, re.M)]
        assert run.seed == run.config["seed"] == int(re.search(r"^seed: (\d+)$", text, re.M)[1])
        assert (run.torch, run.cuda, run.world_size, run.num_gpus) == ("2.13.0+cpu", None, 2, 0)
        assert run.gpu_name == "CPU (x86_64, 1 threads), AMD EPYC" and run.val_tokens == 262_144
        assert run.total_steps == run.config["train_steps"]
        assert list(log.sources) == ["train_gpt.py", "muon.py", "adam.py", "kernels.py", "runtime.py",
                                     "data/loader.py",
                                     "data/shards.py"]
        assert "\n".join(embedded(log.sources)) == text[:text.index(LINE)].rstrip("\n") + "\n"


def test_a_single_source_has_the_hash_of_its_file(tmp_path):
    source = "print('a')\n\n\nprint('b')\n"
    for before, after in (("", "\n"), ("", ""),
                          (LINE + "\n", "")):  # how the formats of different years embed it
        log = read(tmp_path,
                   f"{before}{source}{after}{LINE}\nRunning PyTorch 2.9 compiled for CUDA 12\n{LINE}\n")
        assert log.runs[0].source_sha256 == hashlib.sha256(source.encode()).hexdigest()
        assert log.sources == {"train_gpt.py": source}


# A whole log cut anywhere

@pytest.mark.parametrize("variant", ["own", "A", "B2", "E3", "T2m", "T5"])
def test_a_log_cut_anywhere_never_gives_a_wrong_number(tmp_path, variant):
    """What is read is a beginning of what went in, every number whole; what is missing is named."""
    made = make(variant)
    whole, data = logs.read(made.write(tmp_path / "whole.txt")), made.text.encode()
    begin = 0 if len(data) < 4000 else data.rindex(LINE.encode()) - 400  # of a long source the end will do
    every = max(1, (len(data) - begin) // 400)
    for size in range(begin, len(data), every):
        log = read(tmp_path, data[:size])
        found, expected = [points(run) for run in log.runs], [points(run) for run in whole.runs]
        for k, run in enumerate(log.runs):
            assert points(run) == points(whole.runs[k])[:len(run.val_points)], size
            assert run.total_steps in (None, whole.runs[k].total_steps)
            for name in UNKNOWN:
                if run.val_points or name not in ("gpu_name", "num_gpus"):  # known at the end of the header
                    assert getattr(run, name) in (None, getattr(whole.runs[k], name)), (size, name)
            assert run.config in ({}, whole.runs[k].config)
            assert run.complete == (found[k] == expected[k] and variant != "A")
        if found != expected and not (variant == "A"
                                      and data[size - 1:size] == b"\n"):  # llm.c prints no total
            assert log.problems or [run.complete for run in log.runs] == [True] * len(found), size


@pytest.mark.parametrize("variant", ["C3", "D2", "T3"])
def test_a_log_without_a_newline_at_its_end_is_whole(tmp_path, variant):
    made = make(variant)
    log = read(tmp_path, made.text.rstrip("\n"))
    assert points(log.runs[-1]) == made.runs[-1]["val_points"] and log.problems == ()
    assert log.runs[-1].peak_mib == made.runs[-1].get("peak_mib")


# Several runs in a file

def steps(curve, total=300, unit="ms") -> str:
    return "".join(f"step:{step}/{total} val_loss:{loss:.5f} train_time:{ms}{unit} step_avg:1.00ms\n"
                   for step, loss, ms in curve)


FIRST, SECOND = [(100, 4.0, 10), (200, 3.5, 20), (300, 3.2, 30)], [(100, 4.1, 11), (200, 3.6, 21),
                                                                   (300, 3.3, 31)]


def test_a_run_begins_where_the_steps_begin_again(tmp_path):
    log = read(tmp_path, steps(FIRST) + steps(SECOND), "many.txt")
    assert [points(run) for run in log.runs] == [FIRST, SECOND] and log.problems == ()
    assert [run.run_id for run in log.runs] == ["many#01", "many#02"]
    lone = [(300, 3.2, 30)], [(300, 3.3, 31)]  # one validation each, at the same step
    assert [points(run) for run in read(tmp_path, steps(lone[0]) + steps(lone[1])).runs] == [*lone]


def test_each_trial_of_a_log_has_its_own_seed(tmp_path):
    """The seed of a trial also begins a run where the step does not fall, and is not given to the next."""
    text = f"trial:1/2 seed:7\n{steps(FIRST)}trial:2/2 seed:8\n{steps([(400, 3.0, 40)], 400)}{steps(SECOND)}"
    log = read(tmp_path, text)
    assert [(run.seed, points(run)) for run in log.runs] == [
        (7, FIRST), (8, [(400, 3.0, 40)]), (None, SECOND)]


def test_what_is_no_run_of_its_own_is_named(tmp_path):
    for text in (steps(FIRST) + steps(FIRST[-1:]), steps(FIRST[:1]) + steps(FIRST)):
        log = read(tmp_path, text)
        assert [points(run) for run in log.runs] == [FIRST]
        assert log.problems == ("a validation line is repeated, and counts once",)
    begun = "step:1/300 train_time:1ms step_avg:1.00ms\nstep:2/300 train_time:2ms step_avg:1.00ms\n"
    log = read(tmp_path, steps(FIRST) + begun)
    assert [points(run) for run in log.runs] == [FIRST]
    assert log.problems == ("a run without a validation is left out",)
    log = read(tmp_path, begun)
    assert [points(run) for run in log.runs] == [[]] and log.problems == ("there is no validation in it",)


# The clock

def clocked(change=lambda line: line) -> str:
    """A log of ours with a line for each of 60 steps of about 100 ms; a change of each line."""
    head = own([4.0, 3.0]).partition("\nstep:0")[0]
    lines = ["step:0/60 val_loss:4.0000 train_time:0ms step_avg:0.00ms"]
    for step in range(1, 61):
        ms = 100 * step + step % 7
        timers = f"train_time:{ms}ms step_avg:{ms / step:.2f}ms"
        lines.append(f"step:{step}/60 {timers}")
        if step % 30 == 0:
            lines.append(f"step:{step}/60 val_loss:3.0000 {timers}")
    return "\n".join([head, *map(change, lines), ""])


@pytest.mark.parametrize("pattern, new, problem", [
    ("nothing", "", None),
    (r"^(step:60/60 val_loss:\S+ train_time:)\d+ms", r"\g<1>5000ms", "the training time falls"),
    (r"^(step:60/60 val_loss:\S+ train_time:)6004ms", r"\g<1>6003ms", "the training time falls"),
    (r"^(step:60/60 val_loss:\S+ train_time:)6004ms", r"\g<1>6008ms", "a time is not its steps times"),
    (r"^(step:60/60 val_loss:\S+ train_time:\S+ step_avg:)\S+", r"\g<1>90.00ms", "a time is not its steps"),
    (r"^step:40/60 train_time:\d+ms", "step:40/60 train_time:3000ms", "the training time falls"),
])
def test_times_that_were_typed_in(tmp_path, pattern, new, problem):
    log = read(tmp_path, clocked(lambda line: re.sub(pattern, new, line)))
    assert log.problems == () if problem is None else problem in " ".join(log.problems)


def test_the_clocks_of_public_logs_are_no_fault(tmp_path):
    """They begin anew after 10 steps, or average since the last validation."""
    text = "step:10/20 train_time:30000ms step_avg:nanms\nstep:11/20 train_time:90ms step_avg:90.00ms\n"
    assert read(tmp_path, text + steps([(20, 3.2, 990)], 20)).problems == ()


# What a run knows

def test_a_loss_is_reached_where_the_curve_first_crosses_it(tmp_path):
    [run] = read(tmp_path, steps([(0, 10, 0), (100, 4, 1000), (200, 3, 3000), (300, 3.5, 4000),
                                  (400, 2, 6000)], 400)).runs
    assert run.steps_to(4) == 100 and run.time_to(4) == 1000  # at a validation
    assert run.steps_to(3.25) == 175 and run.time_to(3.25) == 2500  # between two; a later rise does not count
    assert run.steps_to(20) == 0 and run.steps_to(1.9) is None and run.time_to(1.9) is None
    assert run.steps_to(2) == 400 and run.time_to(2) == 6000  # at the last one
    assert run.time_to(2.75) == 5000 and run.at(200).val_loss == 3 and run.at(201) is None
    assert run.step_avg_ms == 15 and (run.final_val_loss, run.final_step) == (2, 400)


def test_a_loss_that_is_no_number_is_crossed_over(tmp_path):
    log = read(tmp_path, steps([(0, 10, 0), (100, math.nan, 10), (200, 3, 20), (300, 2, 30)]))
    assert log.runs[0].steps_to(3.2) == 200 and math.isnan(log.runs[0].at(100).val_loss)
    assert log.problems == ("a validation loss is not a finite number",)


def test_only_the_header_says_how_a_run_was_made(tmp_path):
    text = own([4, 3]).replace("\nattention:", "\nresumed: from x\nattention:")
    fake = f"resumed: in a docstring\nvalidation data: first 9 tokens, sha256 {'1' * 64}\n"
    [run] = read(tmp_path, text).runs
    assert run.resumed and (run.commit, run.training_data) == ("0" * 40, "0" * 16)
    assert run.validation_data == VALIDATION_DATA
    [run] = read(tmp_path, fake + own([4, 3]) + fake).runs
    assert not run.resumed and run.validation_data == VALIDATION_DATA


def test_oddities_are_named(tmp_path):
    def problems(text):
        return " | ".join(read(tmp_path, text).problems)

    assert problems("") == "the file is empty"
    assert problems("hello\n") == "this is no log of a training run"
    assert problems(make("E1").text.split("\nstep:0/1")[0] + "\n") == "there is no validation in it"
    assert problems(steps(FIRST, 400)) == "the run is incomplete: last validation at step 300 of 400"
    assert problems(steps([(100, 4, 50),
                           (300, 3, 40)])).startswith("the training time falls")
    assert problems(steps([(100, 4, 50), (300, 3, 50)])) == ""
    assert problems(steps([(100, 4, 50)],
                          200) + steps([(300, 3, 60)])) == "the planned number of steps changes within a run"
    assert problems(own([4, 3]) + "ended after step 100: by SIGTERM\n").startswith("the run ended early: "
                                                                                   "'ended after step 100")
    assert "NUL" in problems(steps(FIRST).encode() + b"\0" * 4096)  # as a crash may leave it
    assert problems("é".encode() * logs.LINE_LIMIT + b"\n" + steps(FIRST).encode()) == ""
    assert "binary" in problems(steps(FIRST).encode("utf-16"))
    assert "binary" in problems(os.urandom(10_000).replace(b"\n", b"\0"))
    assert problems(own([4, 3]).replace("config: {",
                                        "config: {{")).startswith("the config line cannot be read: ")
    for odd in ("[" * 50_000, '[[1]],', '{"b": 1},', '"\\ud800",', '"\\u001b[2J",', "1" * 5000 + ","):
        log = read(tmp_path, own([4, 3]).replace("config: {", f'config: {{"a": {odd}'))
        assert "config" in " ".join(log.problems)
        assert log.runs[0].config == {}
        assert len(log.runs[0].val_points) == 2


def test_line_ends_of_windows_change_nothing(tmp_path):
    made = make("E3")
    log = read(tmp_path, made.text.replace("\n", "\r\n"))
    assert (log.sources, points(log.runs[0])) == (made.sources, made.runs[0]["val_points"])
    assert log.runs[0].source_sha256 == read(tmp_path, made.text).runs[0].source_sha256


# Hostile logs

@pytest.mark.parametrize("line", [
    "step:1" + "0" * 30 + "/300 val_loss:1.0000 train_time:1ms step_avg:1.00ms",
    "step:250/1" + "0" * 5000 + " val_loss:1.0000 train_time:1ms step_avg:1.00ms",
    "step:250/300 val_loss:1_0 train_time:1ms step_avg:1.00ms",
    "step:250/300 val_loss:0x1 train_time:1ms step_avg:1.00ms",
    "step:250/300 val_loss:" + "1" * 50 + " train_time:1ms step_avg:1.00ms",
    "step:250/300 val_loss:1.0 val_loss:2.0 train_time:1ms step_avg:1.00ms",
    "step:250/300 val_loss:1.0 train_time:1h step_avg:1.00ms",
    "step:250/300 val_loss:1.0 train_time:-1ms step_avg:1.00ms",
    "step:250/300 val_loss: 1.0 train_time:1ms",
    "step:250/300  val_loss:1.0 train_time:1ms",
    "step:250/300val_loss:1.0 train_time:1ms",
    "step:250 val_loss:1.0 train_time:1ms",
    "step:-1/300 val_loss:1.0 train_time:1ms",
    "step:250/300 val_loss:1.0 train_time:1ms \0",
    "step:250/300 val_loss:٣.١ train_time:1ms",  # digits, but not ours
    "step:250/300 val_loss:1.\u20280 train_time:1ms",  # a space, but not ours
    "step:٣/300 val_loss:1.0 train_time:1ms",
    "step:250/300 val_loss:1.0 train_time:1ms" + " a:1" * 20_000,
])
def test_step_lines_that_break_the_grammar_are_not_read(tmp_path, line):
    log = read(tmp_path, steps(FIRST[:2]) + line + "\n" + steps(FIRST[2:]))
    assert [points(run) for run in log.runs] == [FIRST]
    named = " ".join(log.problems)
    assert "cannot be read" in named or "is not read" in named or not re.match(r"step:[0-9]", line)


def test_what_a_source_says_is_not_believed(tmp_path):
    """Output, headers, separators and seeds inside the source, at the beginning of a line."""
    fake = make("E2", seed=1).text + "seed: 999\npeak memory allocated: 1 MiB reserved: 1 MiB\n"
    for variant in ("B1", "C3", "D2", "E3", "T2", "own"):
        made = make(variant)
        if variant == "B1":
            text = LINE + "\n" + fake + made.text.removeprefix(LINE + "\n")
        else:
            text = fake + made.text
        log = read(tmp_path, text)
        assert [facts(run, expected) for run, expected in zip(log.runs, made.runs, strict=True)] == made.runs
        assert fake.split("\n")[0] in log.sources["train_gpt.py"]
        assert any("before the last header" in problem for problem in log.problems)


def test_what_a_run_prints_later_changes_no_fact(tmp_path):
    made = make("E1")
    log = read(tmp_path,
               made.text + "Running Triton version 9\nRunning PyTorch 9 compiled for CUDA 9\nRunning Python "
                           "9\n"
               "peak memory allocated: 1 MiB reserved: 1 MiB\n")
    assert [facts(run, expected) for run, expected in zip(log.runs, made.runs, strict=True)] == made.runs


@pytest.mark.parametrize("name", ["/etc/passwd", "../../evil.py", "a/../b.py", "train_gpt.py"])
def test_names_of_embedded_files_stay_in_their_folder(tmp_path, name):
    log = read(tmp_path,
               "\n".join(embedded({"train_gpt.py": "a\n", name + "": "b\n"} if name != "train_gpt.py" else {})
                         or ["a", "-" * 40, f"# {name}", "-" * 40, "b"]) + f"\n{LINE}\n" + steps(FIRST))
    assert list(log.sources) == ["train_gpt.py"] and name in log.sources["train_gpt.py"]
    assert "cannot be used" in log.problems[0]


def test_a_first_file_with_a_name_is_not_taken_for_the_trainer(tmp_path):
    files = {"examples/simple.py": "a = 1\n", "muon.py": "b = 2\n"}
    text = "".join(f"{'-' * 40}\n# {name}\n{'-' * 40}\n{content}" for name, content in files.items())
    log = read(tmp_path, f"{text}\n{LINE}\n" + steps(FIRST))
    assert log.sources == files and log.problems == ()


def test_facts_cannot_steer_a_terminal(tmp_path):
    text = make("E1").text.replace("Running Triton version 3.4.0",
                                   "Running Triton version 3.4\x1b[31m" + "x" * 300)
    [run] = read(tmp_path, text).runs
    assert run.triton.isprintable() and len(run.triton) <= 100
    [run] = read(tmp_path, f"|  0  NVIDIA \x1b[2J{'x' * 300}  On |\n" + steps(FIRST)).runs
    assert run.gpu_name.startswith("NVIDIA ?[2Jx") and len(run.gpu_name) <= 100
    assert all(problem.isprintable() for problem in read(tmp_path, "step:1/1 \x1b]0;owned\x07\n").problems)


def test_limits_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "POINT_LIMIT", 2)
    log = read(tmp_path, steps(FIRST))
    assert points(log.runs[0]) == FIRST[:2]
    assert log.problems[0] == "more than 2 validations: the rest is not read"
    monkeypatch.setattr(logs, "SOURCE_LIMIT", 100)
    log = read(tmp_path, own([4, 3], files={"train_gpt.py": "x = 1\n" * 100}))
    assert (log.sources, log.runs[0].source_sha256) == ({}, None)
    assert "an embedded source of more than 100 bytes is not read" in log.problems


def test_long_lines_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "LINE_LIMIT", 100)

    def long(length: int) -> str:
        line = "step:250/300 val_loss:1.0 train_time:1ms"
        key = "k" * ((length - len(line)) // 2)
        return f"{line} {key}:".ljust(length - 2, "x") + "ms"
    for length in (*range(96, 106), 1000):
        for end in ("\n" + steps(FIRST[2:]), ""):  # also as the last line, without an end
            log = read(tmp_path, steps(FIRST[:2]) + long(length) + end)
            assert (250 in [point.step for point in log.runs[0].val_points]) == (length < 100), (length, end)
            assert ("a line of 100 bytes and more is not read" in log.problems) == (length >= 100)


# Files and folders

def test_logs_are_found_by_their_endings_and_each_once(tmp_path):
    for name in ("b/2.txt", "b/1.log", "a.out", "notes.md", "b/c/run.stdout", "b/.hidden.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "b/outside.txt").symlink_to("/etc/hosts")
    (tmp_path / "b/loop").symlink_to(tmp_path / "b")
    (tmp_path / "b/twice.txt").symlink_to(tmp_path / "b/2.txt")
    (tmp_path / "b/broken.txt").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "b/pipe.txt")
    found = [path.relative_to(tmp_path).as_posix() for path in logs.find([tmp_path])]
    assert found == ["a.out", "b/1.log", "b/2.txt", "b/c/run.stdout"]
    assert logs.find([tmp_path / "notes.md", tmp_path / "b/2.txt", tmp_path / "b/twice.txt"]) == [
        tmp_path / "b/2.txt",
        tmp_path / "notes.md"]  # a file that is named counts, whatever it is called; none twice
    for path, found in (("missing", "nothing there; check the path"),
                        ("x" * 5000, "File name too long; check path")):
        with pytest.raises(UsageError, match=found):
            logs.find([tmp_path / path])


def test_what_is_no_file_is_refused(tmp_path):
    for path, found in ((tmp_path, "a folder"), (tmp_path / "no", "nothing there"), ("/dev/zero", "a device"),
                        ("/dev/null", "a device"), ("a\0b", "nothing there"),
                        ("x" * 5000, "File name too long")):
        with pytest.raises(UsageError, match=found):
            logs.read(path)


def test_of_an_experiment_and_of_a_record_the_runs_are_found(tmp_path):
    for name in ("ab/a/1.txt", "ab/b/1.txt", "ab/output/1.txt", "ab/verdict.txt", "rec/runs/1.txt",
                 "rec/baseline/1.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "ab/plan.json").write_text(plan_text(1))
    (tmp_path / "rec/record.json").write_text("{}")
    found = [path.relative_to(tmp_path).as_posix() for path in logs.find([tmp_path])]
    assert found == ["ab/a/1.txt", "ab/b/1.txt", "rec/runs/1.txt"]
    (tmp_path / "ab/plan.json").write_text("[]")  # the plan of something else
    assert len(logs.find([tmp_path / "ab"])) == 4
