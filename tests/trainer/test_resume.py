"""Checkpoints: a resumed run equals one that was never interrupted, and signals save before they end a
run."""
import os
import signal
import time
from functools import partial

import pytest
import torch

import train_gpt
from engine import clock as clock_module
from engine.endings import StopSignal
from tests.helpers.bits import same_bits
from tests.helpers.dist import Ranks, run_ranks
from tests.helpers.runs import config, make_shards, on_rank, run, step_lines

# Stages begin at steps 0, 4, 6 (embedding and head part) and 10; Adam moves every second step; documents are
# split. The average of the weights begins after step 4. Of two shards of the n-grams' table one is not full.
OPTIONS = ("--adam_every=2", "--split_docs=40", "--val_every=3", "--ema_frac=0.4", "--ngram_rows=51")
SAVING = (*OPTIONS, "--save_every=1", "--save_final=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # So few tokens that the run crosses shards and an epoch.
    return make_shards(tmp_path_factory.mktemp("resume"), tokens=3500)


@pytest.fixture(scope="module", autouse=True)
def clock():
    """Time passes in training steps only, so that even the timers of two runs can be equal; and the thread
    that ends a process that does not stop in time leaves this one alone."""
    now, step = [0.0], train_gpt.Run.train_step

    def train_step(self):
        now[0] += 0.125
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.Run, "train_step", train_step)
        patch.setattr(clock_module.time, "perf_counter", lambda: now[0])
        patch.setattr(StopSignal, "watch", lambda self: None)
        yield


@pytest.fixture(scope="module")
def whole(folder, clock):
    """The uninterrupted run, with a checkpoint at every second step."""
    result = run(folder, *SAVING)
    assert (result.code, result.err) == (0, "")
    names = [f"state_step{step:06d}.pt" for step in range(2, 13, 2)]
    assert [path.name for path in result.checkpoints] == names
    assert config(*SAVING).stage_starts == (0, 4, 6, 10)
    positions = [load(path)["loader"] for path in result.checkpoints]
    assert {p["shard"] for p in positions} == {0, 1} and {p["epoch"] for p in positions} == {0, 1}
    assert load(result.checkpoints[2])["ngrams"]["moved"].max() == 50
    assert "n-grams: 51 rows of 16 numbers, 0.00 GiB of host memory over 1 ranks" in result.log
    return result


