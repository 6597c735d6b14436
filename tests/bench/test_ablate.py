"""bench.ablate: the arithmetic of its table, that every variant is one the trainer takes, and what bench.tried does."""
import json
import math
import re

import pytest
import torch

from bench import ablate
from bench.tried import TRIED, Hyperball, LookAhead, PowerCooldown, RowFloor
from tests.helpers.tiny import SMALL, config, make_run
from engine.log import ROOT
from engine.ranks import Runtime
import train_gpt

torch.set_num_threads(1)


def rows(variant, losses, steps=100):
    return [dict(variant=variant, seed=seed, steps=steps, loss=loss) for seed, loss in enumerate(losses)]


def test_the_table_weighs_loss_against_time_and_compares_seed_by_seed(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    found = [*rows(ablate.BASE, [2.0, 2.4, 1.98]), *rows(ablate.FEWER, [2.05], 90), *rows(ablate.MORE, [1.95], 110),
             *rows("smear", [2.01, 2.43]), *rows("skip", [2.06, 2.42]),
             dict(variant="smear", ratio=0.8), dict(variant=ablate.BASE, ratio=1.0)]
    out.write_text("\n".join(map(json.dumps, found)))
    assert ablate.main(["table", str(out)]) == 0
    text = capsys.readouterr().out
    lines = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in text.splitlines() if line[:1] == "|"}
    assert "1 % of the steps is worth 0.0050" in text  # 0.1 over 20 steps
    # Differences 0.01, 0.03 and 0.06, 0.02: squares around the means 2 x 0.01^2 + 2 x 0.02^2 over 2 degrees of freedom.
    assert "a standard deviation of 0.0224 (2 degrees of freedom)" in text
    half = 4.3027 * math.sqrt(0.001 / 2) / math.sqrt(2)
    assert lines["skip"][1:4] == ["2", "2.2400", f"+0.0400 ± {half:.4f}"]
    # Without smear a step takes 0.8 of the time, so 25 steps more fit, each worth 0.005.
    assert lines["smear"][2:] == ["2.2200", f"+0.0200 ± {half:.4f}", "0.800", "-0.1050"]
    assert list(lines)[2:] == ["10 % fewer steps", "skip", "10 % more steps", "smear"]


def test_too_few_results_are_said(tmp_path, capsys):
    assert ablate.main(["table", str(tmp_path / "none.jsonl")]) == 2
    assert "expected runs of 'all on'" in capsys.readouterr().err


def test_every_variant_is_one_that_the_trainer_takes():
    found = ablate.variants(240)
    base = ablate.config("shakespeare", 240, [], 0)
    assert len(found) == 4 + len(ablate.OFF) + len(TRIED)
    for name, (kind, settings) in found.items():
        assert kind is not train_gpt.Run or name == ablate.BASE or ablate.config("shakespeare", 240, settings, 0) != base, name


def test_what_was_tried_does_what_it_says(tmp_path):
    def trained(kind, **changes):
        make_run(tmp_path)  # its data
        cfg = config(SMALL, train_files=str(tmp_path / "train_*.bin"), val_files=str(tmp_path / "val_*.bin"), normuon_beta2=0.0,
                     cautious=False, **changes)
        run = kind(cfg, Runtime())
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        run.train_step()
        return run, before

    run, before = trained(Hyperball)
    for name in train_gpt.MATRICES:
        norm, was = (x.norm(dim=(-2, -1)) for x in (getattr(run.model, name), before[name]))
        torch.testing.assert_close(norm, was)
        turned = (getattr(run.model, name) - before[name]).norm(dim=(-2, -1)) / was
        torch.testing.assert_close(turned, torch.full_like(turned, Hyperball.turn), rtol=0.02, atol=0)

    run, before = trained(RowFloor, muon_wd=0.0)
    step = (run.model.attn_vo - before["attn_vo"]).norm(dim=-1) / before["attn_vo"].norm(dim=-1)
    factor = run.muon.param_groups[0]["lr"]
    assert step.min() > 0.999 * factor * RowFloor.least

    run, _ = trained(PowerCooldown)
    factors = [run.factor(run.cfg, step) for step in range(13)]
    assert factors[0] == factors[2] == 1 and factors[12] == run.cfg.lr_floor and factors == sorted(factors, reverse=True)
    assert factors[6] == pytest.approx(0.15 + 0.85 * (0.5 / 0.8) ** 1.2)
    assert train_gpt.learning_rate is not run.factor  # put back

    run, before = trained(LookAhead)
    torch.testing.assert_close(run.drift[0], (1 - LookAhead.gamma) * (next(run.model.parameters()) - before["attn_qk"]))
    run.step, start = 7, next(run.model.parameters()).detach().clone()
    seen = []
    run.forward = lambda *args: seen.append(next(run.model.parameters()).detach().clone()) or run.model(*args)
    drift = run.drift[0].clone()
    run.train_step()
    ahead = LookAhead.beta * train_gpt.learning_rate(run.cfg, 7) * drift
    torch.testing.assert_close(seen[0] - start, ahead, rtol=1e-3, atol=1e-7)


def test_the_page_has_the_tables_of_its_results():
    page = (ROOT / "bench/ABLATION.md").read_text(encoding="utf-8")
    path, found, after = re.search(r"<!-- figures of (\S+) -->\n\n(.*)\n<!-- end of figures -->(.*)", page, re.S).groups()
    assert found == ablate.tables(ROOT / path) and after == "\n"
