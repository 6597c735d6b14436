"""Config and its flags: every field is one, and what cannot work is refused by name."""
import dataclasses
import math
import re

import pytest

from data.errors import UsageError
from data.loader import shards_needed
from engine.settings import show_value
from records import tracks
from tests.helpers.tiny import config
from train_gpt import TRACKS, Config, parse_config

FIELDS = dataclasses.fields(Config)
NUM_LAYERS = config().num_layers


@pytest.mark.parametrize("track", TRACKS)
def test_every_field_is_a_flag_that_reads_back_what_is_shown(track):
    cfg = Config.for_track(track)
    options, changes = parse_config([f"--{f.name}={show_value(getattr(cfg, f.name))}" for f in FIELDS])
    assert cfg.track == track and changes == dataclasses.asdict(cfg) and Config(**changes) == cfg
    assert all(type(changes[f.name]) is type(getattr(cfg, f.name)) for f in FIELDS)
    assert options.resume is None and options.check is False


@pytest.mark.parametrize("flags, changes", [
    ("", {}), ("--train_steps 12", {"train_steps": 12}), ("--paired_layers=", {"paired_layers": ()}),
    ("--smear=on", {"smear": True}), ("--smear=1", {"smear": True}), ("--smear=False", {"smear": False})])
def test_flags_read_common_words_and_change_nothing_else(flags, changes):
    assert parse_config(flags.split())[1] == changes


def test_a_path_below_home_is_found_there(monkeypatch):
    """In --name=~/path the shell leaves it as it is, and a folder with the name ~ would be made."""
    monkeypatch.setenv("HOME", "/home/somebody")
    assert parse_config(["--log_dir=~/logs"])[1] == {"log_dir": "/home/somebody/logs"}


@pytest.mark.parametrize("track", TRACKS)
def test_tokens_are_summed_up_by_stage_however_many_steps_there_are(track):
    cfg = Config.for_track(track)
    assert cfg.train_tokens == sum(cfg.at("batch_tokens", step) for step in range(cfg.train_steps))
    endless = Config.for_track(track, train_steps=10**15)  # step by step it would take years
    assert endless.train_tokens > 10**15 and shards_needed(endless) > 10**6


def test_help_lists_every_field_with_its_meaning_and_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_config(["--help"])
    out, err = capsys.readouterr()
    assert err == ""
    assert re.match(r"usage: .+ \[--name=value \.\.\.\]\n\n", out)  # not a hundred flags in a row
    text = "".join(out.split())  # lines break at hyphens too
    for f in FIELDS:
        line = f"--{f.name} VALUE {f.metadata['help']} [{show_value(f.default)}]"
        assert "".join(line.split()) in text, f.name


POSITIVE = [
    "train_steps", "stages", "slices", "num_layers", "model_dim", "head_dim", "mlp_ratio", "val_every",
    "val_tokens", "val_slice", "adam_every", "max_epochs", "vocab_size", "window_final", "rope_base",
    "attn_scale"]
NOT_NEGATIVE = [
    "extension_steps", "warmup_steps", "momentum_warmup", "momentum_cooldown", "save_every", "keep", "seed",
    "bigram_rows", "ngram_rows", "split_docs", "adam_wd", "muon_wd", "adamw_wd", "lr_floor", "muon_lr",
    "adam_lr", "adamw_lr", "adamw_out_lr_mul", "adam_eps", "mlp_out_lr_mul", "table_lr_mul", "head_std",
    "resid_init", "ema_frac", "ema_blend", "prefix_weight", "mlp_out_std", "mix_window"]
BY_STAGE = ["batch_tokens", "max_doc_len", "window_short", "window_long", "lr_mul", "mtp_weights"]
LAYERS = [
    "long_layers", "no_attn_layers", "paired_layers", "late_attn_layers", "value_embed_layers",
    "attn_gate_layers", "xsa_layers", "skip", "gate_networks"]
