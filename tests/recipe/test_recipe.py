"""The recipe of track small, row by row against its source: public record 80 (modded-nanogpt, commit
2c702746) with the XSA of record 82 (commit 25ec3536) on six layers, which together reached 3.2787 at 1450
steps (n = 21).

Each row is a setting or a parameter's optimizer: our value, the record's where it differs, the place in the
record's train_gpt.py, and what a difference does; where ours sets it, the name says. STARTS has the first
values of all parameters; docs/differences.md says what no setting holds. A value that moves without its row
fails here, and so does a new setting. RECORD_89 holds the rows of the preset --recipe=record89. That the
clock pays for the first batch is tested in tests/trainer/test_train.py."""
import dataclasses
import math
import pkgutil
import re
from typing import NamedTuple

import pytest
import torch
from tests.helpers.tiny import build, config, docs_of

from data.files import ROOT
from train_gpt import Config, learning_rate, optimizer_table


class Row(NamedTuple):
    ours: object
    where: str  # in the record's source
    theirs: object = "the same"
    effect: str = ""  # of a difference


ATTENTION_LAYERS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 10)
OURS_ALONE = "none"  # the record has no such thing

SETTINGS = {
    "target_loss": Row(3.28, "README, track 1"),
    # Data
    "max_epochs": Row(1, "distributed_data_generator: file_iter"),
    "bos_id": Row(50256, "BOS_ID"),
    "vocab_size": Row(50257, "GPT(vocab_size=)"),
    "val_tokens": Row(10_485_760, "Hyperparameters.val_tokens"),
    "val_slice": Row(262_144, "Hyperparameters.val_batch_size: 2,097,152 over eight ranks"),
    "val_every": Row(250, "Hyperparameters.val_loss_every"),
    "split_docs": Row(0, OURS_ALONE),
    # Schedule
    "train_steps": Row(1480, "Hyperparameters.num_scheduled_iterations + num_extension_iterations"),
    "extension_steps": Row(40, "Hyperparameters.num_extension_iterations"),
    "stages": Row(3, "TRAINING_STAGES"),
    "batch_tokens": Row((131_072, 262_144, 393_216), "TRAINING_STAGES: batch_size"),
    "slices": Row(8, "grad_accum_steps = 8 // world_size"),
    "max_doc_len": Row((896, 2048), "TRAINING_STAGES: train_max_seq_len"),
    "window_short": Row((128, 384, 640, 768), "TRAINING_STAGES: window_sizes, in blocks of 128"),
    "window_long": Row((384, 896, 1408, 1664), "TRAINING_STAGES: window_sizes, in blocks of 128"),
    "window_final": Row(2560, "TrainingSchedule(ws_post_yarn_ext=20)"),
    "lr_mul": Row((1.0, 1.52, 1.73), "TRAINING_STAGES: lr_mul"),
    "warmup_steps": Row(0, "TrainingSchedule.get_lr"),
    "cooldown_frac": Row(0.6, "TrainingSchedule(cooldown_frac=)"),
    "lr_floor": Row(0.15, "TrainingSchedule.get_lr"),
    "mtp_weights": Row((1.0, 0.5, 0.25), "TRAINING_STAGES: mtp_weights_start and _end"),
    "prefix_weight": Row(0.0, OURS_ALONE), "head_rows": Row((0,), OURS_ALONE),
    "untie_stage": Row(2, "TrainingSchedule(split_embed_stage=)"),
    "untie_delay": Row(1, "TrainingSchedule.split_step: after Adam's first step of the stage"),
    # Model
    "num_layers": Row(11, "GPT(num_layers=)"),
    "model_dim": Row(768, "GPT(model_dim=)"),
    "head_dim": Row(128, "GPT(head_dim=)"),
    "mlp_ratio": Row(4, "GPT.__init__: mlp_hdim"),
    "long_layers": Row((3, 10), "GPT.forward: bm_sizes"),
    "no_attn_layers": Row((6,), "GPT.forward: bm_sizes"),
    "paired_layers": Row((0, 2, 5, 9), "GPT.paired_head_layers"),
    "pairing": Row("halves", "CausalSelfAttention.forward: view(B, T * 2, ...) pairs heads h and h + 3"),
    "late_attn_layers": Row((8, 9, 10), "GPT.forward: attn_in"),
    "cache_layer": Row(7, "GPT.forward: x_backout"),
    "backout": Row(True, "GPT.forward: backout_lambda"),
    "skip": Row((3, 6), "GPT.forward: skip_connection"),
    "key_offset": Row(True, "GPT.forward: key_offset"),
    "rope_base": Row(1024.0, "Yarn.reset"),
    "rope_fraction": Row(0.5, "Yarn.reset: channels in adjacent pairs", "the same",
                         "none: ours rotates halves, which renames channels"),
    "yarn": Row(True, "Yarn.apply"),
    "attn_scale": Row(0.1, "Yarn.reset"),
    "softcap": Row((23.0, 5.0, 7.5), "GPT.forward: logits"),
    "value_embed_layers": Row((1, 2, 8, 9, 10), "GPT.forward: ve"),
    "bigram_rows": Row(
        377_280, "Hyperparameters.bigram_vocab_size", 251_520, "a gain or nothing: record 85's table"),
    "bigram_signs": Row(True, OURS_ALONE, False, "a gain or nothing: record 83, 3.27917 instead of 3.27937"),
    "ngram_rows": Row(0, OURS_ALONE), "ngram_orders": Row((2, 3), OURS_ALONE),
    "smear": Row(True, "GPT.forward: smear_gate_out"),
    "attn_gate_layers": Row(ATTENTION_LAYERS, "GPT.attn_gate_bank"),
    "xsa_layers": Row((1, 3, 4, 7, 8, 10), "record 82, GPT.forward: xsa_layers_set"),
    "inject_x0": Row(True, "GPT.x0_lambdas"),
    "mudd": Row(False, OURS_ALONE), "gate_networks": Row((), OURS_ALONE), "mix_window": Row(0, OURS_ALONE),
    "mlp_fp8": Row("off", OURS_ALONE),
    "resid_init": Row(1.1, "GPT.resid_lambdas"),
    "head_std": Row(0.005, "GPT.lm_head"),
    "mlp_out_std": Row(0.0, "GPT.mlp_bank: c_proj"),
    # Optimizer
    "optimizer": Row("muon", "NorMuonAndAdam"),
    "muon_lr": Row(0.023, "TrainingManager: normuon_defaults"),
    "muon_wd": Row(1.2, "TrainingManager: normuon_defaults"),
    "mlp_out_lr_mul": Row(
        4.0, "NorMuonAndAdam._build_param_cfg: 2 for c_proj, times 2 for its shape as stored there"),
    "momentum": Row((0.85, 0.95), "get_muon_momentum"),
    "momentum_warmup": Row(300, "get_muon_momentum"),
    "momentum_cooldown": Row(50, "get_muon_momentum"),
    "normuon_beta2": Row(0.9, "TrainingManager: normuon_defaults"),
    "coefficients": Row("polar", "polar_express_coeffs"),
    "adam_lr": Row(0.008, "TrainingManager: adam_defaults"),
    "adam_wd": Row(0.005, "TrainingManager: adam_defaults"),
    "adam_eps": Row(1e-10, "TrainingManager: adam_defaults"),
    "adam_every": Row(2, "TrainingManager._is_adam_step"),
    "table_lr_mul": Row(75.0, "TrainingManager.param_table: value_embeds, bigram_embed"),
    "factor_adam": Row(
        (1.0, 0.9, 0.95), "TrainingManager.param_table: x0_lambdas, bigram_lambdas; record 82: xsa_alphas"),
    "cautious": Row(True, "NorMuonAndAdam: mask"),
    "adamw_lr": Row(0.001, OURS_ALONE), "adamw_wd": Row(0.1, OURS_ALONE),
    "adamw_out_lr_mul": Row(1.0, OURS_ALONE), "adamw_betas": Row((0.9, 0.95), OURS_ALONE),
    "ema_frac": Row(0.0, OURS_ALONE), "ema_blend": Row(0.7, OURS_ALONE), "ema_of": Row("all", OURS_ALONE),
}
RECORD_89 = {  # what --recipe=record89 changes; the places are those of record 89, commit f411b3d3
    "train_steps": Row(1285, "Hyperparameters.num_scheduled_iterations + num_extension_iterations"),
    "extension_steps": Row(15, "Hyperparameters.num_extension_iterations"),
    "prefix_weight": Row(0.25, "TRAINING_STAGES: prefix_weight_start and _end"),
    "mudd": Row(True, "GPT.init_mudd"),
    "backout": Row(False, "GPT.init_mudd: the second block begins with it"),
    "gate_networks": Row((0, 4), "GPT.init_mudd_gate, GPT.forward: the second is evaluated before layer 4"),
    "mix_window": Row(112, "CausalSelfAttention.forward: DC correction, GPT.dc_layers"),
    "attn_gate_layers": Row((3, 10), "GPT.attn_gate_layers"),
    "xsa_layers": Row((1, 3, 4, 7), "GPT.init_mudd_gate: layout of the gates"),
    "mlp_fp8": Row("auto", "GPT.forward: MLP, records 84 and 89"),
}
NO_MATHEMATICS = {"track", "recipe", "seed", "train_files", "val_files"}
FIRST_OF_THE_MACHINE = "attention"  # from this field of Config on, settings are of hardware and run

