"""Config and its flags: every field is one, and what cannot work is refused by name."""
import dataclasses
import math
import re
import subprocess
import sys

import pytest

from data.errors import UsageError
from engine.log import ROOT
from tests.helpers.tiny import config
from train_gpt import TRACKS, Config, parse_config

FIELDS = dataclasses.fields(Config)


@pytest.mark.parametrize("track", TRACKS)
def test_a_preset_is_valid_and_knows_its_name(track):
    assert Config.for_track(track).track == track
    assert Config.for_track(track, train_steps=77).train_steps == 77


def test_the_presets_name_only_fields_and_carry_values_of_their_types():
    for preset in TRACKS.values():
        for name, value in preset.items():
            assert type(value) is type(getattr(Config, name)), name


def test_every_field_is_annotated_explained_and_of_its_type():
    annotated = set(Config.__annotations__)
    assert annotated == {f.name for f in FIELDS}
    for f in FIELDS:
        assert len(f.metadata["help"]) >= 8 and isinstance(f.default, getattr(f.type, "__origin__", f.type)), f.name


def text_of(value):
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("track", TRACKS)
def test_every_field_is_a_flag_that_reads_back_what_str_writes(track):
    cfg = Config.for_track(track)
    options, changes = parse_config([f"--{f.name}={text_of(getattr(cfg, f.name))}" for f in FIELDS])
    assert changes == dataclasses.asdict(cfg) and Config(**changes) == cfg
    assert all(type(changes[f.name]) is type(getattr(cfg, f.name)) for f in FIELDS)
    assert options.resume is None and options.check is False


def test_a_flag_and_its_value_may_be_two_words_and_nothing_else_changes():
    assert parse_config(["--train_steps", "12"])[1] == {"train_steps": 12}
    assert parse_config([])[1] == {}


@pytest.mark.parametrize("text, value", [("true", True), ("1", True), ("on", True), ("False", False), ("0", False),
                                         ("off", False)])
def test_switches_read_common_words(text, value):
    assert parse_config([f"--smear={text}"])[1] == {"smear": value}


def test_an_empty_value_is_an_empty_tuple():
    assert parse_config(["--paired_layers=", "--softcap="])[1] == {"paired_layers": (), "softcap": ()}


@pytest.mark.parametrize("argv, names", [
    (["--train_step=3"], ["--train_step=3", "--train_steps?"]),
    (["--muonlr=3"], ["--muonlr=3", "--muon_lr?"]),
    (["--zzzz"], ["--zzzz"]),
    (["stray"], ["stray"]),
    (["--train_steps=many"], ["--train_steps", "many", "1480"]),
    (["--train_steps=1.5"], ["--train_steps", "1.5"]),
    (["--window_long=1,b"], ["--window_long", "1,b"]),
    (["--smear=perhaps"], ["--smear", "perhaps"]),
    (["--train_steps"], ["--train_steps"]),
    (["--resume"], ["--resume"]),
], ids=str)
def test_an_unknown_or_malformed_flag_is_refused_by_name(argv, names):
    with pytest.raises(UsageError) as error:
        parse_config(argv)
    assert all(name in str(error.value) for name in names) and "expected" in str(error.value)


POSITIVE = ("train_steps", "stages", "slices", "num_layers", "model_dim", "head_dim", "mlp_ratio", "val_every",
            "val_tokens", "val_slice", "adam_every", "max_epochs", "vocab_size", "window_final", "rope_base",
            "attn_scale")
NOT_NEGATIVE = ("extension_steps", "warmup_steps", "momentum_warmup", "momentum_cooldown", "save_every", "seed",
                "bigram_rows", "split_docs", "adam_wd", "muon_wd", "adamw_wd", "lr_floor", "muon_lr", "adam_lr",
                "adamw_lr", "adam_eps", "mlp_out_lr_mul", "table_lr_mul", "head_std", "resid_init", "prefix_weight", "mlp_out_std",
                "mix_window")
BY_STAGE = ("batch_tokens", "max_doc_len", "window_short", "window_long", "lr_mul", "mtp_weights")
LAYERS = ("long_layers", "no_attn_layers", "paired_layers", "late_attn_layers", "value_embed_layers",
          "attn_gate_layers", "xsa_layers", "skip", "gate_networks")
