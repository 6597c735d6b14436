"""Checkpoints: a resumed run equals one that was never interrupted, and signals save before they end a run."""

import os
import signal
import time

import pytest
import torch
from tests.helpers.runs import Ranks, config, launch, make_shards, run, step_lines

from engine import clock as clock_module, endings
import train_gpt

# Stages begin at steps 0, 4, 6 (embedding and head part) and 10; Adam moves every second step; documents are split.
# The average of the weights begins after step 4.
OPTIONS = ("--adam_every=2", "--save_every=1", "--save_final=1", "--split_docs=40", "--val_every=3", "--ema_frac=0.4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("resume"), tokens=3500)  # so that the run crosses shards and an epoch


@pytest.fixture(scope="module", autouse=True)
def clock():
    """Time passes in training steps only, 0.1 s each, so that even the timers of two runs can be equal."""
    now, step = [0.0], train_gpt.Run.train_step

    def train_step(self):
        now[0] += 0.125
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.Run, "train_step", train_step)
        patch.setattr(clock_module.time, "perf_counter", lambda: now[0])
        yield


@pytest.fixture(scope="module")
def whole(folder, clock):
    """The uninterrupted run, with a checkpoint at every second step."""
    result = run(folder, *OPTIONS)
    assert (result.code, result.err) == (0, "")
    assert [path.name for path in result.checkpoints] == [f"state_step{step:06d}.pt" for step in range(2, 13, 2)]
    assert config(*OPTIONS).stage_starts == (0, 4, 6, 10)
    return result


