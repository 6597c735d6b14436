"""bench.docs and bench.pictures: figures and pictures are those of the committed logs; every technique has a
block."""
import ast
import csv
import dataclasses
import html
import json
import re
from itertools import combinations

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from bench import docs, pictures
from data.errors import UsageError
from data.files import ROOT
from train_gpt import Config

PAGE = (ROOT / docs.TECHNIQUES).read_text(encoding="utf-8")
BLOCKS = re.split(r"^### ", PAGE, flags=re.M)[1:]
SIZES = {"train_steps", "slices", "num_layers", "model_dim", "head_dim", "mlp_ratio"}  # no techniques


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def entries(block: str, label: str) -> str:
    found = re.search(rf"^- {label}.*?(?=^- |^$|\Z)", block, re.M | re.S)
    assert found, f"{block.splitlines()[0]}: no line '- {label}'"
    return found[0]


def test_what_the_command_writes_is_what_is_there():
    for path, text in docs.wanted().items():
        found = path.read_text(encoding="utf-8")
        if path.name.startswith("loss_") and f"matplotlib {matplotlib.__version__}<" not in found:
            continue  # another version writes it in other words; its data are compared below
        assert found == text, f"{path}: run python -m bench.docs"


def test_every_technique_of_the_trainer_has_one_block():
    named = [name for block in BLOCKS for name in re.findall(r"`(\w+)` ", entries(block, "Settings:"))
             if name not in docs.PRESETS]
    assert len(named) == len(set(named))
    fields = [f.name for f in dataclasses.fields(Config)]
    of_training = fields[fields.index("train_steps"):fields.index("attention")]  # schedule, model, optimizer
    assert set(named) == {*of_training, "fp8_head"} - SIZES, "docs/techniques.md must have a block for each"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_a_block_tells_formula_place_settings_and_worth(block):
    assert re.search(r"^ {4}\S", block, re.M)
    for label in ("Code:", "Settings:", "Worth here", "Worth in public:"):
        entries(block, label)


def test_the_code_it_names_is_there():
    files = [ROOT / "train_gpt.py", ROOT / "muon.py",
             *(ROOT / "engine").glob("*.py"), *(ROOT / "data").glob("*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files if path.exists()]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    defined |= {f"{node.name}.{inner.name}" for node in nodes if isinstance(node, ast.ClassDef)
                for inner in node.body if isinstance(inner, ast.FunctionDef)}
    named = {name for block in BLOCKS for name in re.findall(r"`([\w.]+)`", entries(block, "Code:"))}
    assert len(named) > 20 and named <= defined, named - defined


def test_public_times_are_those_of_the_history():
    with open(ROOT / "records/history/records.csv", newline="", encoding="utf-8") as file:
        minutes = {int(row["number"]): float(row["minutes_or_steps"]) for row in csv.DictReader(file)
                   if row["track"] == "small" and row["kind"] == "record"}
    found = re.findall(r"record (\d+)\s+\(([\d.]+) → ([\d.]+) min\)", PAGE)
    assert len(found) > 25 and len(found) == PAGE.count(" min)")
    for number, before, after in found:
        assert (minutes[int(number) - 1], minutes[int(number)]) == (float(before), float(after)), number


def test_settings_and_measurements_are_written_anew_and_names_are_checked():
    line = docs.settings_line("- Settings: `smear` off; `skip`")
    assert line == ("- Settings: `smear` on (`shakespeare` off); "
                    "`skip` 3,6 (`medium` 4,10, `shakespeare` none, `miniature` 0,2)")
    with pytest.raises(UsageError, match="expected settings of Config, found 'smaer'"):
        docs.settings_line("- Settings: `smaer`")
    row = docs.ROW.match("| skip | 1 | 1.6736 | -0.0064 ± 0.0252 | 0.984 | -0.0093 |")
    line = docs.worth_line('- Worth here, without it: "skip" +9', {"skip": row})
    assert line == '- Worth here, without it: "skip" -0.0064 ± 0.0252 (n = 1), -0.0093 at equal time'
    with pytest.raises(UsageError, match="expected a row of bench/ABLATION.md, found 'skpi'"):
        docs.worth_line('- Worth here, without it: "skpi"', {"skip": row})


def test_check_says_what_is_out_of_date_and_writes_nothing(capsys, monkeypatch):
    monkeypatch.setattr(docs, "facts", lambda: {"the time": "0.1234567 s"})
    monkeypatch.setattr(docs, "wanted", lambda: {docs.RESULTS: "something else"})
    before = docs.RESULTS.read_bytes()
    assert docs.main(["--check"]) == 1
    assert docs.RESULTS.read_bytes() == before
    out = capsys.readouterr().out
    assert "docs/results.md: out of date" in out and "expected one to say, of the time: '0.1234567 s'" in out


# ------------------------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize("theme", pictures.THEMES, ids=lambda theme: theme.name)
def test_the_loss_picture_shows_the_committed_logs(theme):
    target = Config.for_track("shakespeare").target_loss
    text = (docs.PICTURES / f"loss_{theme.name}.svg").read_text(encoding="utf-8")
    description = re.search(r"<dc:description>(.*?)</dc:description>", text, re.S)[1]
    drawn = pictures.drawn_data(pictures.figure_of_loss(theme, target))
    assert json.loads(html.unescape(description)) == json.loads(json.dumps(drawn))
    for group in ("muon", "adamw", "nanogpt"):
        ends = [run[-1] for run in pictures.runs_of(pictures.RUNS / group)]
        seconds, loss = (sum(end[k] for end in ends) / len(ends) for k in (1, 2))
        assert drawn[group][-1] == (round(seconds, 3), round(loss, 4))
        assert f"{loss:.2f} after {seconds:.1f} s" in text  # kept as text


def overlaps(one, other) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def test_no_words_of_the_loss_picture_overlap():
    figure = pictures.figure_of_loss(pictures.LIGHT, 1.6)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes = figure.axes[0]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    ticks = [word for word in axes.get_xticklabels() if left <= word.get_position()[0] <= right]
    ticks += [word for word in axes.get_yticklabels() if bottom <= word.get_position()[1] <= top]
    words = [*axes.texts, *ticks, axes.xaxis.label]
    boxes = [word.get_window_extent(canvas.get_renderer()).extents for word in words]
    width, height = canvas.get_width_height()
    assert len(boxes) > 10
    assert all(box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height for box in boxes)
    assert not any(overlaps(a, b) for a, b in combinations(boxes, 2))
    points = axes.transData.transform([point for line in axes.lines for point in zip(*line.get_data())
                                       if line.get_label() != "target"])
    labels = [word.get_window_extent(canvas.get_renderer()) for word in axes.texts]
    assert not any(box.contains(x, y) for box in labels for x, y in points)


def test_a_log_of_something_else_is_refused(tmp_path):
    path = tmp_path / "nanogpt_0.txt"
    path.write_text("iter 0: loss 5.6\n")
    with pytest.raises(UsageError, match="expected lines like 'step 250"):
        pictures.nanogpt_run(path)
