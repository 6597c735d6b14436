"""show: stable JSON, readable tables, broken files named."""
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.helpers.committed import MUON
from tests.helpers.synthetic import make, own

from data.files import ROOT
from records import logs

@pytest.fixture
def call(records, at_root):
    return lambda *arguments: records("show", *arguments)


def test_json_holds_what_went_into_the_log(tmp_path, call):
    made = make("E1")
    path = made.write(tmp_path / "log.txt")
    code, out, err = call(tmp_path, "--json")
    [facts] = json.loads(out)
    assert (code, err, facts["path"]) == (0, "", str(path))
    [run], [expected] = facts["runs"], made.runs
    curve = expected["val_points"]
    assert [tuple(point.values()) for point in run["val_points"]] == curve
    assert [run[key] for key in ("final_step", "final_val_loss", "final_time_ms")] == [*curve[-1]]
    for key in ("total_steps", "complete", "torch", "gpu_name", "num_gpus", "world_size", "seed", "peak_mib"):
        assert run[key] == expected.get(key), key
    assert facts["sources"].keys() == made.sources.keys()


def test_json_has_no_nan(tmp_path, call):
    (tmp_path / "a.txt").write_text("step:0/9 val_loss:inf train_time:0ms step_avg:nanms\nstep:9/9 "
                                    "val_loss:nan train_time:1ms\n")
    out = call(tmp_path / "a.txt", "--json")[1]
    [facts] = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert [point["val_loss"] for point in facts["runs"][0]["val_points"]] == [None, None]
    assert facts["problems"] == ["a validation loss is not a finite number"]


@pytest.mark.parametrize("settings,path,expected", [
    (dict(track="shakespeare", target_loss=1.66), "a.txt",
     1.6),  # the rule of the track counts, not what the log names
    (dict(track="small"), "a.txt", 3.28),
    (dict(track=["?"]), "a.txt", 3.28),
    (dict(track="none"), "track_2_medium/x/a.txt", 2.92),
])
def test_the_target_is_that_of_the_track(tmp_path, call, settings, path, expected):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(own([5, 1], [0, 1000], **settings))
    [run] = json.loads(call(tmp_path / path, "--json")[1])[0]["runs"]
    assert (run["target"], run["steps_to_target"]) == (expected, pytest.approx(100 * (5 - expected) / 4))
    [run] = json.loads(call(tmp_path / path, "--json", "--target", "2")[1])[0]["runs"]
    assert (run["target"], run["time_to_target_ms"], run["steps_to_target"]) == (2, 750, 75)


def test_one_log_is_shown_in_full(call):
    path = next((ROOT / MUON).glob("runs/2f9c*.txt")).relative_to(ROOT)
    code, out, err = call(path)
    assert (code, err) == (0, "")
    words = " ".join(out.split())
    for expected in ("480 1.5589 98.77 205.77 1.6 80.81 406.8 8 2 CPU (x86_64, 1 threads)",
                     "muon.py (531 lines)",
                     "4942644c1eb5cca0103f72e88f5678a978f9b17f1ff649f014a508c9cf10ca18",
                     logs.read(ROOT / path).runs[0].source_sha256, "120 2.0600 21.31"):
        assert expected in words, expected


def test_one_log_names_few_of_many_sources_what_it_was_judged_on_and_nothing_unknown(tmp_path, call):
    files = {"train_gpt.py": "# the trainer\n", **{f"engine/part{k}.py": "x = 1\ny = 2\n" for k in range(9)}}
    path = tmp_path / "a.txt"
    path.write_text(own([5, 1], files=files, recipe="miniature"))
    words = " ".join(call(path)[1].split())
    assert "engine/part2.py (2 lines) and 6 more, 19 lines in all; --source NAME prints one" in words
    assert "part3" not in words and "CUDA" not in words and "peak memory" not in words
    assert "recipe miniature" in words and "262,144 tokens" in words and "those of track shakespeare" in words

    path.write_text(own([5, 1], val_tokens=131_072).replace("attention:", "resumed: from a.pt\nattention:"))
    words = " ".join(call(path)[1].split())
    assert "131,072 tokens" in words and "other than those of track shakespeare" in words
    assert "resumed from a checkpoint: such a run is no record" in words


def test_broken_files_are_named_and_do_not_hide_the_others(tmp_path, call):
    make("E1").write(tmp_path / "good.txt")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 99)
    (tmp_path / "empty.log").write_bytes(b"")
    (tmp_path / "half.out").write_text(make("E2").text[:900])
    code, out, err = call(tmp_path)
    assert (code, err) == (1, "") and "3.4.0" not in err
    for name, problem in (("binary.txt", "NUL"), ("empty.log", "the file is empty"), ("half.out", "cut")):
        assert any(name in line and problem in line for line in out.splitlines()), name
    assert re.search(r"^ good.txt +\d+ +3\.\d{4} ", out, re.M)
    assert [len(log["runs"]) for log in json.loads(call(tmp_path, "--json")[1])] == [0, 0, 1, 1]


def test_a_compressed_log_is_to_be_unpacked(tmp_path, call):
    (tmp_path / "a.txt").write_bytes(gzip.compress(make("E1").text.encode()))
    code, out, err = call(tmp_path / "a.txt")
    assert (code, err) == (1, "") and "the file is compressed: unpack it first" in out and "NUL" not in out


def test_hostile_names_and_texts_are_inert(tmp_path, call):
    path = tmp_path / "[red]\x1b[2J[nothing]\n.txt"
    path.write_text(make("E1").text.replace("Running Triton version 3.4.0",
                                            "Running Triton version [bold]\x1b[2J"))
    for arguments in ((path,), (path, make("E2").write(tmp_path / "b.txt"))):
        code, out, err = call(*arguments)
        assert code == 0 and "\x1b" not in out + err and "[red]?[2J[nothing]?.txt" in out.replace("\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems want names in UTF-8")
def test_a_file_whose_name_is_no_text_is_shown(tmp_path, call):
    path = os.fsencode(tmp_path) + b"/\xff.txt"
    Path(os.fsdecode(path)).write_text(make("E1").text)
    assert call(tmp_path)[0] == 0 and len(json.loads(call(tmp_path, "--json")[1])[0]["runs"]) == 1


@pytest.mark.parametrize("arguments,sentence", [
    (["data"], "data: expected logs (.log, .out, .stdout, .txt), found none; check the path"),
    ([MUON, "--target", "nan"], "expected a number above 0"),
    ([MUON, "--target", "-1"], "expected a number above 0"),
    ([MUON, "--target", "x"], "expected"),
])
def test_bad_paths_and_targets_are_refused_in_one_sentence(call, arguments, sentence):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "") and err.startswith("records: ") and sentence in err and err.count("\n") == 1


def test_no_heavy_library_is_loaded():
    """No other verb is loaded either."""
    heavy = {"torch", "numpy", "scipy", "matplotlib", "pydantic", "jinja2", "records.compare"}
    program = (f"import sys; from records.__main__ import guarded; guarded(sys.argv[1:]); print({heavy} & "
               "set(sys.modules), file=sys.stderr)")
    path = next((ROOT / MUON).glob("runs/*.txt"))
    done = subprocess.run([sys.executable, "-c", program, "show", path], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.stderr == "set()\n"


def test_a_source_is_printed(call):
    path = next((ROOT / MUON).glob("runs/*.txt"))
    assert call(path, "--source", "muon.py") == (0, logs.read(path).sources["muon.py"], "")
    code, out, err = call(path, "--source", "none.py")
    assert (code, out) == (2, "") and "expected a file that" in err