def checkpoint(whole, step: int):
    return whole.checkpoints[step // 2 - 1]


def losses_after(losses: dict, step: int) -> dict:
    return {s: loss for s, loss in losses.items() if s > step}


def load(path) -> dict:
    return torch.load(path, weights_only=True)


# ------------------------------------------------------------------------------------------------------------
# Resuming


@pytest.mark.parametrize("step", [4, 6, 10])
def test_a_resumed_run_equals_one_that_was_not_interrupted(folder, whole, step):
    path = checkpoint(whole, step)
    resumed = run(folder, f"--resume={path}")
    assert (resumed.code, resumed.err) == (0, "")
    assert len(resumed.train) == 12 - step
    assert resumed.train == losses_after(whole.train, step)  # to the last bit
    assert resumed.val == losses_after(whole.val, step)
    lines = [line for line in step_lines(whole.log) if line[0] > step]
    assert step_lines(resumed.log) == lines  # with timers
    assert same_bits(load(resumed.checkpoints[-1]), load(whole.checkpoints[-1]))
    assert f"\nresumed: from {path} at step {step}; such a run is no record\n" in resumed.log


def test_a_finished_run_can_be_resumed_to_its_last_validation(folder, whole):
    resumed = run(folder, f"--resume={whole.checkpoints[-1]}")
    assert (resumed.code, resumed.train, resumed.val) == (0, {}, {12: whole.val[12]})


def test_settings_come_from_the_checkpoint_unless_they_are_given(folder, whole):
    given = "--val_every=1", "--save_every=0", "--save_final=0"
    resumed = run(folder, f"--resume={checkpoint(whole, 8)}", *given)
    assert sorted(resumed.val) == [9, 10, 11, 12] and resumed.checkpoints == []
    assert resumed.val[12] == whole.val[12]  # saving does not change a run


def test_another_world_size_resumes_with_the_same_losses(folder, whole):
    """1 to 2 ranks and 2 to 1. Tolerance: that of test_train.py, sums in another order."""
    path = checkpoint(whole, 6)
    train, val = losses_after(whole.train, 6), losses_after(whole.val, 6)
    for result in run_ranks(2, on_rank, folder, [f"--resume={path}"]):
        assert (result.code, result.err) == (0, "")
        assert result.train == pytest.approx(train, abs=2e-5)

    by_two = run_ranks(2, on_rank, folder, [*SAVING, "--save_every=6"])[0]
    resumed = run(folder, f"--resume={by_two.checkpoints[0]}")
    assert (resumed.code, resumed.err) == (0, "")
    assert resumed.train == pytest.approx(train, abs=2e-5)
    assert resumed.val == pytest.approx(val, abs=2e-5)


def test_under_another_schedule_embedding_and_head_part_where_they_should_have(folder, whole):
    """The run of 12 steps parts them in step 6, one of 8 steps in step 4."""
    shorter = "--train_steps=8"
    assert (config(*SAVING).untie_step, config(*SAVING, shorter).untie_step) == (6, 4)
    resumed = run(folder, f"--resume={checkpoint(whole, 6)}", shorter, "--val_every=1")
    assert (resumed.code, resumed.err) == (0, "")
    assert resumed.train[7] == whole.train[7]  # both read the head's rows, in the embedding
    model = load(resumed.checkpoints[-1])["model"]
    assert not torch.equal(model["embed"], model["head"])
    assert (model["embed"] - model["head"]).norm() < 0.3 * model["head"].norm()


def test_what_has_parted_cannot_become_one_again(folder, whole):
    refused = run(folder, f"--resume={checkpoint(whole, 8)}", "--train_steps=24")
    assert refused.code == 2 and "since step 6" in refused.err and "--untie_stage=0" in refused.err
    resumed = run(folder, f"--resume={checkpoint(whole, 8)}", "--train_steps=24", "--untie_stage=0")
    assert resumed.code == 0 and sorted(resumed.train) == list(range(9, 25))


def test_the_latest_checkpoint_is_found_and_only_the_newest_ones_are_kept(tmp_path):
    make_shards(tmp_path)
    given = "--train_steps=4", "--extension_steps=1", "--untie_stage=0"
    kept = run(tmp_path, *given, "--save_every=1", "--keep=2")
    assert [path.name for path in kept.checkpoints] == ["state_step000003.pt", "state_step000004.pt"]
    later = kept.checkpoints[1].stat().st_mtime + 60  # the newest by its time, not by its name
    os.utime(kept.checkpoints[0], (later, later))
    resumed = run(tmp_path, "--resume=latest", "--train-steps=6")  # a dash is as good as an underscore
    assert resumed.code == 0 and sorted(resumed.train) == [4, 5, 6]
    missing = run(tmp_path / "elsewhere", "--resume=latest")
    assert missing.code == 2 and "expected a checkpoint in" in missing.err


def test_the_latest_of_checkpoints_as_old_is_that_of_the_last_step_and_one_that_is_gone_is_none(tmp_path):
    paths = [tmp_path / f"run/state_step{step:06d}.pt" for step in (9, 12, 15)]
    paths[0].parent.mkdir()
    for path in paths[:2]:
        path.touch()
        os.utime(path, (1e9, 1e9))
    paths[2].symlink_to("gone")  # as one that another run removes meanwhile
    assert train_gpt.latest_checkpoint(str(tmp_path)) == str(paths[1])


def test_a_dry_run_says_what_would_run_and_leaves_nothing(tmp_path):
    result = run(make_shards(tmp_path), "--dry_run", "--seed=7")
    assert result.code == 0 and not (tmp_path / "logs").exists()
    assert "--seed=7" in result.out.splitlines()
    assert "training data: 6,144 tokens from 2 shards" in result.out


# ------------------------------------------------------------------------------------------------------------
# Signals


def stop_at(patch, step: int, *signals: int):
    """Send signals to this process in the training step of this number."""
    train_step = train_gpt.Run.train_step

    def stopped(self):
        if self.step == step - 1:
            for number in signals:
                signal.raise_signal(number)
        return train_step(self)

    patch.setattr(train_gpt.Run, "train_step", stopped)


@pytest.fixture
def hangup():
    """Set what SIGHUP does when a run starts; nohup, under which these tests may run too, lets it be
    ignored."""
    before = signal.getsignal(signal.SIGHUP)
    yield partial(signal.signal, signal.SIGHUP)
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number, saving", [
    (signal.SIGINT, "--save_final=1"),
    (signal.SIGTERM, "--save_every=100"),
    (signal.SIGHUP, "--save_final=1"),
])
def test_a_signal_saves_at_the_next_step_that_can_be_resumed(
        folder, whole, monkeypatch, hangup, number, saving):
    hangup(signal.SIG_DFL)
    stop_at(monkeypatch, 5, number)
    before = signal.signal(number, signal.SIG_DFL)  # nohup, under which the tests may run, ignores it
    try:
        stopped = run(folder, *OPTIONS, saving)
    finally:
        signal.signal(number, before)
    assert (stopped.code, stopped.err) == (128 + number, "")
    path, = stopped.checkpoints
    assert path.name == "state_step000006.pt"
    last = f"ended after step 6: by {signal.Signals(number).name}; go on with --resume={path}"
    assert stopped.out.splitlines()[-1] == last == stopped.log.splitlines()[-1]

    state, expected = load(path), load(checkpoint(whole, 6))
    for name in ("config", "rng"):  # when to save is one of the settings; other tests draw numbers, too
        del state[name], expected[name]
    assert same_bits(state, expected)


