"""compare: groups side by side, which runs of them count, and numbers from known curves."""
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import gmean
from tests.helpers.committed import ADAMW, MUON, TRACK
from tests.helpers.synthetic import make, own
from tests.records.conftest import plan_text

from data.errors import UsageError
from records import charts, groups, history
from records.statistics import ratio, t_test, welch

LOSSES = [1.571, 1.582, 1.590, 1.5777, 1.5812]


@pytest.fixture
def compare(records, at_root):
    return lambda *arguments: records("compare", *arguments)


def write(folder: Path, name: str, curves, first_seed: int = 0, **settings) -> Path:
    """A folder of logs of train_gpt.py, one for each (losses, times in ms)."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    for seed, (losses, times) in enumerate(curves, first_seed):
        (folder / name / f"{seed}.txt").write_text(own(losses, times, **{"seed": seed, **settings}))
    return folder / name


def ending_at(losses) -> list[tuple]:
    """Curves with these final losses, and times that differ."""
    return [([6, 3 + k / 100, loss], [0, 1000, 2000 + 10 * k]) for k, loss in enumerate(losses)]


def rows(text: str, title: str) -> dict[str, list[str]]:
    """Cells of the table below a title, by their first cell."""
    lines = text.split(f"\n{title}\n", 1)[1].splitlines()
    rule = next(i for i, line in enumerate(lines) if "───" in line)
    body = itertools.takewhile(str.strip, lines[rule + 1:])
    return {cells[0]: cells[1:] for cells in (re.split(r"\s{2,}", line.strip()) for line in body)}


def test_tables_and_speed_ups_follow_from_the_curves(tmp_path, compare):
    slow = write(tmp_path, "slow", [([6, 4, 3, 2], [0, 1000, 2000, 3000]),
                                    ([6, 4.2, 3.2, 1], [0, 1000, 2000, 4000])])
    fast = write(tmp_path, "fast", [([6, 3, 1], [0, 1000, 2000]), ([6, 3.2, 1.2], [0, 1000, 2200])])
    code, out, err = compare(slow, fast, "--target", "2.5")
    assert (code, err) == (0, "") and "warning" not in out
    assert rows(out, "loss by step") == {"100": ["4.1000 ± 0.1414", "3.1000 ± 0.1414"],
                                         "200": ["3.1000 ± 0.1414", "1.1000 ± 0.1414"],
                                         "300": ["1.5000 ± 0.7071", "-"]}
    before, after = [2500, 2000 + 2000 * 0.7 / 2.2], [1250, 1000 + 1200 * 0.7 / 2]
    assert f"speed-up in time to 2.5: {gmean(before) / gmean(after):.3f} (95 %: " in out
    speed_up = gmean([3000, 4000]) / gmean([2000, 2200])
    assert f"speed-up in time of the whole run: {speed_up:.3f} (95 %: " in out
    summary = next(line for line in out.splitlines() if line.strip().startswith("slow")).split()
    assert " ".join(summary) == ("slow 2 300 1.5000 ± 0.7071 3.50 ± 0.71 11.67 ± 2.36 2 of 2 "
                                 f"{np.mean(before) / 1000:.2f} ± {np.std(before, ddof=1) / 1000:.2f} "
                                 f"{np.mean([250, 200 + 70 / 2.2]):.1f} ± "
                                 f"{np.std([250, 200 + 70 / 2.2], ddof=1):.1f}")


def test_committed_logs_give_ratios_and_what_they_rest_on(compare):
    code, out, err = compare(ADAMW, MUON)
    assert (code, err) == (0, "") and "warning" not in out
    assert "speed-up in time of the whole run: 1.861 (95 %: 1.780 to 1.946)" in out
    assert "speed-up in time to 1.6: 1.976" in out and "9 of 9" in out
    assert "source: the same" in out and 'optimizer "adamw" -> "muon"' in out
    assert "seed" not in out.split("settings:")[1]
    out = compare(TRACK)[1]  # a folder of folders is several groups
    assert "\n2026-11-22_Muon against 2026-11-22_AdamW\n" in out
    assert "\n2026-11-24_Reference against 2026-11-22_AdamW\n" in out


def test_figures_are_those_of_the_statistics(tmp_path, compare):
    slow = [([6, 3, loss], [0, 1, 3000 + 10 * k]) for k, loss in enumerate(LOSSES[::-1])]
    old = write(tmp_path, "old", slow)
    new = write(tmp_path, "new", ending_at(LOSSES))
    out = compare(old, new)[1]
    times = [[(base + 10 * k) / 1000 for k in range(5)] for base in (2000, 3000)]
    assert f"shakespeare, new: {t_test(LOSSES, 1.6, 0.01)}\n" in out
    assert f"loss: {welch(LOSSES, LOSSES[::-1]):+.5f}" in out
    assert f"seconds: {welch(*times):+.2f}, below 0 with p = {welch(*times).p:.3g} (Welch's test)" in out
    assert f"whole run: {ratio(welch, *times[::-1]):.3f}" in out


@pytest.mark.parametrize("losses, words", [
    (LOSSES, "mean 1.58038 of 5, sd 0.00"), (LOSSES, "needed < 0.01: passes"),
    ([1.61, 1.595, 1.6], ": fails"), ([1.57], "cannot be judged: expected at least 2 losses, found 1")])
def test_the_loss_rule_is_said(tmp_path, compare, losses, words):
    assert words in compare(write(tmp_path, "a", ending_at(losses)))[1]


def test_a_track_of_steps_is_judged_by_its_own_rule(tmp_path, compare):
    finals = [3.2761, 3.2765, 3.2770, 3.2772]
    new = write(tmp_path, "new", ending_at(finals), every=1500, track="optimization")
    assert f"= {(3.28 - np.mean(finals)) * 2:.5f}, needed >= 0.004" in compare(new)[1]
    assert "= 0.53000, needed >= 0.004" in compare(new, "--step", 1500)[1]  # 2 (3.28 - 3.015)


# Which runs count, and what makes a comparison doubtful

def test_runs_that_cannot_count_are_not_left_out_silently(tmp_path, compare):
    folder = write(tmp_path, "new", ending_at(LOSSES))
    path = folder / "2.txt"
    whole = path.read_text()
    path.write_text(whole.rpartition("step:200/200 val_loss")[0])
    out = compare(folder)[1]
    assert "warning: final-validation of new: 2: ends at step 100 of 200" in out
    assert "cannot be judged: 1 of 5 losses not finite" in out
    assert "mean 3.02000 of 5" in compare(folder, "--step", 100)[1]
    path.write_text(whole.replace("val_loss:1.5900", "val_loss:nan"))
    assert "cannot be judged: 1 of 5 losses not finite" in compare(folder)[1]


def test_oddities_of_a_group_are_named(tmp_path, compare):
    a = write(tmp_path, "a", [([6, 3, 2, 1], None)] * 2 + [([6, 3.1, 2.1, 1.1], [0, 1001, 2001, 3001])])
    (a / "3.txt").write_text(own([6, 3.2, 2.2, 1.2], [0, 1002, 2002, 3002], seed=2,
                                      files={"train_gpt.py": "other\n"}))
    (a / "notes \x1b[2J.txt").write_text("hello\n")
    code, out, err = compare(a, make("T2m").write(tmp_path / "many.txt"))
    for text in ("distinct-curves of a: 3 of 3 losses are the same in 0, 1",
                 "same-source of a: 3: muon.py +0 -1, train_gpt.py +1 -1",
                 "distinct-seeds of a: seed 2 in 2, 3"):
        assert f"warning: {text}\n" in out
    assert re.search(r"warning: .*notes \?\[2J.txt is left out: this is no log of a training run", out)
    assert re.search(r"^ many +3 ", out, re.M)  # the runs of a file are a group
    assert code == 0 and "\x1b" not in out + err


@pytest.mark.parametrize("settings, expected", [
    (dict(device="NVIDIA A40"), "same-hardware: CPU (x86_64, 1 threads), Model T, 2 ranks in 2 runs; 2 x "
                                "NVIDIA A40, 2 ranks in 8, 9"),
    (dict(torch="2.14.0"), "same-torch: torch 2.13.0+cpu, CUDA None in 2 runs; torch 2.14.0, CUDA None in "
                           "8, 9"),
    (dict(val_tokens=1024), "validation-data: expected tokens 262144, found 1024 in 8; tokens 262144, found "
                            "1024 in 9"),
])
def test_a_difference_between_groups_is_one_warning(tmp_path, compare, settings, expected):
    a = write(tmp_path, "a", [([6, 3, 2], None), ([6, 3.1, 2.2], None)])
    b = write(tmp_path, "b", [([6, 3.2, 2.1], None), ([6, 3.3, 2.3], None)], first_seed=8, **settings)
    code, out, err = compare(a, b)
    assert code == 0 and [line for line in out.splitlines() if "warning" in line] == [f"warning: {expected}"]
    assert ("times are not compared" in out) == ("device" in settings) and "loss: +0" in out


def test_groups_are_files_or_the_logs_of_a_folder(tmp_path):
    def found(*paths):
        return [(group.name, len(group.runs)) for group in groups.find_groups([*map(str, paths)])[0]]

    x = write(tmp_path, "x", ending_at([1.6, 1.7]))
    write(tmp_path, "x/y", ending_at([1.8]))
    one = x / "0.txt"
    named = one.rename(x / "5f0c2a51-1111-2222-3333-444444444444.txt")
    write(tmp_path, "x", ending_at([1.75]), first_seed=9)
    assert found(tmp_path, x) == [("x", 3), ("x/y", 1)]
    assert found(named, named, tmp_path) == [("x/5f0c2a51", 1), ("x", 2), ("x/y", 1)]  # each log once
    assert found(named, x / "1.txt") == [("5f0c2a51", 1), ("1", 1)]
    long = write(tmp_path, "long" * 40, ending_at([1.9])) / "0.txt"
    name, _ = found(named, long)[1]
    assert name.startswith("…") and name.endswith("longlong/0") and len(name) == groups.NAME_LIMIT
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="found none"):
        found(tmp_path / "empty")


def test_an_experiment_has_its_baseline_first_and_what_was_printed_is_no_group(tmp_path, compare):
    for name in ("a", "b", "output"):
        write(tmp_path, name, ending_at([1.5, 1.6]))
    (tmp_path / "plan.json").write_text(plan_text(2))
    out = compare(tmp_path)[1]
    assert "a (candidate) against b (baseline)" in out and "output" not in out


# Sources

def test_differences_of_sources_are_counted_by_file(tmp_path, compare):
    curves = [([6, 3, 2], None), ([6, 3.1, 2.2], None)]
    before = {"train_gpt.py": "a = 1\nb = 2\nc = 3\n", "muon.py": "m\n", "old.py": "x\ny\n"}
    after = {"train_gpt.py": "a = 1\nb = 20\nc = 3\nd = 4\n", "muon.py": "m\n", "new.py": "z\ny\n"}
    folders = write(tmp_path, "a", curves, files=before), write(tmp_path, "b", curves, files=after)
    assert "source: new.py +2 -0, old.py +0 -2, train_gpt.py +2 -1\n" in compare(*folders)[1]
    a, b = make("T5", 1).write(tmp_path / "a.txt"), make("E1", 2).write(tmp_path / "b.txt")
    out = compare(a, b)[1]
    assert "source: " not in out and "settings: " not in out


# The plot

def test_the_plot_shows_line_and_band_of_each_group_and_nothing_else(tmp_path, compare):
    """Both groups were drawn, line and band, and nothing else in colour."""
    import matplotlib.image
    code, out, err = compare(ADAMW, MUON, "--plot", tmp_path / "out.png")
    assert (code, err) == (0, "")
    pixels = matplotlib.image.imread(tmp_path / "out.png")[..., :3] * 255
    assert pixels.shape == (750, 1650, 3)
    for k, color in enumerate(charts.COLORS):
        line = np.array([int(color[i:i + 2], 16) for i in (1, 3, 5)])
        of_line, of_band = ((abs(pixels - shade) < 2).all(axis=-1).sum()
                            for shade in (line, 0.2 * line + 0.8 * 255))
        assert (of_line > 500 and of_band > 500) if k < 2 else (of_line < 100 and of_band < 100), color


@pytest.mark.parametrize("curves", [
    [([6], None)], [([3, 3, 3], None)] * 2, [([float("nan"), float("inf"), 3], None)],
    [([float("nan")], None)],
    [([6, 3, 2], [0, 0, 0])], [([6, 3, 2], [5000, 200, 3])], [([1e19, 1e-4, 2], None)],
])
@pytest.mark.filterwarnings("error")
def test_odd_curves_are_compared_and_drawn(tmp_path, compare, curves):
    odd = write(tmp_path, r"_odd $\frac$", curves)
    good = write(tmp_path, "good", [([6, 3, 2], None), ([6, 3.1, 2.1], None)])
    code, out, err = compare(odd, good, make("A").write(tmp_path / "a.log"), "--plot", tmp_path / "out.svg")
    assert (code, err) == (0, "") and (tmp_path / "out.svg").stat().st_size > 5000
    assert compare(good, odd)[0] == 0


@pytest.mark.parametrize("count", [1, 2, 8])
def test_no_label_lies_on_a_line(tmp_path, count):
    """No label lies on another one either."""
    folders = [write(tmp_path, f"{'a long name of a group':_<36}{k}", [([6, 3, 2 + k / 9], None)] * 2)
               for k in range(count)]
    found, _ = groups.find_groups(folders)
    drawing = charts.figure(found, 1.6)
    drawing.draw_without_rendering()
    legend, = drawing.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == [f" {group.name} (n = 2)" for group in found] + ["target 1.6"]
    page, words = drawing.bbox, legend.get_window_extent()
    assert 0 <= words.x0 and 0 <= words.y0 and words.x1 <= page.width
    for ax in drawing.axes:
        assert not ax.texts and not words.overlaps(ax.get_tightbbox())
    boxes = [text.get_window_extent() for text in legend.get_texts()]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_no_two_groups_are_drawn_in_one_colour(tmp_path, compare):
    folders = [write(tmp_path, f"g{k}", [([6, 3 - k / 100, 2], None)]) for k in range(9)]
    code, out, err = compare(*folders[:8], "--plot", tmp_path / "out.pdf")
    assert (code, err) == (0, "") and (tmp_path / "out.pdf").read_bytes().startswith(b"%PDF")
    assert len({*charts.COLORS}) == 8
    code, out, err = compare(*folders, "--plot", tmp_path / "more.pdf")
    assert code == 2 and "expected at most 8 groups" in err and not (tmp_path / "more.pdf").exists()


# Public records

def as_if_ours(path: Path, number: int, more: float) -> Path:
    """A log of train_gpt.py with the curve of a public record, and something added to its losses."""
    points = history.as_log("small", number).runs[0].val_points
    total = points[-1].step
    head = own([1], track="small").partition("\nstep:")[0]
    path.write_text("\n".join([head, *(f"step:{p.step}/{total} val_loss:{p.val_loss + more:.4f} "
                                       f"train_time:{p.train_time_ms:.0f}ms"
                                       for p in points), ""]))
    return path


def test_a_run_is_compared_with_the_curve_of_a_public_record(tmp_path, compare):
    log = as_if_ours(tmp_path / "mine.txt", 80, 0.01)
    code, out, err = compare(log, "--history", 80, "--plot", tmp_path / "out.png")
    assert (code, err) == (0, "") and (tmp_path / "out.png").exists()
    runs = history.as_log("small", 80).runs
    finals = [run.final_val_loss for run in runs]
    gap = finals[0] + 0.01 - np.mean(finals)
    assert f"beside its curve, at 5 validations: {gap:+.4f} at step 1,480" in out
    assert rows(out, "loss by step")["1,480"] == [f"{np.mean(finals):.4f} ± {np.std(finals, ddof=1):.4f}",
                                                  f"{finals[0] + 0.01:.4f}"]
    assert "times are not compared" in out and "loss rule of track small, public" not in out


@pytest.mark.parametrize("arguments, sentence", [
    (["--history", "500"],
     "--history: expected the number of a public record of track small whose curve is kept, found 500; ch"),
    (["--history", "80", "--track", "shakespeare"], "curve is kept, found 80; the track has none: leave"),
])
def test_public_records_without_a_curve_are_refused(tmp_path, compare, arguments, sentence):
    code, out, err = compare(as_if_ours(tmp_path / "mine.txt", 80, 0.0), *arguments)
    assert (code, out) == (2, "") and sentence in err


@pytest.mark.parametrize("arguments, sentence", [
    (["data"], "data: expected logs with validations, found none; check the path"),
    ([MUON, "--plot", "out.txt"],
     "--plot: expected a name that ends in .png, .svg, .pdf, found 'out.txt'; change it"),
    ([MUON, "--plot", "/nowhere/out.png"],
     "--plot: expected to write /nowhere/out.png, found: No such file or directory; ch"),
    ([MUON, "--target", "0"], "expected a number above 0"),
])
def test_bad_paths_and_plots_are_refused_in_one_sentence(compare, arguments, sentence):
    code, out, err = compare(*arguments)
    assert (code, out) == (2, "") and err.startswith("records: ") and sentence in err and err.count("\n") == 1
    assert not Path("out.txt").exists()
