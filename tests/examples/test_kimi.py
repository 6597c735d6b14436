"""examples/kimi.py at tiny size: what it prints, its clip, its experts, 1 and 2 ranks, bad settings."""
import contextlib
import io
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from data import shakespeare
from data.errors import run_program
from data.files import ROOT
from data.shards import write_shard
from examples import kimi
from tests.helpers.dist import run_ranks

TINY = ["--steps=12", "--sequences=4", "--lr=0.03"]
EXACT = ["--steps=6", "--exact", "--clip=1"]
NUMBERS = re.compile(r"(\w+):(-?[\d.]+)")


def trained(folder, *options):
    """Return what a training on a made-up text prints: {name: numbers in order}."""
    text = np.random.default_rng(0).choice(np.arange(97, 105), 4000).repeat(2)
    with pytest.MonkeyPatch.context() as patch:
        for name in (shakespeare.TRAIN, shakespeare.VAL):
            write_shard(folder / name, text)
        patch.setattr(shakespeare, "ensure", lambda: folder)
        patch.setattr(kimi, "VAL_SEQUENCES", 8)
        patch.setattr(kimi, "PRINT_EVERY", 6)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            kimi.main([*TINY, *options])
    found = {}
    for name, number in NUMBERS.findall(out.getvalue()):
        found.setdefault(name, []).append(float(number))
    return found


def trained_on_a_rank(rank, world, folder):
    return trained(folder / str(rank), *EXACT)


def test_it_learns_and_the_clip_holds_the_logits(tmp_path):
    free = trained(tmp_path, "--clip=off")
    held = trained(tmp_path, "--clip=2")
    for found in (free, held):
        assert found["step"] == [6, 12] and found["loss"][1] < found["loss"][0]
        assert found["val_loss"][0] < found["loss"][0]
        assert all(busiest >= 1 >= idlest for busiest, idlest in zip(found["busiest"], found["idlest"]))
    assert free["clipped"] == [0, 0] and held["clipped"][1] > 0
    assert held["logit"][1] < free["logit"][1]


def test_two_ranks_train_as_one_does(tmp_path):
    alone = trained(tmp_path, *EXACT)
    first, second = run_ranks(2, trained_on_a_rank, tmp_path)
    assert second == {} and alone["clipped"][0] > 0
    for name in ("loss", "logit", "clipped", "busiest", "idlest", "val_loss"):
        assert first[name] == pytest.approx(alone[name], abs=1e-4), name


def test_adamw_moves_all_of_it(tmp_path):
    found = trained(tmp_path, "--optimizer=adamw", "--lr=0.003")
    assert found["loss"][1] < found["loss"][0]


def test_attention_sees_no_later_token_and_returns_the_log_sum_exp_of_its_logits():
    torch.manual_seed(0)
    model = kimi.Kimi()
    tokens = torch.randint(kimi.VOCABULARY, (2, 12))
    other = tokens.clone()
    other[:, 7:] += 1
    _, lses = model(tokens)
    _, changed = model(other)
    for a, b in zip(lses, changed):
        assert torch.equal(a[..., :7], b[..., :7]) and not torch.equal(a[..., 7:], b[..., 7:])
    model.blocks[0].attention.q_up.weight.data.zero_()  # all logits are 0: the log of the number of keys
    _, lses = model(tokens)
    torch.testing.assert_close(lses[0], torch.arange(1, 12).log().expand(2, kimi.H, -1))


def test_balance_favours_idle_experts_and_counts_anew():
    model = kimi.Kimi()
    model.blocks[1].mlp.load[:] = torch.tensor([9.0, 1, 5, 5, 5, 5, 5, 5])
    load = kimi.balance(model)
    assert load[0, 0] == 9 and load.shape == (kimi.L - 1, kimi.E)
    up, down = kimi.BALANCE_RATE, -kimi.BALANCE_RATE
    torch.testing.assert_close(model.blocks[1].mlp.bias, torch.tensor([down, up, 0, 0, 0, 0, 0, 0]))
    assert (model.blocks[1].mlp.load == 0).all() and (model.blocks[2].mlp.bias == 0).all()


def test_routers_are_all_that_split_params_calls_routers():
    kinds = kimi.split_params(kimi.Kimi(), verbose=False)
    names = [name for name, _ in kinds[1]]
    assert names == ["embedding.weight", *(f"blocks.{k}.mlp.router.weight" for k in (1, 2)), "head.weight"]


def test_a_jump_of_the_loss_is_counted():
    watch = kimi.Watch()
    nothing = torch.zeros(kimi.L, kimi.H)
    for step in range(50):
        loss = 2 + 0.01 * (step % 3) + (step == 40)
        watch.note(loss, nothing, nothing.bool(), torch.ones(kimi.L - 1, kimi.E))
    assert watch.spikes == 1 and watch.line().endswith("spikes:1")


@pytest.mark.parametrize("option, sentence", [
    ("--lr=0", "expected --lr above 0, found 0.0; change the command"),
    ("--lr=nan", "expected --lr above 0, found nan; change the command"),
    ("--clip=-3", "expected --clip above 0, or off, found -3.0; change the command"),
    ("--steps=0", "expected --steps of 1 or more, found 0; change the command"),
    ("--sequences=0", "expected --sequences to be shared by 1 ranks, found 0; change the command")])
def test_bad_settings_end_in_a_sentence(option, sentence, capsys):
    assert run_program(kimi.main, [option], "kimi.py") == 2
    assert capsys.readouterr().err == f"kimi.py: {sentence}\n"


def test_as_a_script_it_finds_its_modules_and_refuses_what_is_no_number():
    command = [sys.executable, "examples/kimi.py", "--clip=none"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 2
    last = child.stderr.splitlines()[-1]
    assert last == "kimi.py: error: argument --clip: expected a number or off, found none"


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    code = run_program(lambda argv: trained(tmp_path, *argv), ["--optimizer=adamw", "--lr=1e38"], "kimi.py")
    assert code == 1
    sentence = r"kimi.py: step \d+: expected a finite loss, found (nan|inf); lower --lr\n"
    assert re.fullmatch(sentence, capsys.readouterr().err)


def test_more_ranks_than_share_the_sequences_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert run_program(kimi.main, ["--sequences=32"], "kimi.py") == 2
    assert "expected --sequences to be shared by 3 ranks, found 32" in capsys.readouterr().err
