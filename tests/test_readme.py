"""README.md cannot disagree with the code, the files and the logs that its figures come from."""
import dataclasses
import re
import statistics
from pathlib import Path

import pytest

import train_gpt
from bench.summary import final, spread

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "bench" / "results" / "2026-11-22_shakespeare_cpu"


def finals(group: str) -> tuple[list[float], list[float]]:
    """Last validation losses and training seconds of the logs of a group."""
    record = ROOT / "records" / "track_0_laptop" / group / "runs"
    folder = record if record.exists() else RESULTS / group
    losses, seconds, _ = zip(*(final(path) for path in sorted(folder.glob("*.txt"))))
    return list(losses), list(seconds)


def test_every_setting_and_option_it_shows_exists():
    shown = set(re.findall(r"(?<=[\s`])--([a-z][a-z_]*)\b", README))
    assert shown, "no options found in README.md"
    torchrun = {"standalone", "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}
    slurm = {"nodes", "ntasks", "gpus"}
    others = {"help", "check", "resume", "prompt", "name", "doctor", "plan", "gpu"}
    records = {"margin", "sd", "a", "b", "runs", "out", "logs", "baseline", "note"}  # of python -m records, tested there
    assert shown - torchrun - slurm - others - records <= {f.name for f in dataclasses.fields(train_gpt.Config)}
    assert "--prompt" in (ROOT / "sample.py").read_text()


def test_every_file_it_names_exists():
    names = set(re.findall(r"`((?:[a-z_]+/)*[a-zA-Z_0-9]+\.(?:py|sh|txt|md))`", README)) | {"LICENSE"}
    assert len(names) > 8
    for name in names:
        assert (ROOT / name).exists(), name


def test_line_counts_are_true():
    counts = re.findall(r"`(\w+\.py)` (\d+) \((\d+) not blank\)", README)
    assert len(counts) == 3
    for name, lines, filled in counts:
        text = (ROOT / name).read_text().splitlines()
        assert (len(text), sum(bool(line.strip()) for line in text)) == (int(lines), int(filled)), name


def test_track_table_is_the_presets():
    for name in train_gpt.TRACKS:
        cfg = train_gpt.Config.for_track(name)
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` "))
        assert f"| {cfg.target_loss} |" in row and f"| {cfg.train_steps} |" in row


@pytest.mark.parametrize("group", ["muon", "adamw", "yardstick", "2026-11-24_Reference", "2026-11-24_TailAverage"])
def test_figures_are_those_of_the_logs(group):
    losses, seconds = finals(group)
    row = next(line for line in README.splitlines() if line.startswith("| ") and f"`{group}/`" in line)
    assert f"| {len(losses)} | {spread(losses, 4)} | {spread(seconds, 1)} |" in row


@pytest.mark.parametrize("group", ["muon", "2026-11-24_Reference", "2026-11-24_TailAverage"])
def test_reference_runs_meet_the_target_with_p_below_one_percent(group):
    losses, _ = finals(group)
    target = train_gpt.Config.for_track("shakespeare").target_loss
    t = (target - statistics.mean(losses)) / (statistics.stdev(losses) / len(losses) ** 0.5)
    assert len(losses) >= 8 and t > 2.998  # one-sided 1 % of Student's t with 7 degrees of freedom


def test_ratio_of_times_to_the_target_is_that_of_the_logs():
    target, (slow, slow_s), (fast, fast_s) = 1.6, finals("adamw"), finals("muon")
    assert statistics.mean(slow) < target and statistics.mean(fast) < target
    assert f"{statistics.mean(slow_s) / statistics.mean(fast_s):.2f} times" in README


def test_summary_refuses_what_is_no_finished_run(tmp_path):
    (tmp_path / "a.txt").write_text("step:1/4 val_loss:2.0 train_time:3ms step_avg:3.00ms\n")
    with pytest.raises(ValueError, match="expected the log of a finished run"):
        final(tmp_path / "a.txt")