OTHERS = {  # name -> values that are refused, of a reason of their own
    "lr_mul": [(1.0, math.inf)],
    "batch_tokens": [(65,), (64, 95)],
    "val_tokens": [65],
    "extension_steps": [14],
    "model_dim": [36],
    "head_dim": [2],
    "bos_id": [-1, 257],
    "vocab_size": [65_537],
    "cache_layer": [NUM_LAYERS, 4],  # 4: later than a layer that reads it
    "late_attn_layers": [(3, 5)],  # not later than the cached layer
    "no_attn_layers": [tuple(range(NUM_LAYERS))],
    "skip": [(3,), (2, 1), (0, 1, 2)],
    "softcap": [(1.0,), (23.0, 5.0, 0.0)],
    "momentum": [(0.9,), (0.9, 1.0)],
    "adamw_betas": [(0.9, 1.0)],
    "cooldown_frac": [1.1],
    "rope_fraction": [-0.1],
    "head_rows": [(), (0, -128), (1,), (127,), (384,)],  # of 257 tokens
    "untie_stage": [3, -2],
    "normuon_beta2": [1.0],
    "optimizer": ["sgd"],
    "attention": ["flash"],
    "dtype": ["float16"],
    "compile": ["yes"],
    "coefficients": ["best"],
    "ema_of": ["tables"],
    "ngram_orders": [(), (1, 2), (3, 2), (2, 2), (2, 9)],
    "gate_networks": [(1,), (0, 2, 2)],
    "mix_window": [4],  # without networks that set its weights
}
REFUSED = [
    *[(name, 0) for name in POSITIVE],
    *[(name, -1) for name in POSITIVE + NOT_NEGATIVE],
    *[(name, value) for name in BY_STAGE for value in ((), (0,))],
    *[(name, value) for name in LAYERS for value in ((NUM_LAYERS,), (-1,))],
    *[(name, math.nan) for name in ("target_loss", "muon_lr", "adam_lr", "attn_scale")],
    *[(name, value) for name, values in OTHERS.items() for value in values],
]
RELATED = {"model_dim": {"head_dim"}, "val_slice": {"val_tokens"}, "slices": {"batch_tokens"},
           "vocab_size": {"bos_id"}, "cache_layer": {"late_attn_layers"}, "num_layers": set(LAYERS)}


@pytest.mark.parametrize("name, value", REFUSED, ids=str)
def test_an_impossible_setting_is_refused_by_name_with_what_was_found(name, value):
    with pytest.raises(UsageError) as error:
        config(**{name: value})
    told = re.fullmatch(r"--(\w+): expected .+, found (.+); see --help", str(error.value))
    assert told[1] == name or told[1] in RELATED[name]
    if told[1] == name:
        assert told[2] == repr(value)


@pytest.mark.parametrize("changes, refused", [
    (dict(mudd=True), "backout"),
    (dict(mudd=True, backout=False, no_attn_layers=(5,)), "mudd"),
    (dict(mudd=True, backout=False, cache_layer=5, late_attn_layers=()), "mudd"),
    (dict(gate_networks=(0,), mix_window=4, paired_layers=(5,)), "mix_window"),
    (dict(model_dim=24, paired_layers=(1,)), "paired_layers"),  # an odd number of heads
    (dict(ngram_rows=50, bigram_rows=0), "ngram_rows"),
    (dict(head_rows=(0, 128), pack_tokens=64), "head_rows"),
], ids=str)
def test_settings_that_do_not_go_together_are_refused(changes, refused):
    with pytest.raises(UsageError, match=f"--{refused}: expected "):
        config(**changes)


def test_a_recipe_changes_its_track_and_settings_change_the_recipe():
    base, other = (Config.for_track("small", recipe=name) for name in ("base", "record89"))
    assert base == Config.for_track("small") and other.train_steps == 1285 and other.muon_lr == base.muon_lr
    assert Config.for_track("small", recipe="record89", train_steps=1300).train_steps == 1300
    assert Config.for_track(**dataclasses.asdict(other)) == other  # from a checkpoint


@pytest.mark.parametrize("track, recipe, known", [
    ("small", "record90", "base, record89"), ("medium", "record89", "base"),
    ("shakespeare", "record89", "base, miniature")])
def test_an_unknown_recipe_is_refused_with_the_known_ones(track, recipe, known):
    message = f"--recipe: expected one of {known} on track {track}, found '{recipe}'"
    with pytest.raises(UsageError, match=message):
        Config.for_track(track, recipe=recipe)


def test_the_vocabulary_is_padded_to_a_multiple_of_128():
    sizes = [config(vocab_size=v, bos_id=0).padded_vocab for v in (61, 128, 129, 50_257)]
    assert sizes == [128, 128, 256, 50_304]


@pytest.mark.parametrize("name", TRACKS)
def test_records_are_judged_by_what_the_trainer_aims_at(name):
    track, cfg = tracks.TRACKS[name], Config.for_track(name)
    assert (track.target, track.val_tokens) == (cfg.target_loss, cfg.val_tokens)
