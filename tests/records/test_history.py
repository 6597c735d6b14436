"""records/history against itself: its files agree with each other and keep the promises of their README."""
from collections import Counter
from decimal import Decimal

import pytest

from records import history


def test_row_counts_are_those_of_the_sources():
    rows = {name: len(history.read(name)) for name in ("records.csv", "finals.csv", "curves.csv")}
    assert [*rows.values()] == [155, 1281, 8354]
    text = (history.FOLDER / "README.md").read_text()
    assert all(f"| `{name}` |" in text and f"| {count:,} |" in text for name, count in rows.items())
    assert sum(path.stat().st_size for path in history.FOLDER.iterdir()) < 1_000_000


def test_cells_have_types():
    first, last = history.records()[0], [record for record in history.records()
                                         if record.track == "small"][-1]
    assert (first.number, first.minutes_or_steps, first.date.isoformat()) == (1, Decimal(45), "2024-05-28")
    assert first.contributors == ("karpathy", "llm.c contributors")
    assert first.pr is None and first.pr_url is None
    assert str(last.minutes_or_steps) == "1.23"
    assert last.pr_url.endswith("/pull/342") and last.log_url.endswith(last.log_path)
    assert [record.number for record in history.records() if record.date is None] == [11]


@pytest.mark.parametrize("track, numbers", [("small", 89), ("medium", 18), ("optimization", 46)])
def test_numbers_run_from_one_without_a_gap(track, numbers):
    found = [record.number for record in history.records() if record.track == track]
    assert sorted(set(found)) == list(range(1, numbers + 1)) and found == sorted(found)
    assert [number for number, n in Counter(found).items() if n > 1] == ([21] if track == "small" else [])


def test_curves_end_at_the_finals():
    finals = {(row["track"], row["number"], row["run_id"]): row for row in history.read("finals.csv")}
    assert len(finals) == len(history.read("finals.csv"))
    curves = Counter((row["track"], row["number"]) for row in history.read("curves.csv"))
    seen = 0
    for track, number in curves:
        for run in history.as_log(track, int(number)).runs:
            final, last = finals[track, number, run.run_id], run.val_points[-1]
            steps = [point.step for point in run.val_points]
            assert steps == sorted(set(steps)) and len(steps) == int(final["n_val_points"])
            ms = final["final_train_time_ms"]
            assert (last.val_loss, last.train_time_ms, last.step) == (
                float(final["final_val_loss"]), float(ms) if ms else None, int(final["final_step"]))
            seen += 1
    assert seen == 363
    run = history.as_log("small", 80).runs[0]
    assert (run.hardware, run.complete, run.total_steps) == ("8 x NVIDIA H100 80GB HBM3", True, 1480)