TABLE = "TrainingManager.param_table: "
SCALARS = TABLE + "scalars"
OPTIMIZERS = {  # parameter: Adam (factors of lr and of decay, betas), or Muon (factors of lr and of decay)
    "attn_qk": Row(("muon", 1, 1), TABLE + "qk_bank"),
    "attn_vo": Row(("muon", 1, 1), TABLE + "vo_bank"),
    "mlp_in": Row(("muon", 1, 2), TABLE + "mlp_bank; the shape doubles step and decay, ours the step only"),
    "mlp_out": Row(("muon", 4, 1), TABLE + "mlp_bank, _build_param_cfg: per_matrix_lr_mul"),
    "head": Row(("adam", 1, 150, (0.5, 0.95)), TABLE + "lm_head"),
    "embed": Row(("adam", 1, 150, (0.5, 0.95)), TABLE + "embed"),
    "value_embeds": Row(("adam", 75, 5, (0.75, 0.95)), TABLE + "value_embeds"),
    "bigram_embed": Row(("adam", 75, 5, (0.75, 0.95)), TABLE + "bigram_embed"),
    "resid_lambdas": Row(("adam", 5, 0, (0.9, 0.95)), TABLE + "resid_lambdas"),
    "post_lambdas": Row(("adam", 1, 0, (0.9, 0.95)), TABLE + "post_lambdas"),
    "attn_lambdas": Row(("adam", 5, 0, (0.9, 0.99)), SCALARS),
    "x0_lambdas": Row(("adam", 1, 0, (0.9, 0.95)), TABLE + "x0_lambdas"),
    "bigram_lambdas": Row(("adam", 1, 0, (0.9, 0.95)), TABLE + "bigram_lambdas"),
    "xsa_alphas": Row(("adam", 1, 0, (0.9, 0.95)), "record 82, " + TABLE + "xsa_alphas"),
    "smear_lambda": Row(("adam", 5, 0, (0.9, 0.99)), SCALARS),
    "skip_lambda": Row(("adam", 5, 0, (0.9, 0.99)), SCALARS),
    "backout_lambda": Row(("adam", 5, 0, (0.9, 0.99)), SCALARS),
    "smear_gate": Row(("adam", 0.01, 0, (0.9, 0.99)), TABLE + "smear_gate"),
    "skip_gate": Row(("adam", 0.05, 0, (0.9, 0.99)), TABLE + "skip_gate"),
    "value_gates": Row(("adam", 1, 1, (0.9, 0.99)), TABLE + "ve_gate_bank"),
    "attn_gates": Row(("adam", 1, 1, (0.9, 0.99)), TABLE + "attn_gate_bank"),
    "ngram_table": Row(("adam", 75, 0, (0.0, 0.95)), OURS_ALONE),
    # Of record 89 only
    "gate_in": Row(("adam", 0.1, 1, (0.9, 0.99)), TABLE + "mudd_gate_w1"),
    "gate_out": Row(("adam", 0.1, 1, (0.9, 0.99)), TABLE + "mudd_gate_w2"),
    "gate_bias": Row(("adam", 0.1, 0, (0.9, 0.99)), TABLE + "mudd_gate_b2"),
    "gate_scale": Row(("adam", 0.1, 0, (0.9, 0.99)), TABLE + "_mudd_gate_scale"),
    "mudd_in": Row(("adam", 0.25, 1, (0.9, 0.99)), TABLE + "mudd_w1"),
    "mudd_out": Row(("adam", 0.25, 1, (0.9, 0.99)), TABLE + "mudd_w2"),
    "mudd_bias": Row(("adam", 0.25, 0, (0.9, 0.99)), TABLE + "mudd_b2"),
}

