"""compare: groups side by side, with numbers from known curves."""
import dataclasses
import importlib
import itertools
import json
import os
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
from tests.helpers.committed import ADAMW, MUON, ROOT, TRACK
from tests.helpers.synthetic import make, own

from records import compare, history, logs, palette
from records.__main__ import guarded



@pytest.fixture
def call(monkeypatch, capsys):
    """Exit code, output and errors of `python -m records compare ARGUMENTS`, run from the repository."""
    monkeypatch.chdir(ROOT)

    def call(*arguments):
        code = guarded(["compare", *map(str, arguments)])
        return code, *capsys.readouterr()
    return call


def write(folder: Path, name: str, curves, **settings) -> Path:
    """A folder of logs of train_gpt.py, one for each (losses, times)."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    for seed, (losses, times) in enumerate(curves):
        (folder / name / f"{seed}.txt").write_text(own(losses, times, **{"seed": seed, **settings}))
    return folder / name


def rows(text: str, title: str) -> dict[str, list[str]]:
    """Cells of the table below a title, by their first cell."""
    lines = text.split(f"\n{title}\n", 1)[1].splitlines()
    body = itertools.takewhile(str.strip,
                               lines[lines.index(next(line for line in lines if "───" in line)) + 1:])
    return {cells[0]: cells[1:] for cells in (re.split(r"\s{2,}", line.strip()) for line in body)}


def test_tables_and_speed_ups(tmp_path, call):
    slow = write(tmp_path, "slow", [([6, 4, 3, 2], [0, 1000, 2000, 3000]),
                                    ([6, 4.2, 3.2, 1], [0, 1000, 2000, 4000])])
    fast = write(tmp_path, "fast", [([6, 3, 1], [0, 1000, 2000]), ([6, 3.2, 1.2], [0, 1000, 2200])])
    code, out, err = call(slow, fast, "--target", "2.5")
    assert (code, err) == (0, "") and "warning" not in out
    assert rows(out, "loss by step") == {"100": ["4.1000 ± 0.1414", "3.1000 ± 0.1414"],
                                         "200": ["3.1000 ± 0.1414", "1.1000 ± 0.1414"],
                                         "300": ["1.5000 ± 0.7071", "-"]}
    by_time = rows(out, "loss by time")
    assert list(by_time)[0] == "1.0" and list(by_time)[-1] == "3.0" and len(by_time) == 12
    assert by_time["1.0"] == ["4.1000 ± 0.1414", "3.1000 ± 0.1414"]
    assert by_time["3.0"] == ["2.0500 ± 0.0707", "-"]
    at = 1 + 2 / 11 * 3  # seconds of the fourth row
    losses = [[np.interp(at, [1, 2, 3], [4, 3, 2]), np.interp(at, [1, 2, 4], [4.2, 3.2, 1])],
              [np.interp(at, [1, 2], [3, 1]), np.interp(at, [1, 2.2], [3.2, 1.2])]]
    cells = [f"{np.mean(group):.4f} ± {np.std(group, ddof=1):.4f}" for group in losses]
    assert by_time[f"{at:.1f}"] == cells
    assert "loss by tokens: as by step, for every step is of 2,048 tokens" in out
    before, after = [2500, 2000 + 2000 * 0.7 / 2.2], [1250, 1000 + 1200 * 0.7 / 2]
    assert f"speed-up in time to 2.5: {np.mean(before) / np.mean(after):.3f} (95 %: " in out
    assert f"speed-up in time of the whole run: {3500 / 2100:.3f} (95 %: " in out
    summary = next(line for line in out.splitlines() if line.strip().startswith("slow")).split()
    assert " ".join(summary) == ("slow 2 300 1.5000 ± 0.7071 3.50 ± 0.71 11.67 ± 2.36 2 of 2 "
                                 f"{np.mean(before) / 1000:.2f} ± {np.std(before, ddof=1) / 1000:.2f} "
                                 f"{np.mean([250, 200 + 70 / 2.2]):.1f} ± "
                                 f"{np.std([250, 200 + 70 / 2.2], ddof=1):.1f}")


def test_our_own_logs(call):
    """The ratio of the README, and what it rests on."""
    code, out, err = call(ADAMW, MUON)
    assert (code, err) == (0, "") and "warning" not in out
    assert "speed-up in time of the whole run: 1.859" in out and "settings: val_every 240 -> 120" in out
    assert "source: the same" in out
    assert '"adamw" -> "muon"' in out
    assert "seed" not in out.split("settings:")[1]
    assert "speed-up in time to 1.6: 1.975" in out and "9 of 9" in out


def test_a_folder_of_folders_is_several_groups(call):
    out = call(TRACK)[1]
    assert all(f"{name} against 2026-11-22_AdamW" in out
               for name in ("2026-11-22_Muon", "2026-11-24_Reference"))


# Where curves part

def noisy(rng, losses, sd=0.001):
    return [round(loss + rng.gauss(0, sd), 4) for loss in losses], [1000.0 * k for k in range(len(losses))]


def test_curves_part_where_they_were_made_to(tmp_path, call):
    rng = random.Random(0)
    a, b = [6, 4, 3, 2.5, 2, 1.7], [6, 4, 3, 2.49, 1.9, 1.6]
    first = write(tmp_path, "a", [noisy(rng, a) for _ in range(6)])
    second = write(tmp_path, "b", [noisy(rng, b) for _ in range(5)])
    out = call(first, second)[1]
    found = re.search(r"the curves part by step 300: (\S+), p = (\S+) \(Welch's t-test at 5 validations", out)
    losses = [[logs.read(path).runs[0].at(300).val_loss for path in logs.find([folder])]
              for folder in (second, first)]
    assert float(found[1]) == pytest.approx(np.mean(losses[0]) - np.mean(losses[1]), abs=1e-4)
    assert float(found[2]) == pytest.approx(scipy.stats.ttest_ind(*losses, equal_var=False).pvalue, rel=0.05)


def test_equal_curves_part_rarely():
    """100 pairs of groups of 4 with 9 validations: at most 1 % should be said to part.

    Without Bonferroni it would be 9 %.
    """
    rng, parted = random.Random(1), 0
    for _ in range(100):
        groups = [SimpleNamespace(runs=[run_of([(100 * k, rng.gauss(3, 0.001)) for k in range(10)])
                                        for _ in range(4)])
                  for _ in range(2)]
        parted += "part by" in compare.parting(*groups)
    assert parted <= 3


def run_of(points) -> logs.RunFacts:
    return logs.RunFacts("made up", tuple(logs.ValPoint(step, loss, None, {}) for step, loss in points))


@pytest.mark.parametrize("curves,expected", [
    (([[6, 3, 2]], [[6, 2, 1], [6, 2.1, 1.1]]), "unknown, expected at least 2 values, found 1"),
    (([[6, 3, 2], [6.1, 3, 2]], [[6, 2, 1], [6.1, 2, 1]]), "unknown, all 2 values are equal"),
    (([[6, 3, 2], [6, 3.1, 2.1]], [[6, 3, 2.1], [6, 3.1, 2]]), "do not part"),
])
def test_what_cannot_be_judged_is_said(tmp_path, call, curves, expected):
    groups = [write(tmp_path, name, [(losses, None) for losses in side]) for name, side in zip("ab", curves)]
    assert expected in call(*groups)[1]


def test_no_step_in_common(tmp_path, call):
    a = write(tmp_path, "a", [([6, 3], None), ([6, 3.1], None)])
    b = write(tmp_path, "b", [([6, 3], None), ([6, 3.1], None)], every=70)
    assert "where the curves part: unknown, there is no step at which all have a validation" in call(a, b)[1]


# Tokens

def test_tokens_are_those_of_the_trainer():
    """Against the trainer's own walk through its schedule, step by step."""
    pytest.importorskip("torch")
    sys.path.insert(0, str(ROOT))
    config = importlib.import_module("train_gpt").Config
    for settings in (dict(), dict(train_steps=333, stages=4, adam_every=2, extension_steps=7),
                     dict(batch_tokens=(65_536,)),
                     dict(train_steps=50, stages=2, extension_steps=0, batch_tokens=(131_072, 262_144),
                          untie_stage=1)):
        cfg = config(**settings)
        walk = [0, *itertools.accumulate(cfg.at("batch_tokens", step) for step in range(cfg.train_steps))]
        run = run_of([(step, 3.0) for step in range(0, cfg.train_steps + 1, 5)])
        run.config.update(json.loads(json.dumps(dataclasses.asdict(cfg))))
        assert compare.tokens_of(run) == [walk[point.step] for point in run.val_points]


