"""report: its figures against the statistics, its text against what went in, and the page itself in a real
browser.

The browser tests want Chromium with its driver (Debian: chromium, chromium-driver) and the package selenium;
they are skipped without. RECORD_SCREENSHOTS=FOLDER also writes what the page looks like: light, dark, on a
phone, printed."""
import base64
import datetime
import hashlib
import html.parser
import json
import os
import random
import re
import shutil
import time
from pathlib import Path

import pytest
from tests.helpers.committed import ADAMW, MUON, YARDSTICK
from tests.helpers.synthetic import own

from records import __main__ as cli
from records import charts, compare, difference, groups, history, logs, palette, report, table
from records.errors import RecordError
from records.tracks import TRACKS

RESULTS = (ADAMW, MUON, YARDSTICK)
HOSTILE = ("</script><script>window.hacked = 1</script><img src=x onerror='window.hacked=2'>"
           "<a href=\"javascript:window.hacked=3\">a</a>\u202egnitrever\u200f &lt;b&gt; {{ 7 * 7 }} $x^2$ ")


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def make(output: Path, *paths) -> str:
    assert cli.guarded(["report", *map(str, paths), "-o", str(output)]) == 0
    return output.read_text(encoding="utf-8")


class Page(html.parser.HTMLParser):
    """Elements with their attributes and texts; tables as lists of rows of cells."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements, self.tables, self.texts, self.inside = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "br":
            self.handle_data("\n")
        if tag in ("td", "th", "pre", "title", "script", "style"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and tag == self.inside[-1]:
            self.inside.pop()

    def handle_data(self, data):
        if self.inside and self.inside[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if not {"script", "style"} & {*self.inside}:
            self.texts.append(data)

    def all(self, tag) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def example(place):
    """The page of the committed logs."""
    return place / "example.html", make(place / "example.html", *RESULTS)


def source(marker: str, lines: int = 40) -> str:
    return "".join(f"line {i} of the program\n" for i in range(lines)) + marker + "\n"


@pytest.fixture(scope="module")
def hostile(place):
    """A page of logs that try everything: names of files and folders, settings, versions, sources, losses."""
    folder = place / "hostile"
    for seed, loss in enumerate((1.58, 1.57, 1.59)):
        files = {"train_gpt.py": source(HOSTILE), "muon.py": source("x" * 1_000_000)}
        write(folder / "a <b>bold<script>window.hacked=4</script>",
              f"<img src=x onerror=window.hacked=5>\u202e{seed}.txt",
              own(losses=[5, 3, 2, loss + seed / 1e4], seed=seed, torch="2.13<script>",
                  device=HOSTILE.strip().replace("\n", " "),
                  files=files, optimizer=HOSTILE, **{HOSTILE: 1}))
        write(folder / "b", f"{seed}{HOSTILE.replace('/', '∕')[:80]}.txt",
              own(losses=[5, 3.1, 2.1, loss], seed=seed,
                  files={"train_gpt.py": source("\0\x1b[31m" + HOSTILE[::-1])}))
    write(folder / "c", "strange.txt", own(losses=[1e-300, 1e300, -1, 0, 2], times=[0, -5, 1e18, 3, 1e19]))
    write(folder / "c", "nan.txt", own(losses=[float("nan"), float("inf")]))
    (folder / "c" / os.fsdecode(b"no unicode \xff.txt")).write_text(own(losses=[5, 2, 1.7]))
    write(folder / "c", f"no log {HOSTILE[:40].replace('/', '')}.txt", HOSTILE)
    return place / "hostile.html", make(place / "hostile.html", folder)


def test_a_page_is_whole_and_loads_nothing(example):
    page = Page(example[1])
    assert example[1].startswith("<!doctype html>") and page.all("html") == [{"lang": "en"}]
    addresses = [value for _, attributes in page.elements for key, value in attributes.items()
                 if key in ("src", "href")]
    assert all(value.startswith(("#", history.SOURCE)) for value in addresses)
    assert not {"link", "iframe", "object", "embed", "img", "base", "form"} & {tag for tag,
                                                                               _ in page.elements}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len({*ids}) and {value[1:] for value in addresses if value.startswith("#")} <= {*ids}
    assert {attributes.get("aria-labelledby") for _, attributes in page.elements} - {None} <= {*ids}
    assert 4.8e6 < len(example[1]) < 5.3e6


def test_only_the_two_scripts_of_the_page_may_run(example):
    policy = next(attributes["content"] for attributes in Page(example[1]).all("meta")
                  if "http-equiv" in attributes)
    scripts = re.findall(r"<script>(.*?)</script>", example[1], re.S)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(scripts) == 2 and "default-src 'none'" in policy
    assert re.search(r"script-src ([^;]*);", policy)[1].split() == [f"'sha256-{digest}'" for digest in hashes]


def test_the_same_logs_give_the_same_bytes(example, place):
    assert make(place / "again.html", *RESULTS) == example[1]


def test_groups_have_the_figures_of_compare(example):
    header, *rows = Page(example[1]).tables[0]
    assert [*map(str.strip, header)] == [
        "Group", "Runs", "Steps", "Final loss", "Loss rule", "Training seconds", "Speed-up", "Source"]
    track = TRACKS["shakespeare"]
    found, _ = groups.find_groups([*RESULTS])
    counted = [groups.count(group, track) for group in found]
    for row, name, group, its in zip(rows, ("AdamW", "Muon", "yardstick"), found, counted, strict=True):
        facts, against = compare.figures(its), compare.tests_against(found[0], counted[0], group, its, track)
        assert row[0].strip().endswith(name) and row[1] == str(len(group.runs))
        loss = facts["loss"]
        assert row[3] == (f"{loss['mean'].estimate:.4f} ± {loss['sd']:.4f}\n{loss['mean'].low:.4f} to "
                          f"{loss['mean'].high:.4f}")
        assert row[4].startswith("fails" if name == "yardstick" else "passes\np = 0.0")
        assert row[5].startswith(f"{facts['seconds']['mean'].estimate:.2f} ± ")
        assert row[6].startswith("baseline" if name == "AdamW" else f"{against['speed_up'].estimate:.3f}\n")
    assert rows[1][6] == "1.859\n1.773 to 1.949"


def test_runs_have_the_figures_of_their_logs(example):
    header, *rows = Page(example[1]).tables[1]
    assert len(rows) == 17
    assert [cell.strip() for cell in header][:5] == ["Group", "Run", "Seed", "Final loss", "Training seconds"]
    by_name = {row[1].strip(): row for row in rows}
    for path in logs.find(RESULTS):
        run, = logs.read(path).runs
        row = by_name[run.run_id[:8]]
        assert row[2:5] == [str(run.seed), f"{run.final_val_loss:.4f}", f"{run.final_time_ms / 1000:,.2f}"]
        assert row[7] == ("" if run.time_to(1.6) is None else f"{run.time_to(1.6) / 1000:,.1f}")
    assert "torch 2.13.0+cpu" in Page(example[1]).text
    assert "torch" not in "".join(header)  # what all share stands below


def test_settings_that_differ_are_shown(example):
    table = next(table for table in Page(example[1]).tables if table[0][0] == "Setting")
    assert ["optimizer", '"adamw"', '"muon"', '"muon"'] in table
    assert not any(row[0] in ("seed", "data_seed") for row in table)


def test_history_alone(place):
    page = Page(make(place / "history.html"))
    assert len(page.tables[-1]) == 156 and "155 public records" in page.text
    local = table.local_records(TRACKS["shakespeare"])
    assert local
    assert [row[0] for row in page.tables[-2][1:]] == [
        record.description + (f"\nno record: {record.why_no_record}" if record.why_no_record else "")
        for record in local]
    assert [a["id"] for a in page.all("div") if a.get("class") == "chart"] == [
        "history-small", "history-small-steps", "history-optimization", "history-medium",
        "history-medium-steps"]
    small = {row[1]: row for row in page.tables[-1] if row[0] == "small"}
    assert small["2"][2:6] == ["31.4", "9,536", "30.2", "2024-06-06"] and small["3"][3] == ""
    assert small["89"][2:4] == ["1.23", "1,390"]
    assert small["64"][3] == "1,555"  # of its linked run; another one ended early


def test_the_example_runs(place):
    argv = report.EXAMPLE.split()[3:]
    argv[-1] = str(place / "new folder" / "example.html")
    assert cli.guarded(argv) == 0 and Path(argv[-1]).exists()


def test_hostile_text_is_text(hostile):
    page = Page(hostile[1])
    assert len(page.all("script")) == 3 and not page.all("img") and not page.all("b")
    assert all(a["href"].startswith(("#", history.SOURCE)) for a in page.all("a"))
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert "window.hacked = 1" in page.text and "{{ 7 * 7 }}" in page.text  # shown as it is
    assert not re.search("[\0-\x08\x0b-\x1f\x7f\u200e\u200f\u202a-\u202e\u2066-\u2069]", page.text)
    assert "x" * 201 not in page.text
    data = re.search(r'<script type="application/json" id="figures">(.*?)</script>', hostile[1], re.S)[1]
    assert not re.search("[<>&]", data)
    for figure in json.loads(data).values():  # plotly reads a little HTML: there is none but ours
        for text in texts(figure):
            assert not re.search(r"<(?!/?b>|br>|span style=\"color:#\w{6}\">|/span>)", text), text
    assert len(hostile[1]) < 6e6


def texts(value):
    """All strings in a figure."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, str):
        yield value


