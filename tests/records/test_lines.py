"""Step lines that agree under each convention of the public logs, and stop to when a figure is changed."""
import random
import re

import pytest
from tests.helpers.claims import log, replaced
from tests.helpers.synthetic import LINE, VALIDATION_DATA

from records import logs
from records.lines import details_of

TOTAL, EVERY = 60, 15


def body(convention: str, training: bool = True) -> str:
    """Step lines of a run with steps of about 100 ms."""
    rng, clock, lines, before = random.Random(convention), [0.0], [], (0, 0.0)
    for step in range(1, TOTAL + 1):
        clock.append(clock[-1] + 100 * rng.uniform(0.9, 1.1))
    if convention == "restarts":  # ten slow steps, then the clock starts anew
        clock = [3000.0 * step for step in range(11)] + [ms - clock[10] for ms in clock[11:]]
    for step, ms in enumerate(clock):
        shown = f"{ms / 1000:.3f}s" if convention in ("seconds", "intervals") else f"{ms:.0f}ms"
        average = ms / max(step, 1)
        if convention == "restarts":
            average = float("nan") if step <= 12 else ms / (step - 10)
        if step and training:
            lines.append(f"step:{step}/{TOTAL} train_time:{shown} step_avg:{average:.2f}ms")
        if step % EVERY == 0:
            if convention == "intervals":  # of validations only
                average = (ms - before[1]) / max(step - before[0], 1)
                before = step, ms
            lines.append(f"step:{step}/{TOTAL} val_loss:{4 - step / 50:.4f} train_time:{shown} "
                         f"step_avg:{average:.2f}ms")
    return "\n".join([*lines, ""])


def contradictions(tmp_path, text: str) -> tuple[str, ...]:
    path = tmp_path / "log.txt"
    header = f"{LINE}\nRunning PyTorch 2.8.0 compiled for CUDA 12.6\n{LINE}\n"
    path.write_text(f"# source\n{header}{text}")
    return details_of(logs.read(path)).contradictions


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("convention", ["start", "seconds", "intervals", "restarts"])
def test_conventions(convention, training, tmp_path):
    text = body(convention, training)
    assert not contradictions(tmp_path, text)
    changed = replaced(text, rf"^(step:30/{TOTAL} val_loss:\S+ train_time:)\S+?(m?s )", r"\g<1>3.5\2")
    assert contradictions(tmp_path, changed)
    changed = replaced(text, rf"^(step:45/{TOTAL} val_loss:\S+ train_time:\S+ step_avg:)\S+", r"\g<1>90.00ms")
    assert contradictions(tmp_path, changed)


def test_how_small_a_change_shows(tmp_path):
    """Averages have 0.01 ms: 60 steps make it 0.6 ms, and times are printed to 1 ms, so that 2 ms show."""
    text = body("start", training=False)
    ms = int(re.search(rf"^step:{TOTAL}/\d+ val_loss:\S+ train_time:(\d+)", text, re.M)[1])
    for more, expected in ((0, 0), (2, 1), (-2, 1)):
        changed = replaced(text, rf"^(step:{TOTAL}/\d+ val_loss:\S+ train_time:)\d+", rf"\g<1>{ms + more}")
        assert len(contradictions(tmp_path, changed)) == expected


def test_two_runs_in_a_file(tmp_path):
    assert not contradictions(tmp_path, body("start") + body("seconds"))
    assert len(contradictions(tmp_path, body("start") + replaced(body("seconds"), "^step:7/.*\n", ""))) == 1


def test_a_line_is_missing(tmp_path):
    text = body("start")
    for step in (1, 7, TOTAL - 1):
        assert contradictions(tmp_path, replaced(text, rf"^step:{step}/.*\n", "", count=1))
    found = contradictions(tmp_path, replaced(text, rf"^step:{TOTAL}/\d+ train_time.*\n", ""))
    assert found == (f"expected a training line at step {TOTAL}, found a validation only",)


def test_validation_far_after_its_training_line(tmp_path):
    """A GPU may lag a few steps behind the lines; more is another clock."""
    text = body("start")
    ms = int(re.search(rf"^step:{TOTAL}/\d+ val_loss:\S+ train_time:(\d+)", text, re.M)[1])
    for late, expected in ((200, 0), (1500, 1)):
        changed = replaced(text, rf"^(step:{TOTAL}/\d+ val_loss:\S+) .*", rf"\1 train_time:{ms + late}ms "
                           f"step_avg:{(ms + late) / TOTAL:.2f}ms")
        assert len(contradictions(tmp_path, changed)) == expected


def test_details_of_a_log(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(replaced(log(3), "^attention:", "resumed: from x\nattention:"))
    details = details_of(logs.read(path))
    assert details.resumed and (details.commit, details.num_training) == ("0" * 40, 20)
    assert (details.training_data, details.validation_data) == ("0" * 16, VALIDATION_DATA)
    source = f"resumed: in a docstring\nvalidation data: first 9 tokens, sha256 {'1' * 64}"
    path.write_text(replaced(log(3), "^# the trainer", source))
    details = details_of(logs.read(path))
    assert not details.resumed and details.validation_data == VALIDATION_DATA


def test_a_log_too_long_to_judge(tmp_path, monkeypatch):
    monkeypatch.setattr("records.lines.SIZE_LIMIT", 100)
    assert "are not judged" in contradictions(tmp_path, body("start"))[0]