STARTS = {  # parameter: its first values, normal or uniform with so much standard deviation, or all the same
    "attn_qk": Row(("uniform", 0.5 / math.sqrt(768)), "GPT.qk_bank"),
    "attn_vo": Row(("uniform", 0.5 / math.sqrt(768)), "GPT.vo_bank"),
    "mlp_in": Row(("uniform", 0.5 / math.sqrt(768)), "GPT.mlp_bank: c_fc"),
    "mlp_out": Row(("all", 0.0), "GPT.mlp_bank: c_proj"),
    "head": Row(("normal", 0.005), "GPT.lm_head"),
    "embed": Row(("normal", 0.005), "GPT.embed: lm_head's until they part"),
    "value_embeds": Row(("normal", 0.01), "GPT.value_embeds"),
    "bigram_embed": Row(("all", 0.0), "GPT.bigram_embed"),
    "resid_lambdas": Row(("all", math.sqrt(1.1)), "GPT.resid_lambdas"),
    "post_lambdas": Row(("all", 1.0), "GPT.post_lambdas"),
    "attn_lambdas": Row(("all", (0.5, 1.0)), "GPT.scalars: sa_lambdas"),
    "x0_lambdas": Row(("all", 0.0), "GPT.x0_lambdas"),
    "bigram_lambdas": Row(("all", 0.05), "GPT.bigram_lambdas"),
    "xsa_alphas": Row(("all", 0.0), "record 82, GPT.xsa_alphas"),
    "smear_lambda": Row(("all", 0.0), "GPT.scalars: smear_lambda"),
    "skip_lambda": Row(("all", -1.5), "GPT.scalars: skip_lambda"),
    "backout_lambda": Row(("all", 0.5), "GPT.scalars: backout_lambda"),
    "smear_gate": Row(("all", 0.0), "GPT.smear_gate"),
    "skip_gate": Row(("all", 0.0), "GPT.skip_gate"),
    "value_gates": Row(("all", 0.0), "GPT.ve_gate_bank"),
    "attn_gates": Row(("all", 0.0), "GPT.attn_gate_bank"),
}


