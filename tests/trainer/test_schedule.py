"""Schedules of train_gpt.py: corners, and stages that start on Adam's steps. tests/recipe has those of track
small, step by step."""
import math

import pytest
import torch

from tests.helpers.tiny import BARE, config, make_run
from train_gpt import Config, learning_rate, loss_weights, mtp_weights, muon_momentum, prefix_weight

# ------------------------------------------------------------------------------------------------------------
# Stages


@pytest.mark.parametrize("every", [1, 2, 8])
@pytest.mark.parametrize("train_steps", [1, 2, 5, 14, 97, 400])
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_stages_start_on_adams_steps_in_order_and_cover_the_run(every, train_steps, stages):
    extension = min(4, train_steps - 1)
    cfg = config(BARE, train_steps=train_steps, extension_steps=extension, stages=stages, adam_every=every)
    starts = cfg.stage_starts
    assert starts[0] == 0 and list(starts) == sorted(starts) and len(starts) == stages + 1
    assert starts[-1] == train_steps - extension
    for k, start in enumerate(starts[:-1]):
        assert start % every == 0 or start == starts[-1]
        assert abs(start - starts[-1] * k / stages) <= every / 2 or start == starts[-1]
    passed = [cfg.stage(step) for step in range(train_steps)]
    assert passed == sorted(passed) and (not extension or passed[-1] == stages)


def test_settings_by_stage_repeat_their_last_entry():
    cfg = config(BARE, window_short=(3, 5), batch_tokens=(64, 96, 128), max_doc_len=(7,))
    assert [cfg.at("window_short", s) for s in cfg.stage_starts] == [3, 5, 5, 5]
    assert [cfg.at("batch_tokens", s) for s in cfg.stage_starts] == [64, 96, 128, 128]
    assert [cfg.at("max_doc_len", s) for s in cfg.stage_starts] == [7] * 4


def test_the_weight_of_prefix_tokens_is_whole_in_the_first_stage_and_falls_in_the_second():
    cfg = Config.for_track("small", prefix_weight=0.25)
    assert {prefix_weight(cfg, s) for s in (0, 240, 480)} == {0.25}
    assert [prefix_weight(cfg, s) for s in (720, 840)] == [0.125, 0.0625] and prefix_weight(cfg, 959) > 0
    assert {prefix_weight(cfg, s) for s in (960, 1440, 1479)} == {0.0}
    assert loss_weights(cfg, 720) == (1.0, 0.25, 0.125) and loss_weights(cfg, 960) == (1.0,)
    assert loss_weights(Config.for_track("small"), 720) == (1.0, 0.25)


@pytest.mark.parametrize("delay", [0, 1])
def test_tying_ends_in_its_stage_after_moves_of_adam(delay):
    cfg = config(BARE, untie_stage=2, untie_delay=delay)
    edge = cfg.stage_starts[2] + 2 * delay
    assert cfg.tied(0) and cfg.tied(edge - 1) and not cfg.tied(edge) and not cfg.tied(13)
    assert set(cfg.graph_starts) == {*cfg.stage_starts, edge}  # another graph each
    assert not config(BARE, untie_stage=0).tied(0)
    assert config(BARE, untie_stage=-1).tied(13)


# ------------------------------------------------------------------------------------------------------------
# Learning rate, momentum, weights of the multi-token loss


def test_the_learning_rate_rises_stays_and_falls_as_it_is_set():
    rising = config(BARE, train_steps=50, warmup_steps=10, lr_mul=(2.0,), cooldown_frac=0.2)
    assert [learning_rate(rising, s) for s in (0, 4, 9, 10)] == [0.2, 1.0, 2.0, 2.0]
    constant = config(BARE, train_steps=20, extension_steps=5, cooldown_frac=0.0, lr_mul=(1.5,))
    assert {learning_rate(constant, s) for s in range(20)} == {1.5}
    falling = config(
        BARE, train_steps=20, extension_steps=0, cooldown_frac=1.0, lr_mul=(1.0,), lr_floor=0.0)
    assert [learning_rate(falling, s) for s in (0, 10)] == [1.0, 0.5]
    assert math.isclose(learning_rate(falling, 19), 0.05)