def test_files_without_a_run_are_named(hostile):
    text = Page(hostile[1]).text
    assert "Files without a run" in text and "no log" in text and "this is no log of a training run" in text


def test_groups_are_files_or_the_logs_of_a_folder(place):
    folder = place / "groups"
    one = write(folder / "x", "5f0c2a51-1111-2222-3333-444444444444.txt", own(losses=[5, 1.6], seed=1))
    write(folder / "x", "two.txt", own(losses=[5, 1.7], seed=2))
    write(folder / "x" / "y", "three.txt", own(losses=[5, 1.8], seed=3))
    write(folder / "x", "z.txt", own(losses=[5, 1.75], seed=4))  # sorts behind y/
    found, _ = groups.find_groups([str(folder), str(folder / "x")])
    assert [(group.name, len(group.runs)) for group in found] == [("x", 3), ("x/y", 1)]
    found, _ = groups.find_groups([str(one), str(one), str(folder)])
    assert [(group.name, len(group.runs)) for group in found] == [("x/5f0c2a51", 1), ("x", 3), ("x/y", 1)]
    long = write(folder / ("long" * 40), "end.txt", own(losses=[5, 1.9]))
    name = groups.find_groups([str(one), str(long)])[0][1].name
    assert name.startswith("…") and name.endswith("longlong/end") and len(name) == groups.NAME_LIMIT
    found, _ = groups.find_groups([str(one), str(folder / "x" / "two.txt")])
    assert [(group.name, len(group.runs)) for group in found] == [("5f0c2a51", 1), ("two", 1)]