def equal(a, b) -> bool:
    """Bitwise equality of nested checkpoints."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def test_saving_does_not_change_the_run(folder, whole):
    plain = run(folder, *OPTIONS, "--save_every=0", "--save_final=0")
    assert (plain.train, plain.val, plain.checkpoints) == (whole.train, whole.val, [])
    assert step_lines(plain.log) == step_lines(whole.log)


@pytest.mark.parametrize("step", [2, 4, 6, 8, 10])
def test_a_resumed_run_equals_one_that_was_not_interrupted(folder, whole, step):
    resumed = run(folder, f"--resume={whole.checkpoints[step // 2 - 1]}")
    assert (resumed.code, resumed.err) == (0, "")
    assert resumed.train == {s: loss for s, loss in whole.train.items() if s > step}  # to the last bit
    assert resumed.val == {s: loss for s, loss in whole.val.items() if s > step}
    assert step_lines(resumed.log) == [line for line in step_lines(whole.log) if line[0] > step]  # timers included
    assert len(step_lines(resumed.log)) >= 12 - step
    assert equal(load(resumed.checkpoints[-1]), load(whole.checkpoints[-1]))
    assert (
        f"\nresumed: from {whole.checkpoints[step // 2 - 1]} at step {step}; such a run is no record\n" in resumed.log
    )


def test_the_data_of_these_runs_cross_shards_and_an_epoch(whole):
    positions = [load(path)["loader"] for path in whole.checkpoints]
    assert {p["shard"] for p in positions} == {0, 1} and {p["epoch"] for p in positions} == {0, 1}


def test_only_a_resumed_run_says_so(whole):
    assert "\nresumed:" not in whole.log.split("=" * 100)[1]


def test_a_finished_run_can_be_resumed_to_its_last_validation(folder, whole):
    resumed = run(folder, f"--resume={whole.checkpoints[-1]}")
    assert (resumed.code, resumed.train, resumed.val) == (0, {}, {12: whole.val[12]})


def test_settings_come_from_the_checkpoint_unless_they_are_given(folder, whole):
    resumed = run(folder, f"--resume={whole.checkpoints[3]}", "--val_every=1", "--save_every=0", "--save_final=0")
    assert sorted(resumed.val) == [9, 10, 11, 12] and resumed.checkpoints == []
    assert resumed.val[12] == whole.val[12]


@pytest.fixture(scope="module")
def two_ranks(folder, whole):
    return Ranks(folder, [(2, OPTIONS), (2, [f"--resume={whole.checkpoints[2]}"])]).results()


def test_another_world_size_resumes_with_the_same_losses(folder, whole, two_ranks):
    """1 to 2 ranks and 2 to 1. Tolerance: that of test_train.py, sums in another order."""
    after = {s: loss for s, loss in whole.train.items() if s > 6}
    for result in two_ranks[1]:
        assert (result.code, result.err) == (0, "") and result.train == pytest.approx(after, abs=2e-5)
    resumed = run(folder, f"--resume={two_ranks[0][0].checkpoints[2]}")
    assert (resumed.code, resumed.err) == (0, "") and resumed.train == pytest.approx(after, abs=2e-5)
    assert resumed.val == pytest.approx({s: loss for s, loss in whole.val.items() if s > 6}, abs=2e-5)


def stop_at(monkeypatch, at: int, *signals: int):
    """Signals to this process in the training step that makes run.step equal to at."""
    step = train_gpt.Run.train_step

    def train_step(self):
        if self.step == at - 1:
            for number in signals:
                os.kill(os.getpid(), number)
        return step(self)

    monkeypatch.setattr(train_gpt.Run, "train_step", train_step)


@pytest.mark.parametrize("number, saving", [(signal.SIGINT, "--save_final=1"), (signal.SIGTERM, "--save_every=100")])
def test_a_signal_saves_at_the_next_step_that_can_be_resumed(folder, whole, monkeypatch, number, saving):
    with monkeypatch.context() as patch:
        stop_at(patch, 5, number)
        stopped = run(folder, *OPTIONS, "--save_final=0", "--save_every=0", saving)
    assert (stopped.code, stopped.err) == (128 + number, "")
    [path] = stopped.checkpoints
    assert path.name == "state_step000006.pt"
    last = f"ended after step 6: by {signal.Signals(number).name}; go on with --resume={path}"
    assert stopped.out.splitlines()[-1] == last == stopped.log.splitlines()[-1]
    resumed = run(folder, f"--resume={path}")
    assert resumed.train == {s: loss for s, loss in whole.train.items() if s > 6} and resumed.val[12] == whole.val[12]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_without_saving_at_once(folder, monkeypatch, number):
    stop_at(monkeypatch, 5, number)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stopped = run(folder, *OPTIONS, "--save_every=0", "--save_final=0")
    assert (stopped.code, stopped.err, stopped.checkpoints) == (128 + number, "", [])
    assert stopped.log.splitlines()[-1] == f"ended after step 4: by {signal.Signals(number).name}"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_second_signal_ends_a_run_that_would_save(folder, monkeypatch):
    stop_at(monkeypatch, 5, signal.SIGINT, signal.SIGINT)
    stopped = run(folder, *OPTIONS, "--save_every=0")
    assert (stopped.code, stopped.checkpoints) == (130, [])


def interrupt_one(rank):
    """Rank 1 gets a signal in its fourth step."""
    if rank == 1:
        stop_at(pytest.MonkeyPatch(), 4, signal.SIGTERM)


def test_a_signal_to_one_rank_makes_all_save_together_and_end(folder):
    [ranks] = Ranks(folder, [(2, [*OPTIONS, "--save_every=0"])], hook=interrupt_one).results()
    assert [result.err for result in ranks] == ["", ""] and all(result.code in (130, 143) for result in ranks)
    assert [path.name for path in ranks[0].checkpoints] == ["state_step000004.pt"]


def hang_one(rank):
    """Rank 1 never comes to its third step."""
    step = train_gpt.Run.train_step
    endings.StopSignal.__init__.__defaults__ = (1.0,)  # seconds of patience where the run can save

    def train_step(self):
        if rank == 1 and self.step == 2:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            open(os.environ["HANGS"], "w").close()
            time.sleep(1000)
        return step(self)

    train_gpt.Run.train_step = train_step


@pytest.mark.parametrize("saving", ["--save_final=0", "--save_final=1"])
def test_a_rank_that_waits_for_another_one_leaves_soon_after_a_signal(folder, tmp_path, saving):
    """A handler in Python would not run before the collective ends, which is never."""
    ranks = Ranks(folder, [(2, [*OPTIONS, "--save_every=0", saving])], hook=hang_one, HANGS=str(tmp_path / "hangs"))
    deadline = time.monotonic() + 60
    while not (tmp_path / "hangs").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)  # now rank 0 waits in an all-reduce, or is about to
    waiting, hanging = ranks.processes
    os.kill(waiting.pid, signal.SIGTERM)
    waiting.join(30)
    hanging.kill()
    if waiting.exitcode == 0:  # it was about to: then its handler ran, and the command ended
        [[result, _]] = ranks.results()
        assert result.code == 143
    else:
        assert waiting.exitcode == 143


def test_ctrl_c_at_the_launcher_saves_and_ends_all_ranks(folder):
    process = launch(folder, "--save_final=1")
    try:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and len(err.splitlines()) == 1, err  # the line with ranks and threads
    path = out.splitlines()[-1].partition("; go on with --resume=")[2]
    assert load(path)["step"] >= 3


def test_the_latest_checkpoint_is_found_and_only_the_newest_ones_are_kept(folder, whole):
    kept = run(folder, *OPTIONS, "--keep=2")
    assert [path.name for path in kept.checkpoints] == ["state_step000010.pt", "state_step000012.pt"]
    resumed = run(folder, "--resume=latest", "--train-steps=14")
    assert resumed.code == 0 and sorted(resumed.train) == [13, 14]  # a dash is as good as an underscore
    found = run(folder / "elsewhere", "--resume=latest")
    assert found.code == 2 and "expected a checkpoint in" in found.err


def test_a_dry_run_says_what_would_run_and_leaves_nothing(folder):
    before = set(folder.glob("logs/*"))
    result = run(folder, "--dry_run", "--seed=7")
    assert result.code == 0 and set(folder.glob("logs/*")) == before
    assert "--seed=7" in result.out.splitlines() and "training data: 6,144 tokens from 2 shards" in result.out