@pytest.mark.parametrize("settings", [{"stages": 10**12}, {"batch_tokens": "many"}, {"batch_tokens": []},
                                      {"adam_every": 0},
                                      {"train_steps": None}, {"stages": 1e308}, {"extension_steps": -1e308},
                                      {"batch_tokens": [{}]}])
def test_tokens_are_unknown_where_settings_are_odd(tmp_path, call, settings):
    a = write(tmp_path, "a", [([6, 3, 2], None)], **settings)
    b = write(tmp_path, "b", [([6, 3, 1], None)])
    code, out, err = call(a, b)
    assert code == 0 and "loss by tokens: unknown, the logs of a do not tell it" in out


def test_loss_by_tokens_where_batches_differ(tmp_path, call):
    a = write(tmp_path, "a", [([6, 4, 3, 2], None)], batch_tokens=[1000])
    b = write(tmp_path, "b", [([6, 4, 3, 2], None)], batch_tokens=[2000])
    table = rows(call(a, b)[1], "loss by tokens")
    assert list(table)[0] == "100,000"
    assert table["300,000"] == ["2.0000", "3.5000"]
    assert table["100,000"] == ["4.0000", "-"]


# Warnings

@pytest.mark.parametrize("settings,expected", [
    (dict(device="NVIDIA A40"), "hardware differs: a CPU (x86_64, 1 threads), Model T; b 2 x NVIDIA A40"),
    (dict(torch="2.14.0"), "torch differs: a 2.13.0+cpu; b 2.14.0"),
    (dict(world_size=4), "world size differs: a 2; b 4"),
    (dict(val_tokens=1024), "tokens of a validation differs: a 262,144; b 1,024"),
])
def test_warnings(tmp_path, call, settings, expected):
    curves = [([6, 3, 2], None), ([6, 3.1, 2.2], None)]
    code, out, err = call(write(tmp_path, "a", curves), write(tmp_path, "b", curves, **settings))
    assert code == 0 and [line for line in out.splitlines() if "warning" in line] == [f"warning: {expected}"]