def test_copies_of_a_run_count_once(place):
    for name in ("one.txt", "copy.txt"):
        write(place / "copies", name, own(losses=[5, 1.6], seed=1))
    write(place / "copies", "two.txt", own(losses=[5, 1.7], seed=2))
    page = Page(make(place / "copies.html", place / "copies"))
    assert page.tables[0][1][1] == "2" and len(page.tables[1]) == 3 and "Counted once" in page.text


def test_sources_are_compared_with_the_first_group(place):
    folder = place / "sources"
    for name, lines in (("a", "one\ntwo\nthree\n"), ("b", "one\n2 < 3\nthree\nfour\n"),
                        ("c", "one\ntwo\nthree\n")):
        write(folder / name, "1.txt", own(losses=[5, 1.6],
                                          files={"train_gpt.py": lines, "muon.py": "same\n"}))
    text = make(place / "sources.html", folder)
    page = Page(text)
    assert [row[-1].strip() for row in page.tables[0][1:]] == ["baseline", "+2 −1 lines", "the same"]
    assert '<span class="removed">-two</span>' in text and '<span class="added">+2 &lt; 3</span>' in text
    assert "train_gpt.py: +2 −1 lines." in page.text and "muon.py" not in page.text


def test_differences_are_those_of_difflib():
    import difflib
    before, after = (Path(name).read_text() for name in ("records/table.py", "records/report.py"))
    expected = list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm=""))[2:]
    found = difference.difference("a", before, after)
    assert [line for kind, line in found.lines if kind != "place"] == [line for line in expected
                                                                       if not line.startswith("@@")]
    assert found.added == sum(line.startswith("+") for line in expected) and found.removed == sum(
        line.startswith("-") for line in expected)
    assert difference.differences({"a": "x\n", "b": "y\n"}, {"a": "x\n", "c": "z\n"}) == [
        difference.Difference("b", 0, 1, [("place", "@@ -1,1 +1,0 @@"), ("removed", "-y")]),
        difference.Difference("c", 1, 0, [("place", "@@ -1,0 +1,1 @@"), ("added", "+z")])]