def changed(name: str, found, row: Row) -> str:
    return f"{name}: expected {row.ours!r} as in its row ({row.where}), found {found!r}; change both together"


def test_every_setting_of_track_small_has_its_row_and_its_value():
    cfg = Config.for_track("small")
    names = [field.name for field in dataclasses.fields(cfg)]
    assert set(names[: names.index(FIRST_OF_THE_MACHINE)]) - NO_MATHEMATICS == set(SETTINGS)
    for name, row in SETTINGS.items():
        assert getattr(cfg, name) == row.ours, changed(name, getattr(cfg, name), row)


def test_every_parameter_has_its_row_and_its_optimizer():
    cfg, table = Config.for_track("small"), optimizer_table(Config.for_track("small"))
    assert set(table) == set(OPTIMIZERS)
    for name, row in OPTIMIZERS.items():
        found, (kind, lr, wd, *betas) = table[name], row.ours
        base_lr, base_wd = (cfg.muon_lr, cfg.muon_wd) if kind == "muon" else (cfg.adam_lr, cfg.adam_wd)
        decay = base_wd * wd * (cfg.muon_lr if kind == "muon" else base_lr * lr)
        assert (found.optimizer, found.wd_follows_lr) == (kind, True), changed(name, found, row)
        assert math.isclose(found.lr, base_lr * lr), changed(name, found, row)
        assert math.isclose(found.wd, decay), changed(name, found, row)
        assert [found.betas] == betas or kind == "muon", changed(name, found, row)


