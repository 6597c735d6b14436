"""Runs from end to end: a tiny model learns, and neither the number of ranks nor how they were started
changes anything."""
import math
import re

import pytest
import torch

import train_gpt
from data.errors import UsageError
from data.shards import open_shard
from engine import attention
from tests.helpers.dist import run_ranks
from tests.helpers.runs import config, on_rank, run, start, step_lines

# Few rows of the bigram table would be too small for Adam to shard.
OPTIONS = ["--save_final=1", "--adam_every=2", "--train_steps=8", "--bigram_rows=2048"]


@pytest.fixture(scope="module")
def alone(folder):
    """The run of one process that others are compared with."""
    result = run(folder, *OPTIONS)
    assert (result.code, result.err) == (0, "")
    return result


def test_a_run_learns_and_ends_with_a_summary_of_three_lines(alone):
    assert abs(alone.val[0] - math.log(257)) < 0.5  # nothing known yet; the softcap's offset adds a little
    assert alone.val[8] < alone.val[0] - 0.5
    first, *_, target, reached, last = alone.out.splitlines()
    assert target == "target: validation loss 1.6 (track shakespeare)"
    assert reached == "reached: no"
    assert last == f"log: {first}"


def test_the_loss_is_told_in_bits_per_byte_too(folder, alone):
    bits, = re.findall(r"^bits per byte: ([\d.]+)$", alone.out, re.M)
    tokens = open_shard(folder / "data/shakespeare/shakespeare_val_000000.bin")[1:1025]
    share = (tokens < 256).mean()  # the others start documents
    assert float(bits) == pytest.approx(alone.val[8] / math.log(2) / share, abs=1e-4)


# ------------------------------------------------------------------------------------------------------------
# Ranks


def state_of(result) -> dict:
    """All float tensors of the run's checkpoint by name: weights, and both optimizers' states."""
    state = torch.load(result.checkpoints[-1], weights_only=True)
    tensors = dict(state["model"])
    for i, one in enumerate(state["adam"]):
        tensors.update({f"adam {i} {key}": value for key, value in one.items()})
    for i, one in state["muon"].items():
        tensors.update({f"muon {i} {key}": value for key, value in one.items()})
    return {name: x for name, x in tensors.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}


@pytest.mark.parametrize("world", [2, 8])
def test_every_world_size_trains_the_same_model(folder, alone, world):
    """World size 1 accumulates 8 slices, 8 ranks have one each. They differ in the order of fp32 sums only.

    The tolerances are ten times and more what was measured: 1e-6 in losses, 4e-6 of the norm in states. A
    gradient that is a sum where it should be a mean changes no loss, because Adam and Muon normalize, but the
    optimizers' states by a factor of the world size.
    """
    ranks = run_ranks(world, on_rank, folder, OPTIONS)
    for rank, result in enumerate(ranks):
        assert (result.code, result.err) == (0, "")
        assert result.train == pytest.approx(alone.train, abs=2e-5) and len(result.train) == 8
        assert result.val == pytest.approx(alone.val, abs=2e-5) and len(result.val) == 3
        assert (result.out == "") == (rank > 0)  # rank 0 speaks for all

    found, expected = state_of(ranks[0]), state_of(alone)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() < 1e-4 * value.norm().clamp(min=1e-12), name


def test_world_sizes_that_do_not_share_the_batch_evenly_are_refused_with_the_valid_ones():
    for world in (1, 2, 4, 8, 16, 32):  # 512 tokens in 8 slices, or more of 16 and more
        train_gpt.check_world_size(config(), world)
    for world in (3, 12, 64):
        with pytest.raises(UsageError, match=rf"one of 1, 2, 4, 8, 16, 32 for 8 slices .* found {world}"):
            train_gpt.check_world_size(config(), world)


def test_more_ranks_than_slices_are_told_what_that_changes(folder):
    first, other = run_ranks(2, on_rank, folder, ["--slices=1", "--dry_run"])
    assert (first.code, other.code, other.err) == (0, 0, "")
    assert first.err.startswith("note: 2 ranks share 1 sequences per step, so each one is cut to a part")


def torchrun(folder, *options: str):
    program = "-m", "torch.distributed.run", *options, "train_gpt.py"
    return start(folder, *OPTIONS, program=program, env={"OMP_NUM_THREADS": "1"})