REFUSED = [
    *[{name: value} for name in POSITIVE for value in (0, -1)], *[{name: -1} for name in NOT_NEGATIVE],
    *[{name: value} for name in BY_STAGE for value in ((), (0,))],
    *[{name: value} for name in LAYERS for value in ((11,), (-1,))],
    *[{name: math.nan} for name in ("target_loss", "muon_lr", "adam_lr", "attn_scale")], dict(lr_mul=(1.0, math.inf)),
    dict(batch_tokens=(65,)), dict(batch_tokens=(64, 95)), dict(val_tokens=65), dict(extension_steps=14),
    dict(model_dim=36), dict(head_dim=6, model_dim=36), dict(paired_layers=(1,), model_dim=24),
    dict(bos_id=61), dict(bos_id=-1), dict(vocab_size=65_537), dict(cache_layer=11), dict(cache_layer=8),
    dict(late_attn_layers=(7, 8)), dict(no_attn_layers=tuple(range(11))),
    dict(skip=(3,)), dict(skip=(6, 3)), dict(skip=(1, 2, 3)), dict(softcap=(1.0,)), dict(softcap=(23.0, 5.0, 0.0)),
    dict(momentum=(0.9,)), dict(momentum=(0.9, 1.0)), dict(cooldown_frac=1.1), dict(rope_fraction=-0.1),
    dict(untie_stage=3), dict(untie_stage=-2), dict(normuon_beta2=1.0), dict(optimizer="sgd"), dict(attention="flash"),
    dict(dtype="float16"), dict(compile="yes"), dict(coefficients="best"), dict(ema_of="tables"),
    dict(gate_networks=(1,)), dict(gate_networks=(0, 4, 4)), dict(backout=True, mudd=True),
    dict(mudd=True, backout=False, no_attn_layers=(10,)),
    dict(mudd=True, backout=False, cache_layer=10, late_attn_layers=()),
    dict(mix_window=4), dict(mix_window=4, gate_networks=(0,), paired_layers=(10,)),
]


@pytest.mark.parametrize("changes", REFUSED, ids=str)
def test_an_impossible_setting_is_refused_by_name_with_what_was_found(changes):
    with pytest.raises(UsageError, match=r"^--\w+: expected .+, found .+; see --help$") as error:
        config(**changes)
    named = re.match(r"--(\w+): expected .*, found (.*); see --help", str(error.value))
    related = {"batch_tokens", "late_attn_layers", "val_tokens", "head_dim", "model_dim", "paired_layers"}
    assert named[1] in {*changes, *related}
    if named[1] in changes:
        assert named[2] == repr(changes[named[1]])


def test_an_unknown_track_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="--track: expected one of small, medium, shakespeare, found 'large'"):
        Config.for_track("large")


def test_a_recipe_changes_its_track_and_settings_change_the_recipe():
    base, other = (Config.for_track("small", recipe=name) for name in ("base", "record89"))
    assert base == Config.for_track("small") and other.train_steps == 1285 and other.muon_lr == base.muon_lr
    assert Config.for_track("small", recipe="record89", train_steps=1300).train_steps == 1300
    assert Config.for_track(**dataclasses.asdict(other) | {"name": "small"}) == other  # as a checkpoint has it


@pytest.mark.parametrize("track, recipe", [("small", "record90"), ("medium", "record89"), ("shakespeare", "record89")])
def test_an_unknown_recipe_is_refused_with_the_known_ones(track, recipe):
    known = "base, record89" if track == "small" else "base"
    with pytest.raises(UsageError, match=f"--recipe: expected one of {known} on track {track}, found '{recipe}'"):
        Config.for_track(track, recipe=recipe)


def test_the_vocabulary_is_padded_to_a_multiple_of_128():
    assert [config(vocab_size=v).padded_vocab for v in (61, 128, 129, 50_257)] == [128, 128, 256, 50_304]


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().train_steps = 3


def test_help_lists_every_field_with_its_meaning_and_default():
    command = [sys.executable, "train_gpt.py", "--help"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    text = "".join(out.stdout.split())  # lines break at hyphens too
    assert out.returncode == 0 and out.stderr == ""
    for f in FIELDS:
        line = f"--{f.name} VALUE {f.metadata['help']} [{text_of(f.default)}]"
        assert "".join(line.split()) in text, f.name