def test_a_difference_takes_bounded_time():
    # alternating lines make difflib begin anew at every second line, repeated ones make each begin expensive
    n = 20_000
    a = "".join(f"{i % 199}\n" if i % 2 else f"a{i}\n" for i in range(n))
    b = "".join(f"{i % 199}\n" if i % 2 else f"b{i}\n" for i in range(n))
    start = time.monotonic()
    found = difference.difference("x", a, b)
    assert time.monotonic() - start < 5
    assert not found.lines
    assert (found.added, found.removed) == (n // 2, n // 2)


def test_a_curve_is_the_mean_with_its_spread():
    runs = [logs.read(path).runs[0] for path in logs.find([MUON])]
    last = charts.curve(runs)[-1]
    losses = [run.final_val_loss for run in runs]
    seconds = [run.final_time_ms / 1000 for run in runs]
    assert (last.step, last.n, last.low, last.high) == (480, 9, min(losses), max(losses))
    assert last.loss == pytest.approx(sum(losses) / 9) and last.seconds == pytest.approx(sum(seconds) / 9)


def test_a_curve_leaves_out_what_cannot_be_drawn(place):
    paths = [write(place / "curve", f"{k}.txt", own(losses=losses)) for k, losses in enumerate(
        ([5, float("nan"), 2, 1], [5, 3, 2], [5, 4]))]
    runs = [logs.read(path).runs[0] for path in paths]
    assert [(point.step, point.n, point.loss) for point in charts.curve(runs)] == [(0, 3, 5), (100, 2, 3.5),
                                                                                   (200, 2, 2)]
    assert [point.step for point in charts.curve(runs[:2])] == [0, 100, 200,
                                                                300]  # half of the runs are enough
    write(place / "curve", "0.txt", own(losses=[5 - k / 1000 for k in range(2000)]))
    long = charts.curve([logs.read(paths[0]).runs[0]])
    assert len(long) == charts.MAX_POINTS and (long[0].step, long[-1].step) == (0, 199900)


@pytest.mark.parametrize("low, high", [(1.5, 2.1), (3.2, 4.6), (1, 45), (0.6, 48), (2690, 8800), (1e-3, 1e3),
                                       (3.2799, 3.2801)])
def test_ticks_are_few_and_round(low, high):
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 9 and all(low <= tick <= high for tick in found)
    assert all(len(f"{tick:.12g}".replace(".", "").strip("0")) <= 6 for tick in found)


def test_labels_rise_until_they_are_clear():
    assert charts.lifts([(0, 10, 0), (20, 30, 0), (5, 15, 3), (0, 40, 40)]) == [0, 0, charts.LINE - 3, 0]
    lot = random.Random(0)
    for _ in range(100):  # of many fractions, some do not give 17 when 17 is added and they are taken away
        boxes = [(x := lot.uniform(0, 300), x + 100, lot.uniform(0, 400)) for _ in range(12)]
        raised = [(left, right, bottom + lift) for (left, right, bottom),
                  lift in zip(boxes, charts.lifts(boxes))]
        assert all(b[0] >= a[1] or a[0] >= b[1] or abs(a[2] - b[2]) > charts.LINE - 1
                   for i, a in enumerate(raised) for b in raised[:i])


def test_no_two_groups_share_a_colour_and_names_stand_in_the_legend(place):
    """Labels in the plot were crossed by lines; in the legend each name has the colour of its line."""
    for k in range(palette.MAX_GROUPS + 1):
        write(place / "many" / f"g{k} <b>", "1.txt", own(losses=[5, 2 + k / 100, 1.6], seed=k))
        write(place / "many" / f"g{k} <b>", "2.txt", own(losses=[5, 2 + k / 99, 1.7], seed=100 + k))
    found, _ = groups.find_groups([str(place / "many")])
    drawn, _ = report.run_charts(found, 1.6)
    for name in ("seconds", "steps", "ends"):
        named = [trace for trace in drawn[name].data if trace.showlegend is not False]
        colors = [trace.line.color or trace.marker.color for trace in named]
        assert len({*colors}) == len(colors) == palette.MAX_GROUPS and drawn[name].layout.showlegend
        assert [trace.name for trace in named] == [f"g{k} &lt;b&gt;" for k in range(palette.MAX_GROUPS)]
        assert [note.text for note in drawn[name].layout.annotations][1:] == ["target 1.6"]
    page = make(place / "many.html", place / "many")
    assert f"Charts and differences show the first {palette.MAX_GROUPS} groups" in Page(page).text


def test_an_experiment_has_its_baseline_first_and_what_was_printed_is_no_group(place):
    """As the plan in its folder says; the arms are called by their roles."""
    for name, loss in (("a", 1.5), ("b", 1.6), ("output", 1.7)):
        for seed in (1, 2):
            write(place / "experiment" / name, f"00{seed}_x.txt",
                  own(losses=[5, 2, loss + seed / 100], seed=seed))
    write(place / "experiment", "plan.json", json.dumps(
        {"a": "x", "b": "y", "pairs": [{"seed": 1, "order": "ab"}, {"seed": 2, "order": "ba"}]}))
    page = Page(make(place / "experiment.html", place / "experiment"))
    assert [row[0].strip("━ ") for row in page.tables[0][1:]] == ["b (baseline)", "a (candidate)"]
    assert "the baseline is b (baseline)" in page.text
    found, _ = groups.find_groups([str(place / "experiment")])
    assert [group.name for group in found] == ["b (baseline)", "a (candidate)"]


def test_cells_say_their_column_where_a_row_is_a_card(example):
    """On a phone the header of a table is not shown: each cell tells the title of its column, and
    empty ones are left out."""
    page = Page(example[1])
    cells = [attributes for tag, attributes in page.elements if tag == "td" or tag == "th"
             and attributes.get("scope") == "row"]
    assert cells and all(attributes["data-title"] for attributes in cells)
    assert any("empty" in attributes["class"].split() for attributes in cells)
    style = (report.TEMPLATES / "report.css").read_text()
    assert "content: attr(data-title)" in style and "tbody .empty { display: none; }" in style


def test_group_colours_are_seen_on_light_and_dark():
    style = (report.TEMPLATES / "report.css").read_text()
    for paper in re.findall(r"--paper: (#\w{6})", style):
        assert all(contrast(color, paper) >= 3 for color in palette.COLORS)


def contrast(a: str, b: str) -> float:
    """Of two colours, as WCAG 2 defines it."""
    def luminance(color):
        parts = [int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        return sum(weight * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
                   for weight, c in zip((0.2126, 0.7152, 0.0722), parts))
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_stairs_go_through_the_best_so_far():
    day = datetime.date(2026, 1, 1)
    events = [charts.Event(day + datetime.timedelta(k), value, k, "", 0) for k,
              value in enumerate((5, 6, 4, 4, 3))]
    assert [*charts.history(events, "steps", best_only=True).data[0].y] == [5, 4, 3, 3]
    assert [*charts.history(events, "steps").data[0].y] == [5, 6, 4, 4, 3, 3]


def test_the_largest_gain_of_a_quarter_is_named():
    """Of 1 % or more, so that the quarter of record 22 (0.8 %) names none."""
    figures = report.public_charts({name: table.history_rows(TRACKS[name])
                                    for name in ("small", "medium", "optimization")})
    named = {note.text: note.hovertext for note in figures["history-small"].layout.annotations
             if note.hovertext}
    assert {*named} == {"2", "5", "19", "29", "40", "62", "85", "89"}
    assert named["62"] == "Hashed bigram embedding table"


def test_text_is_cut():
    assert report.shown("x" * 60) == "x" * 60 and report.shown("x" * 61) == "x" * 59 + "…"
    assert report.shown("a\n\u202eb") == "a??b"


def test_without_a_track_there_is_no_rule(place):
    write(place / "tracks" / "a", "1.txt", own(losses=[5, 1.6]))
    write(place / "tracks" / "b", "1.txt", own(losses=[5, 3.2], track="small"))
    page = Page(make(place / "tracks.html", place / "tracks"))
    assert "No target and no loss rule" in page.text
    assert not any("Loss rule" in cell for cell in page.tables[0][0])


@pytest.mark.parametrize("argv, message", [
    (["README.md", "-o", "x.html"], "found none"), (["nothing"], "found nothing there"),
    (["-o", "a.txt"], ".html"),
    (["--track", "large", "-o", "x.html"], "--track"), (["-o", "README.md/x.html"], "-o"),
])
def test_errors_say_what_to_do(argv, message, capsys):
    assert cli.guarded(["report", *argv]) == 2
    assert message in capsys.readouterr().err


def test_paths_without_logs_are_refused(place):
    (place / "empty").mkdir()
    with pytest.raises(RecordError, match="found none"):
        groups.find_groups([str(place / "empty")])


# The page in a browser.

def find_browser():
    return shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="the package selenium is not installed")
    chromium, driver = find_browser()
    if not chromium or not driver:
        pytest.skip("no Chromium with its driver here")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                     "--disable-sync",
                     "--disable-background-networking", "--disable-component-update",
                     f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


def show(browser, path: Path, width: int = 1280, phone: bool = False, dark: bool = False):
    """Open a page and wait for its charts. It must not complain and must ask for nothing but itself."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": phone})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": [
        {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(path.as_uri())
    assert browser.execute_script("return document.readyState") == "complete"
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {message["params"]["request"]["url"] for message in messages
             if message["method"] == "Network.requestWillBeSent"}
    assert asked <= {path.as_uri(), path.as_uri() + "#"}, asked
    if folder := os.environ.get("RECORD_SCREENSHOTS"):
        height = browser.execute_script("return document.documentElement.scrollHeight")
        picture = browser.execute_cdp_cmd("Page.captureScreenshot", {
            "captureBeyondViewport": True, "clip": dict(x=0, y=0, width=width, height=min(height, 8000),
                                                        scale=1)})
        name = f"{path.stem}_{'dark' if dark else 'light'}_{width}.png"
        Path(folder, name).write_bytes(base64.b64decode(picture["data"]))


def counts(browser) -> dict[str, list[int]]:
    """Of each chart the traces and the dots that are drawn."""
    return browser.execute_script("""
        return Object.fromEntries([...document.querySelectorAll(".chart")].map(chart => [chart.id,
            [".scatterlayer .trace", ".scatterlayer .point"].map(
                what => chart.querySelectorAll(what).length)]))""")


def test_charts_are_drawn(browser, example):
    show(browser, example[0])
    found = counts(browser)
    assert found["seconds"][0] == found["steps"][0] == 6  # three bands and three lines
    assert found["ends"] == [3, 17]
    assert found["history-small"] == [2, 91] and found["history-optimization"] == [2, 46]
    assert found["history-medium"] == [2, 17]  # number 11 has no date
    lines, labels = ([element.get_attribute(key)
                      for element in browser.find_elements("css selector", f"#seconds {what}")]
                     for what, key in ((".js-line", "d"), (".annotation-text", "data-unformatted")))
    assert len(lines) >= 3 and all(line.count("L") >= 1 for line in lines)
    assert "target 1.6" in labels
    legend = [element.text for element in browser.find_elements("css selector", "#seconds .legendtext")]
    assert [name.rpartition("/")[2] for name in legend] == ["2026-11-22_AdamW", "2026-11-22_Muon",
                                                            "yardstick"]


def column(browser, name: str) -> list[str]:
    return browser.execute_script("""
        const headers = [...document.querySelectorAll("#runs thead th")];
        const header = headers.find(th => th.textContent.trim() === arguments[0]);
        const rows = [...header.closest("table").tBodies[0].rows];
        return rows.map(row => row.cells[header.cellIndex].textContent.trim());""", name)


def sorts(browser) -> dict[str, str]:
    return browser.execute_script("""
        const headers = [...document.querySelectorAll("#runs thead th[aria-sort]")];
        return Object.fromEntries(headers.map(
        header => [header.textContent.trim(), header.getAttribute("aria-sort")]))""")


def test_tables_sort_by_mouse_and_by_keyboard(browser, example):
    from selenium.webdriver.common.keys import Keys
    show(browser, example[0])
    button = {b.text.strip(): b for b in browser.find_elements("css selector", "#runs thead button")}
    before = [*map(float, column(browser, "Final loss"))]
    assert before != sorted(before) and sorts(browser) == {}
    button["Final loss"].click()
    assert [*map(float, column(browser, "Final loss"))] == sorted(before)
    assert sorts(browser) == {"Final loss": "ascending"}
    button["Final loss"].click()
    assert [*map(float, column(browser, "Final loss"))] == sorted(before, reverse=True)
    assert sorts(browser) == {"Final loss": "descending"}
    button["Steps"].send_keys(Keys.ENTER)
    assert column(browser, "Steps") == ["130"] * 3 + ["480"] * 9 + ["960"] * 5
    assert sorts(browser) == {"Steps": "ascending"}
    button["Steps"].send_keys(Keys.SPACE)
    assert column(browser, "Steps") == ["960"] * 5 + ["480"] * 9 + ["130"] * 3
    for direction in (1, -1):  # empty cells are last in both directions
        button["Seconds to 1.6"].click()
        found = column(browser, "Seconds to 1.6")
        numbers = [*map(float, found[:14])]
        assert found[14:] == [""] * 3 and numbers == sorted(numbers)[::direction]
    button["Run"].click()
    assert column(browser, "Run") == sorted(column(browser, "Run"), key=lambda text: [
        (not part.isdigit(), part.isdigit() and int(part), part) for part in re.findall(r"\d+|\D+", text)])


def test_losses_that_are_not_finite_sort_last(browser, hostile):
    show(browser, hostile[0])
    button = next(b for b in browser.find_elements("css selector", "#runs thead button")
                  if b.text.strip() == "Final loss")
    for direction in (1, -1):
        button.click()
        *losses, last = map(float, column(browser, "Final loss"))
        assert last == float("inf") and losses == sorted(losses)[::direction]


def test_the_keyboard_reaches_every_button(browser, example):
    from selenium.webdriver.common.keys import Keys
    show(browser, example[0])
    wanted = [button.text.strip() for button in browser.find_elements("css selector", "#runs thead button")]
    reached = []
    while wanted[-1] not in reached and len(reached) < 40:
        browser.switch_to.active_element.send_keys(Keys.TAB)
        text, outline = browser.execute_script(
            "const at = document.activeElement; return [at.textContent.trim(), "
            "getComputedStyle(at).outlineStyle]")
        assert outline != "none"
        reached.append(text)
    assert reached[-len(wanted):] == wanted


def test_a_link_leads_to_the_difference(browser, hostile):
    show(browser, hostile[0])
    browser.find_element("css selector", "#groups td a").click()
    target = "return document.querySelector(':target')"
    assert browser.execute_script(f"{target}.textContent").startswith("Source of b")
    assert -1 < browser.execute_script(f"{target}.getBoundingClientRect().top") < 900


@pytest.mark.parametrize("page, width, phone, dark", [
    ("hostile", 1280, False, True), ("hostile", 390, True, False), ("example", 390, True, False),
    ("example", 320, True, True)])
def test_nothing_hostile_runs_or_sticks_out(browser, request, page, width, phone, dark):
    show(browser, request.getfixturevalue(page)[0], width, phone, dark)
    assert browser.execute_script("return window.hacked") is None
    foreign = 'img, svg a, main a:not([href^="#"]):not([href^="https://github.com/"])'
    assert browser.execute_script("return document.querySelectorAll(arguments[0]).length", foreign) == 0
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    edges = browser.execute_script("""
        return [...document.querySelectorAll(".chart svg.main-svg")].map(svg => {
        const box = svg.getBoundingClientRect(); return [box.left, box.right]; })""")
    assert edges and all(0 <= left and right <= width for left, right in edges)


def test_text_is_read_on_light_and_dark(browser, example):
    for dark in (False, True):
        show(browser, example[0], dark=dark)
        colors = browser.execute_script("""return [getComputedStyle(document.body).backgroundColor,
            ...[...document.querySelectorAll("h1, .quiet, td, th, a, figcaption, footer")].map(
                x => getComputedStyle(x).color),
            ...[...document.querySelectorAll(".chart text")].map(x => getComputedStyle(x).fill)]""")
        paper, *inks = ["#%02x%02x%02x" % tuple(map(int, re.findall(r"\d+", color)[:3]))
                        for color in dict.fromkeys(colors)]
        assert (paper == "#14171a") == dark and len(inks) >= 3
        assert all(contrast(ink, paper) >= 4.5 for ink in inks), (paper, inks)


def test_hover_shows_hostile_names_as_text(browser, hostile):
    from selenium.webdriver.common.action_chains import ActionChains
    show(browser, hostile[0])
    dot = browser.find_element("css selector", "#ends .scatterlayer .point")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", dot)
    ActionChains(browser).move_to_element(dot).perform()
    time.sleep(0.3)
    text = browser.find_element("css selector", "#ends .hoverlayer").text
    assert "<script>" in text and "loss" in text and browser.execute_script("return window.hacked") is None


def test_paper(browser, example, place):
    """Charts shrink to the page and come back."""
    show(browser, example[0], dark=True)
    size = ("const box = document.querySelector('#seconds svg').getBoundingClientRect(); "
            "return [box.width, box.height]")
    before = browser.execute_script(size)
    browser.execute_script("""addEventListener("beforeprint", () => {
        window.printed = [...document.querySelectorAll(
        ".chart svg.main-svg")].map(svg => svg.getBoundingClientRect().width); });""")
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF",
                                                   dict(paperWidth=8.27, paperHeight=11.69))["data"])
    if folder := os.environ.get("RECORD_SCREENSHOTS"):
        Path(folder, "example.pdf").write_bytes(pdf)
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
    assert pdf.startswith(b"%PDF") and 3 <= pages <= 8
    assert {*browser.execute_script("return window.printed")} == {660, 320}
    time.sleep(0.3)
    assert browser.execute_script(size) == before