def test_two_machines_train_as_one_process(folder, alone, tmp_path):
    """Two agents of one rank each, as on two machines, which meet through a file on both."""
    meet = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=test",
            "--rdzv_conf=store_type=file", f"--rdzv_endpoint={tmp_path / 'store'}", "--local_addr=127.0.0.1"]
    with torchrun(folder, *meet) as one, torchrun(folder, *meet) as other:
        outputs = [process.communicate() for process in (one, other)]
    assert [(process.returncode, err) for process, (_, err) in zip((one, other), outputs)] == [(0, "")] * 2

    (silent, _), (spoken, _) = sorted(outputs)
    assert silent == "" and spoken.splitlines()[-1].startswith("log: ")  # rank 0 alone speaks
    found = {step: pairs["val_loss"] for step, _, pairs in step_lines(spoken) if "val_loss" in pairs}
    assert found == {step: f"{loss:.4f}" for step, loss in alone.val.items()}
    with open(spoken.splitlines()[0]) as log:
        assert "with world_size 2\n" in log.read().split("=" * 100)[1]


# ------------------------------------------------------------------------------------------------------------
# Clock, target, check


def test_the_clock_pays_for_the_first_shard_the_first_batch_and_the_prefixes(folder, monkeypatch):
    events = []

    def note(kind, name):
        original = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda self, *args: events.append(name) or original(self, *args))

    note(train_gpt.Clock, "start")
    note(train_gpt.Loader, "read")
    note(train_gpt.Loader, "prepare")
    note(train_gpt.Run, "fill_prefixes")  # the table of prefixes: the public record pays for it as well
    first = run(folder, "--train_steps=2", "--extension_steps=0", "--save_final=1")
    told = [events.copy()]
    events.clear()
    assert run(folder, f"--resume={first.checkpoints[0]}", "--train_steps=4", "--untie_stage=0").code == 0
    for seen in (*told, events):  # a run and one that goes on
        clock = seen.index("start")
        assert not {"prepare", "fill_prefixes"} & set(seen[:clock])
        assert {"read", "fill_prefixes"} <= set(seen[clock:])


def test_a_time_budget_decides_the_number_of_steps(folder, monkeypatch):
    """Stages of 100, 200, 300 and 400 ms a step, the last one for two steps: n steps take 0.2 (n - 2) + 0.8
    s."""
    monkeypatch.setattr(train_gpt.Run, "time_step", lambda self, step: 100.0 * (1 + self.cfg.stage(step)))
    result = run(folder, "--time_budget=3.3", "--stages=3")
    assert result.code == 0 and max(result.val) == 14  # 12 steps in three stages of four take 2.4 s, and 0.8
    assert "time budget: 3.3 s, in which 14 steps fit" in result.log
    short = run(folder, "--time_budget=0.1", "--stages=3")
    assert short.code == 2 and "--time_budget: expected room for 3 steps" in short.err


def test_a_run_can_end_at_its_target(folder):
    result = run(folder, "--target_loss=5.9", "--stop_at_target=1", "--val_every=3", "--train_steps=100",
                 "--max_epochs=99", "--save_every=2", "--save_final=1")
    *before, last = result.val
    assert result.code == 0 and last < 100
    assert result.checkpoints[-1].name == f"state_step{last:06d}.pt" and last % 2  # by the target alone
    assert result.val[last] <= 5.9 and all(result.val[step] > 5.9 for step in before)
    reached, = re.findall(rf"^reached: yes, at step {last} after \d+\.\d s of training$", result.out, re.M)
    longer = "--stop_at_target=0", f"--train_steps={last + 4}", "--target_loss=5.9"
    resumed = run(folder, f"--resume={result.checkpoints[-1]}", *longer)
    assert resumed.code == 0 and reached in resumed.out.splitlines()


def test_check_fails_where_a_token_sees_the_next_one_or_none_or_sums_are_not_1(folder, monkeypatch):
    result = run(folder, "--check")
    assert (result.code, result.err, result.log) == (0, "", None)
    assert result.out.splitlines()[-1] == "check: passed"

    def leaky_mask(docs, window):
        t = torch.arange(len(docs.ids))
        return attention.masked_mask(docs, window) | (t[None, :] - t[:, None] == 1)

    log_probs = train_gpt.GPT.log_probs
    with monkeypatch.context() as patch:
        patch.setitem(attention.BACKENDS, "masked", (leaky_mask, attention.masked_attention))
        result = run(folder, "--check", "--attention=masked")
        assert result.code == 1 and result.out.splitlines()[-1] == "check: failed"
    for wrong in (lambda p: p + 0.001, lambda p: p.new_full(p.shape, -math.log(p.size(1)))):
        monkeypatch.setattr(train_gpt.GPT, "log_probs", lambda *args: wrong(log_probs(*args)))
        assert run(folder, "--check").code == 1
