"""report: one page that holds what compare says, loads nothing, and runs nothing."""
import base64
import html
import html.parser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.helpers.committed import ADAMW, MUON, YARDSTICK
from tests.helpers.synthetic import own

from records import logs

RESULTS = (ADAMW, MUON, YARDSTICK)
HOSTILE = ("</script><script>window.hacked = 1</script><img src=x onerror='window.hacked=2'>"
           "<a href=\"javascript:window.hacked=3\">a</a>\u202egnitrever\u200f &lt;b&gt; {{ 7 * 7 }} $x^2$ ")


class Page(html.parser.HTMLParser):
    """Elements with their attributes and texts; tables as lists of rows of cells."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.source = text
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


@pytest.fixture
def make(records, at_root, tmp_path):
    """The page of some paths."""
    def make(*arguments) -> Page:
        output = tmp_path / "new folder" / "page.html"
        code, _, err = records("report", *arguments, "-o", output)
        assert (code, err) == (0, "")
        return Page(output.read_text(encoding="utf-8"))
    return make


def source(marker: str, lines: int = 40) -> str:
    return "".join(f"line {i} of the program\n" for i in range(lines)) + marker + "\n"


@pytest.fixture
def hostile(tmp_path) -> Path:
    """Logs that try everything: names of files and folders, settings, versions, sources, losses."""
    def write(folder: str, name: str, text: str):
        (tmp_path / "hostile" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "hostile" / folder / name).write_text(text, encoding="utf-8")

    for seed, loss in enumerate((1.58, 1.57, 1.59)):
        files = {"train_gpt.py": source(HOSTILE), "muon.py": source("x" * 1_000_000)}
        text = own(losses=[5, 3, 2, loss], seed=seed, torch="2.13<script>", device=HOSTILE.strip(),
                   files=files, optimizer=HOSTILE, **{HOSTILE: 1})
        write("a <b>bold<script>window.hacked=4<∕script>",
              f"<img src=x onerror=window.hacked=5>\u202e{seed}.txt", text)
        write("b", f"{seed}{HOSTILE.replace('/', '∕')[:80]}.txt",
              own(losses=[5, 3.1, 2.1, loss], seed=seed,
                  files={"train_gpt.py": source("\0\x1b[31m" + HOSTILE[::-1])}))
    write("c", "strange.txt", own(losses=[1e-300, 1e300, -1, 0, 2], times=[0, -5, 1e18, 3, 1e19]))
    write("c", "nan.txt", own(losses=[float("nan"), float("inf")]))
    write("c", os.fsdecode(b"no unicode \xff.txt"), own(losses=[5, 2, 1.7]))
    write("c", f"no log {HOSTILE[:40].replace('/', '')}.txt", HOSTILE)
    return tmp_path / "hostile"


def test_a_page_is_whole_and_loads_nothing(make):
    page = make(*RESULTS)
    assert page.source.startswith("<!doctype html>") and page.all("html") == [{"lang": "en"}]
    addresses = [value for _, attributes in page.elements for key, value in attributes.items()
                 if key in ("src", "href")]
    picture, = addresses
    assert picture.startswith("data:image/svg+xml;base64,") and picture == page.all("img")[0]["src"]
    assert base64.b64decode(picture.partition(",")[2]).rstrip().endswith(b"</svg>")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len({*ids})
    assert {attributes.get("aria-labelledby") for _, attributes in page.elements} - {None} <= {*ids}
    policy = next(attributes["content"] for attributes in page.all("meta") if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; img-src data:; ") and not page.all("script")
    assert make(*RESULTS).source == page.source  # the same logs give the same bytes
    assert len(page.source) < 500_000


def test_it_says_what_compare_says(make, records):
    page = make(ADAMW, MUON)
    out = records("compare", ADAMW, MUON)[1]
    assert page.tables[0][1][3] == "1.5908 ± 0.0042" in out
    sentences = out.partition("against 2026-11-22_AdamW\n")[2].splitlines()
    assert len(sentences) > 5 and all(sentence.strip() in page.text for sentence in sentences)
    assert "Loss rule, 2026-11-22_Muon: mean 1.57847 of 9" in page.text
    assert "2026-11-22_Muon against 2026-11-22_AdamW" in page.text
    assert [row[0] for row in page.tables[1]] == ["step", "240", "480", "720", "960"]
    assert "public record 80" in make(MUON, "--track", "small", "--history", 80).text


def test_runs_have_the_figures_of_their_logs(make):
    page = make(*RESULTS)
    header, *rows = page.tables[-1]
    assert len(rows) == 17 and "torch" not in header
    assert "torch 2.13.0+cpu" in page.text  # what all share stands below
    by_name = {row[header.index("run")]: row for row in rows}
    for path in logs.find(RESULTS):
        run, = logs.read(path).runs
        row = dict(zip(header, by_name[run.run_id[:8]]))
        reached = run.time_to(1.6)
        assert (row["seed"], row["final loss"]) == (str(run.seed), f"{run.final_val_loss:.4f}")
        assert row["time, s"] == f"{run.final_time_ms / 1000:,.2f}"
        assert row["reached, s"] == ("-" if reached is None else f"{reached / 1000:,.2f}")


def test_hostile_text_is_text(make, hostile):
    page = make(hostile)
    assert not page.all("script") and len(page.all("img")) == 1
    assert not page.all("b") and not page.all("a")
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert "window.hacked = 1" in page.text and "{{ 7 * 7 }}" in page.text  # shown as it is
    assert not re.search("[\0-\x08\x0b-\x1f\x7f\u200e\u200f\u202a-\u202e\u2066-\u2069]", page.text)
    assert "x" * 201 not in page.text and len(page.source) < 1e6
    assert "is left out: " in page.text and "this is no log of a training run" in page.text
    assert '<span class="added">' in page.source and "Too different to be laid out" not in page.text


def test_changes_of_sources_are_shown(make, tmp_path):
    for name, lines in (("a", "one\ntwo\nthree\n"), ("b", "one\n2 < 3\nthree\nfour\n")):
        files = {"train_gpt.py": lines, "muon.py": "m\n"}
        (tmp_path / f"{name}.txt").write_text(own(losses=[5, 1.6], files=files))
    page = make(tmp_path / "a.txt", tmp_path / "b.txt")
    assert '<span class="removed">-two</span>' in page.source
    assert '<span class="added">+2 &lt; 3</span>' in page.source
    assert "train_gpt.py: +2 −1 lines" in page.text and "muon.py: +" not in page.text


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MEASURE = """
<iframe id=frame width=WIDTH height=800 style="border: 0" srcdoc="PAGE"></iframe>
<script>
window.onload = () => {
    const page = document.getElementById("frame").contentDocument;
    const rights = [...page.querySelectorAll("CHOSEN")].map(part => part.getBoundingClientRect().right);
    document.title = `${page.documentElement.scrollWidth} ${rights.length} ${Math.ceil(Math.max(...rights))}`;
};
</script>
"""


def measured(folder: Path, page: str, width: int, chosen: str) -> tuple[int, int, int]:
    """Return (width over which the page scrolls, number of the chosen parts, right end of the widest) in
    a browser whose window is so wide."""
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    text = MEASURE.replace("WIDTH", str(width)).replace("CHOSEN", chosen).replace("PAGE", html.escape(page))
    (folder / "frame.html").write_text(f"<!doctype html><title></title>{text}", encoding="utf-8")
    done = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                           f"--user-data-dir={folder / 'browser'}", folder / "frame.html"],
                          capture_output=True, text=True)
    return tuple(map(int, re.search("<title>(.*?)</title>", done.stdout)[1].split()))


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.timeout(300)
def test_the_page_fits_screen_phone_and_paper(make, hostile, tmp_path):
    """On a phone tables scroll in their frame; on paper, where nothing does, they end before the edge."""
    (tmp_path / "browser").mkdir()
    page = make(*RESULTS, hostile).source
    for width in (1280, 360):
        scrolled, _, _ = measured(tmp_path, page, width, "table")
        assert scrolled <= width
    printed = page.replace("@media print", "@media all")
    assert printed != page
    for width in (1047, 979):  # of A4 and of US letter, on their sides, less 1 cm of margin
        scrolled, parts, right = measured(tmp_path, printed, width, "th, td, pre span, img")
        assert scrolled <= width and parts > 500 and right <= width


@pytest.mark.parametrize("arguments, message", [
    (["README.md", "-o", "x.html"], "found none"),
    ([MUON, "-o", "a.txt"], ".html"), ([MUON, "--track", "large", "-o", "x.html"], "--track"),
    ([MUON, "-o", "README.md/x.html"], "-o"),
])
def test_errors_say_what_to_do(records, at_root, arguments, message):
    code, out, err = records("report", *arguments)
    assert (code, out) == (2, "") and message in err