def test_runs_that_did_not_come_to_their_end_are_named(tmp_path, call):
    curves = [([6, 3, 2], None), ([6, 3.1, 2.2], None)]
    out = call(write(tmp_path, "a", curves), write(tmp_path, "b", curves, total=900))[1]
    assert out.count("warning: b: ") == 2
    assert "b: 0 has no validation at its last step and ends at 200 of 900" in out


def test_copies_are_named(tmp_path, call):
    a = write(tmp_path, "a", [([6, 3, 2], None)] * 2 + [([6, 3.1, 2], None)])
    out = call(a, write(tmp_path, "b", [([6, 3, 1], None)]))[1]
    assert "warning: a: Counted once, for they are the same as another run to the millisecond: 1." in out


def test_a_group_of_several_sources_and_files_left_out(tmp_path, call):
    a = write(tmp_path, "a", [([6, 3, 2], None), ([6, 3.1, 2.2], None)])
    (a / "2.txt").write_text(own([6, 3, 2.1], files={"train_gpt.py": "other\n"}))
    (a / "notes.txt").write_text("hello\n")
    out = call(a, make("T2m").write(tmp_path / "many.txt"))[1]
    assert "warning: a: The runs have 2 different sources; the first one is compared." in out
    assert re.search(r"warning: .*notes.txt is left out: this is no log of a training run", out)
    assert re.search(r"^ many +3 ", out, re.M)  # the runs of a file are a group


