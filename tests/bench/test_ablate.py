"""bench.ablate: the arithmetic of its table, that every variant is one the trainer takes, and a sweep that
goes on."""
import json
import math

from bench import ablate, trials
from tests.helpers.runs import TINY, make_shards


def rows(variant, losses, steps=100):
    return [dict(variant=variant, seed=seed, steps=steps, loss=loss) for seed, loss in enumerate(losses)]


def test_the_table_weighs_loss_against_time_and_compares_seed_by_seed():
    text = ablate.table([
        *rows(ablate.BASE, [2.0, 2.4, 1.98]),
        *rows(ablate.FEWER, [2.05], 90),
        *rows(ablate.MORE, [1.95], 110),
        *rows("smear", [2.01, 2.43]),
        *rows("skip", [2.06, 2.42]),
        dict(variant="smear", ratio=0.8),
        dict(variant=ablate.BASE, ratio=1.0),
    ])
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:1] == "|"]
    lines = {row[0]: row for row in cells}
    assert "1 % of the steps is worth 0.0050" in text  # 0.1 over 20 steps
    # Differences 0.01, 0.03 and 0.06, 0.02: squares around the means 2 x 0.01^2 + 2 x 0.02^2, of 2 degrees of
    # freedom.
    assert "a standard deviation of 0.0224 (2 degrees of freedom)" in text
    half = 4.3027 * math.sqrt(0.001 / 2) / math.sqrt(2)
    assert lines["skip"][1:4] == ["2", "2.2400", f"+0.0400 ± {half:.4f}"]
    # Without smear a step takes 0.8 of the time, so 25 steps more fit, each worth 0.005.
    assert lines["smear"][2:] == ["2.2200", f"+0.0200 ± {half:.4f}", "0.800", "-0.1050"]
    assert list(lines)[2:] == ["10 % fewer steps", "skip", "10 % more steps", "smear"]


def test_every_variant_is_one_that_the_trainer_takes():
    jobs = [ablate.job(name, settings, 240, 0) for name, settings in ablate.variants(240).items()]
    found = {str(job): trials.config(job.settings, job.seed) for job in jobs}
    assert len(found) == 4 + len(ablate.OFF) + len(ablate.ON) and len(set(found.values())) == len(found)


def test_a_sweep_trains_what_is_missing_and_times_in_turns(tmp_path, monkeypatch, capsys, in_this_process):
    monkeypatch.setenv("DATA_PATH", str(make_shards(tmp_path)))
    variants = {ablate.BASE: TINY[1:], "smear": [*TINY[1:], "--smear=off"]}
    monkeypatch.setattr(ablate, "variants", lambda steps: variants)
    monkeypatch.setattr(ablate, "ROUNDS", 1)
    out = tmp_path / "out.jsonl"
    out.write_text(json.dumps(rows(ablate.BASE, [1.0])[0]) + "\n")
    ablate.MEASUREMENT.main(["run", str(out), "--seeds=1", "--steps=4", "--only", "smear"])
    ablate.MEASUREMENT.main(["time", str(out), "--steps=12"])
    kept, trained, *timed = map(json.loads, out.read_text().splitlines())
    assert "1 runs to do, 1 done" in capsys.readouterr().err
    assert kept["loss"] == 1.0 and trained["variant"] == "smear" and 0 < trained["loss"] < 10
    assert [row["variant"] for row in timed] == [ablate.BASE, "smear"] and timed[0]["ratio"] == 1
