"""Measurements: pages and plots are those of the committed results, and what is no results is a sentence."""
import html
import json
import re
from pathlib import Path

import pytest

from bench import ablate, airbench, batch, measurement, muonclip, theory
from bench.muon import __main__ as muon
from bench.pictures import THEMES, drawn_data
from bench.tune import __main__ as tune
from data.errors import run_program
from data.files import ROOT

PAGES = {
    "ABLATION": ablate.MEASUREMENT,
    "AIRBENCH": airbench.MEASUREMENT,
    "BATCH": batch.MEASUREMENT,
    "MUON": muon.MEASUREMENT,
    "MUONCLIP": muonclip.MEASUREMENT,
    "THEORY": theory.MEASUREMENT,
    "TUNE": tune.MEASUREMENT,
}


@pytest.fixture(params=PAGES)
def one(request):
    return PAGES[request.param]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_and_its_plots_show_the_committed_results(name, monkeypatch):
    """Run python -m bench.NAME table RESULTS --page=bench/NAME.md after a change of either."""
    monkeypatch.chdir(ROOT)
    measured = PAGES[name]
    page = Path(f"bench/{name}.md").read_text(encoding="utf-8")
    marked = re.search(r"<!-- figures of (\S+) -->\n\n(.*)\n<!-- end of figures -->", page, re.S)
    found = measured.read(Path(marked[1]))
    assert measured.tables(found) == marked[2]
    if not measured.draw:
        return
    drawn = json.loads(json.dumps(drawn_data(measured.figure(found, THEMES[0]))))
    for theme in THEMES:
        picture = (measurement.PICTURES / f"{measured.name}_{theme.name}.svg").read_text(encoding="utf-8")
        description = re.search(r"<dc:description>(.*?)</dc:description>", picture, re.S)[1]
        assert json.loads(html.unescape(description)) == drawn


def test_results_that_are_not_there_or_are_none_are_refused(one, tmp_path, capsys):
    for content in (None, '{"plan": 7}\n', "half a li"):
        out = tmp_path / ("trials.jsonl" if one is tune.MEASUREMENT else "muon_0.01_off_0.txt")
        if content:
            out.write_text(content)
        source = tmp_path if one.out == "OUT" else out
        assert run_program(one.main, ["table", str(source)]) == 2
        assert re.search("expected .*found .*; ", capsys.readouterr().err)


def test_a_page_without_marks_is_refused_and_one_with_them_keeps_its_words(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measurement, "PICTURES", tmp_path)
    source = ROOT / "bench/results/2026-11-28_theory/theory.json"
    page = tmp_path / "page.md"
    command = ["table", str(source), f"--page={page}"]
    assert run_program(theory.MEASUREMENT.main, command) == 2
    assert "--page: expected a page to put tables into" in capsys.readouterr().err
    page.write_text("# Title\n")
    assert run_program(theory.MEASUREMENT.main, command) == 2
    assert "expected a line '<!-- figures of" in capsys.readouterr().err

    page.write_text(f"# Title\n<!-- figures of {source} -->\nold\n<!-- end of figures -->\nThe end.\n")
    theory.MEASUREMENT.main(command)
    assert "\n\nSeed 0" in page.read_text() and page.read_text().endswith("-->\nThe end.\n")
    for theme in THEMES:
        assert ">bound</text>" in (tmp_path / f"theory_{theme.name}.svg").read_text().replace("\n", "")
    theory.MEASUREMENT.main(command[:2])
    assert capsys.readouterr().out.strip() in page.read_text()