# Sources

def test_differences_of_sources(tmp_path, call):
    curves = [([6, 3, 2], None), ([6, 3.1, 2.2], None)]
    before = {"train_gpt.py": "a = 1\nb = 2\nc = 3\n", "muon.py": "m\n", "old.py": "x\ny\n"}
    after = {"train_gpt.py": "a = 1\nb = 20\nc = 3\nd = 4\n", "muon.py": "m\n", "new.py": "\x1b[2Jz\n[red]\n"}
    folders = write(tmp_path, "a", curves, files=before), write(tmp_path, "b", curves, files=after)
    out = call(*folders)[1]
    assert "source: new.py +2 -0, old.py +0 -2, train_gpt.py +2 -1" in out and "+b = 20" not in out
    out = call(*folders, "--diff")[1]
    lines = out.splitlines()
    at = lines.index("--- a: train_gpt.py")
    assert lines[at:at + 8] == ["--- a: train_gpt.py", "+++ b: train_gpt.py", "@@ -1,3 +1,4 @@", " a = 1",
                                "-b = 2", "+b = 20",
                                " c = 3", "+d = 4"]
    assert "+?[2Jz" in lines and "+[red]" in lines and "\x1b" not in out


def test_logs_without_a_source(tmp_path, call):
    a, b = make("T5", 1).write(tmp_path / "a.txt"), make("E1", 2).write(tmp_path / "b.txt")
    out = call(a, b)[1]
    assert "source: not in the logs of both" in out and "settings" not in out


# The plot

def test_plot(tmp_path, call):
    """Both groups were drawn, line and band, and nothing else in colour."""
    import matplotlib.image
    code, out, err = call(ADAMW, MUON, "--plot", tmp_path / "out.png")
    assert (code, err) == (0, "") and "2026-11-22_Muon against 2026-11-22_AdamW" in out
    pixels = matplotlib.image.imread(tmp_path / "out.png")[..., :3] * 255
    assert pixels.shape == (1200, 1800, 3)
    for k, color in enumerate(palette.COLORS):
        line = np.array([int(color[i:i + 2], 16) for i in (1, 3, 5)])
        of_line, of_band = ((abs(pixels - shade) < 2).all(axis=-1).sum()
                            for shade in (line, 0.2 * line + 0.8 * 255))
        assert (of_line > 1000 and of_band > 1000) if k < 2 else (of_line < 100 and of_band < 100), color


@pytest.mark.parametrize("curves", [
    [([6], None)], [([3, 3, 3], None)] * 2, [([float("nan"), float("inf"), 3], None)],
    [([float("nan")], None)],
    [([6, 3, 2], [0, 0, 0])], [([6, 3, 2], [5000, 200, 3])], [([1e19, 1e-4, 2], None)],
])
@pytest.mark.filterwarnings("error")
def test_odd_curves_are_compared_and_drawn(tmp_path, call, curves):
    odd = write(tmp_path, r"_odd $\frac$", curves)
    good = write(tmp_path, "good", [([6, 3, 2], None), ([6, 3.1, 2.1], None)])
    code, out, err = call(odd, good, make("A").write(tmp_path / "a.log"), "--plot", tmp_path / "out.svg")
    assert (code, err) == (0, "") and (tmp_path / "out.svg").stat().st_size > 5000
    assert "runs of a did not reach" not in out  # llm.c tells no last step
    assert call(good, odd)[0] == 0


