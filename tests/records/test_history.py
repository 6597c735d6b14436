"""records/history against itself: its files agree with each other and keep the promises of their README."""
from collections import Counter
from decimal import Decimal

import pytest

from records import history


def test_row_counts_are_those_of_the_sources():
    assert len(history.records()) == 155
    assert len(history.finals()) == 1281
    assert len(history.other_finals()) == 460
    assert len(history.curves()) == 363
    assert sum(map(len, history.curves().values())) == 8354
    text = (history.FOLDER / "README.md").read_text()
    assert all(f"| {count} |" in text for count in ("155", "1,281", "460", "8,354")) and "363 runs" in text


def test_the_folder_is_under_one_megabyte():
    assert sum(path.stat().st_size for path in history.FOLDER.iterdir()) < 1_000_000


def test_cells_have_types():
    first, last = history.records()[0], [record for record in history.records()
                                         if record.track == "small"][-1]
    assert (first.number, first.minutes_or_steps, first.date.isoformat()) == (1, Decimal(45), "2024-05-28")
    assert first.contributors == ("karpathy", "llm.c contributors")
    assert first.pr is None
    assert first.pr_url is None
    assert str(last.minutes_or_steps) == "1.23"
    assert last.pr_url.endswith("/pull/342")
    assert last.log_url.endswith(last.log_path)
    assert [record.number for record in history.records() if record.date is None] == [11]
    assert history.finals()[0].final_train_time_ms is None and history.finals()[0].final_val_loss == 3.2722


@pytest.mark.parametrize("track, numbers", [("small", 89), ("medium", 18), ("optimization", 46)])
def test_numbers_run_from_one_without_a_gap(track, numbers):
    found = [record.number for record in history.records() if record.track == track]
    assert sorted(set(found)) == list(range(1, numbers + 1)) and found == sorted(found)
    assert [number for number, n in Counter(found).items() if n > 1] == ([21] if track == "small" else [])


def test_every_run_of_a_record_belongs_to_one_row():
    claimed = Counter(final for record in history.records() for final in history.runs_of(record))
    assert set(claimed) == set(history.finals()) and set(claimed.values()) == {1}
    assert {final.kind for final in history.other_finals()} == {"other"}


def test_curves_are_of_the_linked_run_and_the_first_others():
    expected = set()
    for record in history.records():
        runs = sorted(history.runs_of(record), key=lambda run: (run.log_path != record.log_path, run.run_id))
        expected |= {(run.track, run.number, run.run_id) for run in runs[:3]}
    assert set(history.curves()) == expected


def test_curves_end_at_the_finals():
    finals = {(final.track, final.number, final.run_id): final for final in history.finals()}
    assert len(finals) == len(history.finals())
    for key, points in history.curves().items():
        steps, final, last = [point.step for point in points], finals[key], points[-1]
        assert steps == sorted(set(steps)) and len(points) == final.n_val_points, key
        assert (last.val_loss, last.train_time_ms, last.step) == (
            final.final_val_loss, final.final_train_time_ms, final.final_step), key


def test_a_note_that_counts_runs_is_right():
    """Titles and notes were written by hand; a note "7 runs" can be counted."""
    for record in history.records():
        if (said := record.notes.rpartition("; ")[2].split())[1:] == ["runs"]:
            assert int(said[0]) == len(history.runs_of(record)), record
