"""examples/kimi.py at tiny size: what it prints, its clip, its experts, 1 and 2 ranks, bad settings."""
import contextlib
import io
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import shakespeare
from data.errors import RunError, UsageError
from data.shards import write_shard
from engine.endings import report
from examples import kimi
from tests.helpers.commands import python
from tests.helpers.dist import run_ranks

TINY = ["--steps=12", "--lr=0.06"]
CLIPPED = ["--clip=5"]  # above ln T, the log-sum-exp of equal logits
ALONE = SimpleNamespace(sum=lambda tensor: tensor)
NUMBERS = re.compile(r"(\w+):(-?[\d.]+)")


def trained(folder, *options):
    """Return what a training on a made-up text prints: {name: numbers in order}."""
    text = np.random.default_rng(0).choice(np.arange(97, 105), 4000).repeat(2)
    with pytest.MonkeyPatch.context() as patch:
        for name in (shakespeare.TRAIN, shakespeare.VAL):
            write_shard(folder / name, text)
        patch.setattr(shakespeare, "ensure", lambda: folder)
        patch.setattr(kimi, "VAL_SEQUENCES", 8)
        patch.setattr(kimi, "SEQUENCES", 2)
        patch.setattr(kimi, "PRINT_EVERY", 6)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            kimi.main([*TINY, *options])
    found = {}
    for name, number in NUMBERS.findall(out.getvalue()):
        found.setdefault(name, []).append(float(number))
    return found


def trained_on_a_rank(rank, world, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "", "MASTER_PORT": ""}
    return trained(folder / str(rank), *CLIPPED)


def test_it_learns_and_the_clip_holds_the_logits(tmp_path):
    free = trained(tmp_path, "--clip=0")
    held = trained(tmp_path, *CLIPPED)
    for found in (free, held):
        assert found["step"] == [6, 12] and found["loss"][1] < found["loss"][0]
        assert found["val_loss"][0] < found["loss"][0]
        assert all(busiest >= 1 >= idlest for busiest, idlest in zip(found["busiest"], found["idlest"]))
    assert free["clipped"] == [0, 0] and held["clipped"][1] > 0
    assert held["logit"][1] < free["logit"][1]  # so near ln T a log-sum-exp scales by less than gamma


def test_two_ranks_train_as_one_does_to_the_last_digit(tmp_path):
    alone = trained(tmp_path, *CLIPPED)
    first, second = run_ranks(2, trained_on_a_rank, tmp_path)
    assert second == {} and alone["clipped"][1] > 0
    for name in ("loss", "logit", "clipped", "busiest", "idlest", "val_loss"):
        assert first[name] == alone[name], name


def test_adamw_moves_all_of_it(tmp_path):
    found = trained(tmp_path, "--optimizer=adamw", "--lr=0.003", "--clip=0")
    assert found["loss"][1] < found["loss"][0]


def test_attention_sees_no_later_token_and_returns_the_log_sum_exp_of_its_logits():
    torch.manual_seed(0)
    attention = kimi.Attention()
    x = torch.randn(2, 12, kimi.C)
    other = x.clone()
    other[:, 7:] += 1
    for a, b in zip(attention(x), attention(other)):  # y (B, T, C) and lse (B, H, T)
        time = 1 if a.ndim == 3 and a.size(1) == 12 else 2
        assert torch.equal(a.narrow(time, 0, 7), b.narrow(time, 0, 7))
        assert not torch.equal(a.narrow(time, 7, 5), b.narrow(time, 7, 5))
    attention.q_up.weight.data.zero_()  # all logits are 0: the log of the number of keys
    torch.testing.assert_close(attention(x)[1], torch.arange(1, 13).log().expand(2, kimi.H, -1))


def test_balance_favours_idle_experts_and_counts_anew():
    mixture = kimi.Mixture()
    mixture.load[:] = torch.tensor([9.0, 1, 5, 5, 5, 5, 5, 5])
    share = mixture.balance(ALONE)
    torch.testing.assert_close(share, torch.tensor([1.8, 0.2, 1, 1, 1, 1, 1, 1]))
    up, down = kimi.BALANCE_RATE, -kimi.BALANCE_RATE
    torch.testing.assert_close(mixture.bias, torch.tensor([down, up, 0, 0, 0, 0, 0, 0]))
    assert (mixture.load == 0).all()


def test_a_mixture_counts_the_tokens_that_it_learns_from_alone():
    mixture = kimi.Mixture()
    x = torch.randn(2, 12, kimi.C)
    with torch.no_grad():
        mixture(x)
    assert mixture.load.sum() == 0
    mixture(x)
    assert mixture.load.sum() == 2 * 12 * kimi.TOP


def test_routers_are_all_that_split_params_calls_routers():
    kinds = kimi.split_params(kimi.Kimi(), verbose=False)
    names = [name for name, _ in kinds[1]]
    assert names == ["embedding.weight", *(f"blocks.{k}.mlp.router.weight" for k in (1, 2)), "head.weight"]


def test_a_jump_of_the_loss_is_counted():
    losses = [2 + 0.01 * (step % 3) + (step == 40) for step in range(50)]
    assert [step for step in range(50) if kimi.jumped(losses[:step + 1])] == [40]


@pytest.mark.parametrize("option, sentence", [
    ("--lr=nan", "--lr: expected finite numbers, found nan; see --help"),
    ("--clip=-3", "--clip: expected zero or more, found -3.0; see --help"),
    ("--steps=0", "--steps: expected a positive number, found 0; see --help"),
    ("--micro_batches=0", "--micro_batches: expected a positive number, found 0; see --help")])
def test_bad_settings_end_in_a_sentence(option, sentence, capsys):
    assert report(kimi.main, [option], "kimi.py") == 2
    assert capsys.readouterr().err == f"kimi.py: {sentence}\n"


def test_as_a_script_it_finds_its_modules():
    child = python("examples/kimi.py", "--optimizer=sgd")
    assert child.returncode == 2
    assert child.stderr == "kimi.py: --optimizer: expected one of muon, adamw, found 'sgd'; see --help\n"


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(RunError, match=r"step \d+: expected a finite loss, found (nan|inf); lower --lr"):
        trained(tmp_path, "--optimizer=adamw", "--lr=1e38", "--clip=0")


def test_more_ranks_than_share_the_micro_batches_are_refused(monkeypatch):
    monkeypatch.setattr(kimi, "Runtime", lambda cpu: SimpleNamespace(world=3))
    with pytest.raises(UsageError, match="micro_batches: expected a multiple of the 3 ranks, found 2"):
        kimi.main([])