def test_no_two_groups_are_drawn_in_one_colour(tmp_path, call):
    folders = [write(tmp_path, f"g{k}", [([6, 3 - k / 100, 2], None)]) for k in range(9)]
    code, out, err = call(*folders[:8], "--plot", tmp_path / "out.pdf")
    assert (code, err) == (0, "") and (tmp_path / "out.pdf").read_bytes().startswith(b"%PDF")
    assert len({*palette.COLORS}) == 8
    code, out, err = call(*folders, "--plot", tmp_path / "more.pdf")
    assert code == 2 and "expected at most 8 groups" in err and not (tmp_path / "more.pdf").exists()


def test_one_run_is_drawn_and_judged_alone(tmp_path, call):
    one = write(tmp_path, "one", [([6, 3, 2], None)]) / "0.txt"
    code, out, err = call(one, "--plot", tmp_path / "one.png")
    assert (code, err) == (0, "") and (tmp_path / "one.png").stat().st_size > 5000
    assert "loss rule of track shakespeare, 0: cannot be judged" in out and rows(out, "loss by step") == {
        "100": ["3.0000"], "200": ["2.0000"]}


# Public records

def as_if_ours(path: Path, number: int, more: float) -> Path:
    """A log of train_gpt.py with the curve of a public record, and something added to its losses."""
    points = next(points for key, points in history.curves().items() if key[:2] == ("small", number))
    total = points[-1].step
    head = own([1], track="small").partition("\nstep:")[0]
    path.write_text("\n".join([head, *(f"step:{p.step}/{total} val_loss:{p.val_loss + more:.4f} "
                                       f"train_time:{p.train_time_ms}ms "
                                       "step_avg:1.00ms" for p in points), ""]))
    return path


def test_a_run_beside_a_public_record(tmp_path, call):
    log = as_if_ours(tmp_path / "mine.txt", 80, 0.01)
    code, out, err = call(log, "--history", 80, "--plot", tmp_path / "out.png")
    assert (code, err) == (0, "") and (tmp_path / "out.png").exists()
    runs = [points for key, points in history.curves().items() if key[:2] == ("small", 80)]
    finals = [points[-1].val_loss for points in runs]
    gap = runs[0][-1].val_loss + 0.01 - np.mean(finals)
    assert f"beside its curve, at 5 validations: {gap:+.4f} at step 1,480" in out
    assert rows(out, "loss by step")["1,480"] == [f"{np.mean(finals):.4f} ± {np.std(finals, ddof=1):.4f}",
                                                  f"{runs[0][-1].val_loss + 0.01:.4f}"]
    assert "times are not compared" in out and "loss rule of track small, public" not in out


@pytest.mark.parametrize("arguments, sentence", [
    (["--history", "500"],
     "--history: expected the number of a public record of track small whose curve is kept, found 500; ch"),
    (["--history", "80", "--track", "shakespeare"],
     "--history: expected a log of a track with public records, found track shak"),
])
def test_records_that_are_not_there(tmp_path, call, arguments, sentence):
    code, out, err = call(as_if_ours(tmp_path / "mine.txt", 80, 0.0), *arguments)
    assert (code, out) == (2, "") and sentence in err


@pytest.mark.parametrize("arguments,sentence", [
    (["missing", MUON], "missing: expected a log or a folder of logs, found nothing there; check the path"),
    (["data"], "data: expected logs with validations, found none; check the path"),
    ([MUON, "--plot", "out.txt"],
     "--plot: expected a name that ends in .png, .svg, .pdf, found 'out.txt'; change it"),
    ([MUON, "--plot", "/nowhere/out.png"],
     "--plot: expected to write /nowhere/out.png, found: No such file or directory; ch"),
    ([MUON, "--target", "0"], "expected a loss above 0"),
])
def test_errors(call, arguments, sentence):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "") and err.startswith("records: ") and sentence in err and err.count("\n") == 1
    assert not os.path.exists("out.txt")