def test_the_recipe_of_record_89_changes_what_its_rows_say_and_nothing_else():
    base, other = (dataclasses.asdict(Config.for_track("small", recipe=name))
                   for name in ("base", "record89"))
    different = {name for name in base if base[name] != other[name]} - {"recipe"}
    assert different == set(RECORD_89)
    for name, row in RECORD_89.items():
        assert other[name] == row.ours, changed(name, other[name], row)


def test_tokens_and_learning_rates_of_record_89_are_the_record_s():
    """55.4, 111.1, 166.3 and 5.9 M tokens in stages of 423, 424, 423 and 15 steps; ours have 424, 422, 424
    and 15."""
    cfg = Config.for_track("small", recipe="record89")
    theirs = 423 * 131_072 + 424 * 262_144 + 438 * 393_216
    assert theirs == 338_821_120 and abs(cfg.train_tokens / theirs - 1) < 1e-12
    assert cfg.stage_starts == (0, 424, 846, 1270)
    assert [cfg.untie_step, int(1270 * (1 - cfg.cooldown_frac))] == [848, 508]
    assert learning_rate(cfg, 508) == 1.52 and learning_rate(cfg, 845) > 0.91


def test_the_rows_differ_from_the_record_only_where_they_say_what_that_does():
    for name, row in SETTINGS.items():
        assert row.theirs == "the same" or row.effect, name
    differing = {name for name, row in SETTINGS.items() if row.theirs != "the same"}
    assert differing == {"bigram_rows", "bigram_signs"}
    assert all(row.theirs == "the same" for row in OPTIMIZERS.values())
    assert all(row.theirs == "the same" for row in RECORD_89.values())


def test_the_code_of_each_further_difference_is_there():
    page = (ROOT / "docs/differences.md").read_text(encoding="utf-8")
    places = re.findall(r"`([\w.]+)` \|$", page, re.M)
    assert len(places) == page.count("\n| ") - 2  # with the heads of two tables
    for place in places:
        assert (ROOT / place).is_file() or pkgutil.resolve_name(place) is not None


def test_every_parameter_has_its_row_and_starts_as_it_says():
    """The rows give standard deviations at a width of 768, which those of the matrices follow."""
    width = 128
    model = build(config(model_dim=width, vocab_size=512, head_dim=16), perturb=False)
    assert set(STARTS) == {name for name, _ in model.named_parameters()}
    for name, row in STARTS.items():
        weights, (kind, value) = getattr(model, name), row.ours
        if kind == "all":
            assert torch.allclose(weights, torch.tensor(value)), changed(name, weights, row)
            continue
        std = value * math.sqrt(768 / width) if kind == "uniform" else value
        bound = math.sqrt(3) * std if kind == "uniform" else 6 * std
        found = weights.abs().max().item(), weights.std().item()
        assert found[0] <= bound and abs(found[1] / std - 1) < 0.01, changed(name, found, row)
    assert torch.equal(model.head, model.embed)


def test_a_slice_s_loss_is_the_sum_over_its_tokens():
    """The record sums so. The same document twice costs twice as much, but for what its first token sees."""
    model = build(config())
    tokens = torch.randint(0, model.cfg.bos_id, (17,), generator=torch.Generator().manual_seed(0))

    def loss(times: int) -> float:
        ctx = model.context(docs_of([16] * times), 0)
        return model(tokens[:-1].repeat(times), tokens[1:].repeat(times), ctx, torch.ones(1)).item()

    assert loss(2) == pytest.approx(2 * loss(1), rel=0.05)


def test_tokens_and_learning_rates_of_the_whole_run_are_the_record_s():
    """393.22 M tokens; the factors of the learning rate add up to 1382."""
    cfg = Config.for_track("small")
    assert cfg.train_tokens == 480 * 131_072 + 480 * 262_144 + 520 * 393_216 == 393_216_000
    assert sum(learning_rate(cfg, step) for step in range(1480)) == pytest.approx(1382, abs=0.5)
