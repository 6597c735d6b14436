"""The tables of records/README.md: up to date, made from data alone, and of nothing but what they show."""
import re
from decimal import Decimal

import pytest

from records import __main__ as cli
from records import history, schema, table
from records.tracks import TRACKS


def record(figures=(), **changes) -> tuple[schema.Statement, dict]:
    """Return what is said of a record, and what its logs say."""
    said = dict(version=1, track="shakespeare", name="Muon", date="2026-11-22", kind="record",
                why_no_record=None, description="Muon", contributors=["Ada"], step=None, planned_runs=None,
                baseline_record=None, waivers={})
    runs = dict(n=9, step=480, loss_mean=1.57851, loss_sd=0.01021, time_ms_mean=85678.9, time_ms_sd=5031.2)
    return schema.parse(said | changes, "a test"), {"runs": runs, "speed": None} | dict(figures)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A records/ folder of its own, with an introduction and the marks."""
    monkeypatch.setattr(table, "RECORDS", tmp_path)
    monkeypatch.setattr(table, "PAGE", tmp_path / "README.md")
    table.PAGE.write_text(f"# Mine\n\n{table.BEGIN}\nold\n{table.END}\n\nAfter.\n")
    return tmp_path


def rows(text: str) -> list[list[str]]:
    """Cells of the table rows; an escaped bar is no border."""
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines()
            if line.startswith("| ")]


def test_the_committed_page_is_up_to_date(capsys):
    assert cli.guarded(table.EXAMPLE.split()[3:]) == 0, capsys.readouterr().out
    assert "up to date" in capsys.readouterr().out


def test_a_stale_page_is_told_and_left_alone(place, capsys):
    before = table.PAGE.read_bytes()
    assert cli.guarded(["table", "--check"]) == 1
    assert "-old" in capsys.readouterr().out and table.PAGE.read_bytes() == before
    assert cli.guarded(["table"]) == 0 == cli.guarded(["table", "--check"]) == cli.guarded(["table"])
    text = table.PAGE.read_text()
    assert text.startswith("# Mine\n") and text.endswith("\n\nAfter.\n") and "old" not in text.split()


def test_every_public_row_is_there_with_its_links(place):
    cli.guarded(["table"])
    text = table.PAGE.read_text()
    for track in ("small", "medium", "optimization"):
        section = text.split(f"## Track `{track}`")[1].split("\n## ")[0]
        found = [cells for cells in rows(section) if cells[0].isdigit()]
        records = [r for r in history.records() if r.track == track]
        assert sorted((int(cells[0]), Decimal(cells[1])) for cells in found) == sorted(
            (r.number, r.minutes_or_steps) for r in records)
        assert {len(cells) for cells in found} == {8}
        assert section.count("[log](") == sum(bool(r.log_path) for r in records)
        assert all(r.log_path in section and (not r.pr or f"[{r.pr}]({r.pr_url})" in section)
                   for r in records)


def test_gains_are_over_the_row_before_or_the_best():
    gains = {name: {(record.number, record.kind, str(record.minutes_or_steps)): gain
                    for record, gain in table.history_rows(TRACKS[name])}
             for name in ("small", "medium", "optimization")}
    assert gains["small"][2, "record", "31.4"] == Decimal("13.6")
    assert gains["small"][21, "retiming", "3.014"] is None
    assert gains["small"][22, "record", "2.99"] == Decimal("0.024")
    assert gains["medium"][1, "record", "348"] is None
    assert gains["medium"][12, "record", "23.28"] == Decimal("0.17")
    assert all(gain is None or gain >= 0 for track in gains.values() for gain in track.values())
    steps = table.history_rows(TRACKS["optimization"])
    assert steps[0][0].minutes_or_steps - sum(gain or 0 for _, gain in steps) == min(
        record.minutes_or_steps for record, _ in steps)


def test_the_best_before_of_upstream_agrees():
    """Upstream marks which results beat all before; by date these are the same but for 5 and 7, both
    3325 steps."""
    ours = {record.number for record, gain in table.history_rows(TRACKS["optimization"]) if gain}
    theirs = {r.number for r in history.records() if r.track == "optimization" and "world-record" in r.notes}
    assert ours ^ theirs == {1, 5, 7}  # 1 is the first


def test_rows_of_local_records_hold_results_gains_and_names():
    speed = dict(difference_ms=-73649.1, low_ms=-78000.0, high_ms=-69300.0, p=1e-9)
    slower = record(name="AdamW", kind="non-record", why_no_record="slower", contributors=[],
                    date="2026-11-23")
    first, second = rows("\n".join(table.local_table([record(dict(speed=speed)), slower])))[1:]
    assert first == ["2026-11-22", "1.428", "1.5785 ± 0.0102", "9", "480", "73.65 s (95 %: 69.30 to 78.00)",
                     "[Muon](track_0_laptop/2026-11-22_Muon)", "Ada"]
    assert second[5:] == ["", "[Muon](track_0_laptop/2026-11-23_AdamW) (no record: slower)", ""]


def test_hostile_descriptions_stay_text():
    hostile = "a|b](javascript:alert(1)) <script>x</script> `c` **d** ![](http://e) \\| # &lt;"
    cells = rows("\n".join(table.local_table([
        record(description=hostile, contributors=["<img src=x onerror=y>", "_z_"])])))[1]
    assert len(cells) == 8 and not re.search(r"(?<!\\)[<`*~]|(?<!\\)_z", cells[6] + cells[7])
    text, url = re.fullmatch(r"\[((?:\\.|[^\]])*)\]\((.*)\)", cells[6]).groups()
    assert url == "track_0_laptop/2026-11-22_Muon" and re.sub(r"\\(.)", r"\1", text) == hostile


def test_numbers_that_the_logs_do_not_hold_are_question_marks():
    runs = dict(n=2, step=None, loss_mean=None, loss_sd=None, time_ms_mean=None, time_ms_sd=None)
    speed = dict(difference_ms=12.0, low_ms=None, high_ms=None, p=None)
    cells = rows("\n".join(table.local_table([record(dict(runs=runs, speed=speed))])))[1]
    assert cells[1:6] == ["?", "? ± ?", "2", "?", ""]


def broken_record(place):
    (place / "track_0_laptop/2026-11-22_Muon").mkdir(parents=True)
    (place / "track_0_laptop/2026-11-22_Muon/record.json").write_text("{")


@pytest.mark.parametrize("break_it, message", [
    (lambda place: table.PAGE.write_text("no marks"), "put both"),
    (lambda place: table.PAGE.unlink(), "expected a page"),
    (lambda place: broken_record(place), "expected what a record states"),
])
def test_errors_say_what_to_do(place, capsys, break_it, message):
    break_it(place)
    assert cli.guarded(["table"]) == 2
    assert message in capsys.readouterr().err