def test_momentum_without_ramps_is_constant_and_short_runs_take_the_lower_ramp():
    flat = config(BARE, momentum_warmup=0, momentum_cooldown=0)
    assert {muon_momentum(flat, s) for s in range(14)} == {0.95}
    short = config(BARE, train_steps=10, extension_steps=0, momentum_warmup=20, momentum_cooldown=5)
    assert [round(muon_momentum(short, s), 4) for s in (0, 4, 9)] == [0.85, 0.87, 0.87]


@pytest.mark.parametrize("stages", [1, 2, 6])
@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.3), (1.0, 0.5, 0.25, 0.125)])
@pytest.mark.parametrize("extension", [0, 5])
def test_weights_of_the_loss_stay_within_their_settings_at_any_number_of_stages(
        stages, weights, extension):
    cfg = config(BARE, train_steps=30, extension_steps=extension, stages=stages, mtp_weights=weights,
                 prefix_weight=0.25)
    of_prefixes = [prefix_weight(cfg, step) for step in range(30)]
    assert 0.25 == of_prefixes[0] == max(of_prefixes) and min(of_prefixes) >= 0
    assert of_prefixes == sorted(of_prefixes, reverse=True)
    for step in range(30):
        found = mtp_weights(cfg, step)
        assert found[0] == weights[0] and len(found) == max(len(weights) - cfg.stage(step), 1)
        assert found[:-1] == weights[: len(found) - 1] and 0 < found[-1] <= weights[len(found) - 1]


# ------------------------------------------------------------------------------------------------------------
# The average of the weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_final_weights_are_a_blend_with_their_average_over_the_end(tmp_path, dtype):
    """Looks at the weights 12, 8, 4 and 0 steps before the end (within three times what it remembers),
    against the plain formula."""
    run = make_run(tmp_path, train_steps=40, ema_frac=0.125, ema_blend=0.6, dtype=dtype)
    history = []
    for run.step in range(1, 41):
        with torch.no_grad():
            for p in run.model.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(run.step)))
        history.append({name: p.detach().double() for name, p in run.model.named_parameters()})
        run.average_weights()
        assert (run.ema is None) == (run.step < 28)
    for name, p in run.model.named_parameters():
        average = history[27][name]
        for step in (32, 36, 40):
            average = average + 4 / 5 * (history[step - 1][name] - average)
        expected = 0.4 * history[39][name] + 0.6 * average
        tolerance = 1e-6 if p.dtype == torch.float32 else 3e-3
        assert (p - expected).norm() < tolerance * expected.norm(), name
        assert not torch.allclose(p.double(), history[39][name])


def test_an_average_of_head_and_embedding_leaves_all_else_as_it_was(tmp_path):
    run = make_run(tmp_path, train_steps=8, ema_frac=1.0, ema_blend=0.65, ema_of="head")
    for run.step in (4, 8):
        with torch.no_grad():
            for p in run.model.parameters():
                p.add_(1.0)
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        run.average_weights()
    changed = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(run.ema) == {"head", "embed"}
    run.load_state({**{"model": run.model.state_dict(), "muon": run.muon.state_dict()["state"],
                       "adam": run.adam.full_state(), "loader": run.loader.state_dict(),
                       "rng": torch.get_rng_state()}, "ema": dict(run.ema)})
    assert set(run.ema) == {"head", "embed"}


def test_an_embedding_that_was_tied_has_the_average_of_the_head(tmp_path):
    """Until they part the embedding's own values are never used, and are those that it began with."""
    run = make_run(tmp_path, ema_frac=1.0, untie_stage=2)
    for run.step in (2, 6):
        with torch.no_grad():
            run.model.head.add_(1.0)
        run.average_weights()
    assert not torch.equal(run.ema["embed"], run.ema["head"])
    run.adam.state[run.model.head], run.adam.state[run.model.embed] = {}, {}
    run.untie()
    assert torch.equal(run.ema["embed"], run.ema["head"]) and run.ema["embed"] is not run.ema["head"]


def test_an_average_begins_anew_where_the_schedule_was_made_longer_and_there_need_not_be_one(tmp_path):
    run = make_run(tmp_path, train_steps=40, ema_frac=0.125)
    run.step, run.ema = 20, {"head": torch.zeros(1)}  # as a checkpoint of a shorter schedule holds it
    run.average_weights()
    assert run.ema is None

    run = make_run(tmp_path, ema_frac=0.0)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.step = run.cfg.train_steps
    run.average_weights()
    assert run.ema is None
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())