def test_a_signal_in_a_validation_ends_it_before_the_next_batch_and_saves(folder, whole, monkeypatch):
    evaluate, batches = train_gpt.GPT.evaluate, []

    def stopped(self, *args):
        batches.append(len(batches))
        if len(batches) == 10:  # the second of four, after step 6
            signal.raise_signal(signal.SIGTERM)
        return evaluate(self, *args)

    monkeypatch.setattr(train_gpt.GPT, "evaluate", stopped)
    result = run(folder, *OPTIONS, "--save_final=1")
    assert (result.code, result.err, len(batches)) == (128 + signal.SIGTERM, "", 10)
    assert [path.name for path in result.checkpoints] == ["state_step000006.pt"]
    assert (list(result.train), list(result.val)) == ([1, 2, 3, 4, 5, 6], [0, 3])


def test_under_nohup_a_run_outlives_its_terminal(folder, whole, monkeypatch, hangup):
    hangup(signal.SIG_IGN)
    stop_at(monkeypatch, 5, signal.SIGHUP)
    result = run(folder, *OPTIONS)
    assert (result.code, result.train, result.val) == (0, whole.train, whole.val)


@pytest.mark.parametrize("signals, saving", [
    ([signal.SIGTERM], []), ([signal.SIGINT], []), ([signal.SIGINT, signal.SIGINT], ["--save_final=1"])])
def test_a_signal_ends_a_run_that_cannot_save_at_once_and_a_second_one_any_run(
        folder, whole, monkeypatch, signals, saving):
    stop_at(monkeypatch, 5, *signals)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stopped = run(folder, *OPTIONS, *saving)
    assert (stopped.code, stopped.err, stopped.checkpoints) == (128 + signals[0], "", [])
    assert stopped.log.splitlines()[-1] == f"ended after step 4: by {signal.Signals(signals[0]).name}"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert stopped.train == {step: whole.train[step] for step in range(1, 5)}


def interrupt_one(rank):
    """Rank 1 gets a signal in its fourth step."""
    if rank == 1:
        stop_at(pytest.MonkeyPatch(), 4, signal.SIGTERM)


def test_a_signal_to_one_rank_makes_all_save_together_and_end(folder):
    ranks = run_ranks(2, on_rank, folder, [*OPTIONS, "--save_final=1"], interrupt_one)
    assert [(result.code, result.err) for result in ranks] == [(130, ""), (143, "")]
    assert [path.name for path in ranks[0].checkpoints] == ["state_step000004.pt"]


def hang_one(waits, rank):
    """Rank 1 never comes to its third step, where rank 0 waits for it."""
    StopSignal.PATIENCE = 1.0  # seconds of patience where the run can save
    train_step = train_gpt.Run.train_step

    def step(self):
        if self.step == 2 and rank == 1:
            while True:
                time.sleep(1000)
        if self.step == 2:
            waits.touch()
            torch.distributed.barrier()
        return train_step(self)

    train_gpt.Run.train_step = step


@pytest.mark.parametrize("saving", ["--save_final=0", "--save_final=1"])
def test_a_rank_that_waits_for_another_one_leaves_soon_after_a_signal(folder, tmp_path, saving):
    """A handler in Python would not run before the collective ends, which is never."""
    waits = tmp_path / "waits"
    ranks = Ranks(2, on_rank, folder, [*OPTIONS, saving], partial(hang_one, waits))
    waiting, hanging = ranks.processes
    while waiting.is_alive() and not waits.exists():
        time.sleep(0.05)
    os.kill(waiting.pid, signal.SIGTERM)
    waiting.join()
    hanging.kill()
    result, _ = ranks.join()
    if result is None:
        assert waiting.exitcode == 143
    else:  # the signal came in the moment before it waited, and the handler ran
        assert result.code == 143
