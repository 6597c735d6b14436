"""What a user or a machine can get wrong: one message (expected, found, what to do next), exit code 2 or 1, on all ranks,
with earlier logs and checkpoints as they were."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.helpers.runs import ROOT, TINY, Ranks, launch, make_shards, run

import train_gpt
from data.shards import open_shard, write_shard
from engine import log as engine_log
from engine.endings import report

TRAIN, VAL = "data/shakespeare/shakespeare_train_000000.bin", "data/shakespeare/shakespeare_val_000000.bin"


@pytest.fixture
def folder(tmp_path):
    return make_shards(tmp_path)


def refused(result, code: int, *parts: str):
    """One line on standard error with all parts, in the order expected, found, what to do next."""
    assert result.code == code, (result.out, result.err)
    [line] = result.err.splitlines()
    assert line.startswith("train_gpt.py: ") and "Traceback" not in result.out
    assert 0 < line.find("expected") < line.find("found") < line.rfind(";"), line
    for part in parts:
        assert part in line, line


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SHARDS = {
    "no training shard": (
        lambda f: [p.unlink() for p in f.glob("data/shakespeare/*train*")],
        "expected shards",
        "data.shakespeare",
    ),
    "no validation shard": (lambda f: (f / VAL).unlink(), "expected shards", "_val_*.bin"),
    "truncated": (
        lambda f: os.truncate(f / TRAIN, 5000),
        "expected 25,024 bytes for 12,000 tokens, found 5,000",
        "cut short",
    ),
    "empty": (lambda f: os.truncate(f / TRAIN, 0), "found an empty file"),
    "wrong magic": (lambda f: (f / TRAIN).write_bytes(b"PAR1" + bytes(5000)), "expected magic 20240520, found"),
    "truncated validation": (lambda f: os.truncate(f / VAL, 2000), "shakespeare_val_000000.bin", "cut short"),
    "another vocabulary": (
        lambda f: write_shard(f / TRAIN, np.full(9000, 50256)),
        "vocabulary size 257, found 50256 at position 0",
    ),
    "another vocabulary in validation": (
        lambda f: write_shard(f / VAL, np.full(9000, 50256)),
        "vocabulary size 257, found 50256",
    ),
    "no documents": (
        lambda f: write_shard(f / TRAIN, np.full(9000, 97)),
        "expected documents that start with token 256, found none",
    ),
    "too few validation tokens": (
        lambda f: write_shard(f / VAL, open_shard(f / VAL)[:900]),
        "--val_tokens",
        "found 900",
    ),
}


@pytest.mark.parametrize("name", SHARDS)
def test_unusable_shards(folder, name):
    spoil, *parts = SHARDS[name]
    spoil(folder)
    refused(run(folder), 2, *parts)
    assert not (folder / "logs").exists()


FIELDS = {
    "--trian_steps=5": "did you mean --train_steps?",
    "train_steps=5": "expected a setting",
    "--train_steps=many": "found 'many'",
    "--train_steps": "expected",
    "--batch_tokens=513": "--batch_tokens: expected multiples of 8 slices",
    "--batch_tokens=": "--batch_tokens: expected one or more positive numbers",
    "--train_steps=0": "--train_steps: expected a positive",
    "--track=large": "--track: expected one of small, shakespeare, found 'large'",
    "--long_layers=7": "--long_layers: expected layer",
    "--muon_lr=nan": "--muon_lr: expected finite",
    "--optimizer=sgd": "--optimizer: expected one of muon, adamw",
    "--backout=perhaps": "found 'perhaps'",
    "--val_slice=100": "--val_tokens: expected a multiple of val_slice",
    "--seed=99999999999999999999": "--seed: expected zero or more and less than 2^63",
    "--train_steps=900": "--train_steps: expected about",
}


@pytest.mark.parametrize("argument", FIELDS)
def test_unusable_settings(folder, argument):
    refused(run(folder, argument), 2, FIELDS[argument])
    assert not (folder / "logs").exists()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    result = run(
        make_shards(tmp_path_factory.mktemp("saved")), "--save_final=1", "--train_steps=4", "--extension_steps=1"
    )
    return result.checkpoints[0].read_bytes()


def without(key, content):
    state = torch.load(content, weights_only=True)
    del state[key]
    torch.save(state, content)


def changed(key, value, content):
    state = torch.load(content, weights_only=True)
    state[key] = value
    torch.save(state, content)


CHECKPOINTS = {
    "no such file": (lambda p: p.unlink(), (), "no such file"),
    "not a checkpoint": (lambda p: p.write_text("step:1/4\n"), (), "another kind of file"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), (), "another kind of file"),
    "another program's": (lambda p: torch.save({"model": {}}, p), (), "found another kind of file"),
    "truncated": (lambda p: os.truncate(p, p.stat().st_size // 2), (), "damaged"),
    "without loader": (lambda p: without("loader", p), (), "differs in loader"),
    "without settings": (lambda p: without("config", p), (), "differs in"),
    "another width": (lambda p: None, ("--model_dim=64",), "with model_dim 32 instead of 64; leave out --model_dim"),
    "another depth": (lambda p: None, ("--num_layers=4",), "with num_layers 3 instead of 4"),
    "another optimizer": (lambda p: None, ("--optimizer=adamw",), "leave out settings"),
    "settings of no kind": (lambda p: changed("config", 7, p), (), "differs in"),
    "settings of other types": (lambda p: changed("config", {"slices": "many"}, p), (), "differs in"),
    "another track": (lambda p: None, ("--track=small",), "--track: expected the checkpoint's track, shakespeare"),
    "fewer steps": (lambda p: None, ("--train_steps=3",), "--train_steps: expected at least the 4 steps", "found 3"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_unusable_checkpoints(folder, checkpoint, name):
    spoil, args, *parts = CHECKPOINTS[name]
    path = folder / "state.pt"
    path.write_bytes(checkpoint)
    spoil(path)
    refused(run(folder, f"--resume={path}", *args), 2, *parts)


def test_a_checkpoint_whose_weights_are_not_those_of_its_settings(folder, checkpoint):
    path = folder / "state.pt"
    path.write_bytes(checkpoint)
    state = torch.load(path, weights_only=True)
    del state["model"]["attn_qk"]
    torch.save(state, path)
    refused(run(folder, f"--resume={path}"), 2, "attn_qk")


def test_a_log_folder_that_cannot_be_written(folder):
    (folder / "file").write_text("mine")
    refused(
        run(folder, f"--log_dir={folder / 'file'}"), 2, "--log_dir: expected a folder to write to", "choose another one"
    )
    assert (folder / "file").read_text() == "mine"


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_saved(folder):
    good = run(folder, "--train_steps=4", "--extension_steps=1", "--save_final=1")
    before = contents(folder)
    bad = run(folder, "--muon_lr=1e30", "--adam_lr=1e30")
    refused(bad, 1, "finite", "found nan", "lower")
    assert "ended after step" in bad.log.splitlines()[-1]
    assert good.code == 0 and before.items() <= contents(folder).items()


def test_data_that_run_out_on_the_way_end_the_run(folder, monkeypatch):
    monkeypatch.setattr(train_gpt.Loader, "check_supply", lambda self: None)
    result = run(folder, "--train_steps=40", "--max_epochs=1")
    refused(result, 1, "expected more training tokens", "after 1 epochs; get more shards")
    assert len(result.train) > 10


def full_disk(rank):
    """Files of this process may not grow beyond 300 kB, which logs do not reach and checkpoints do."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


def non_finite_on_one(rank):
    """Rank 1 meets a NaN in its second step."""
    accumulate = train_gpt.Run.accumulate
    train_gpt.Run.accumulate = lambda self, batches, step: (
        accumulate(self, batches, step)
        * (torch.nan if rank == 1 and self.step == 1 and self.clock.started is not None else 1)
    )


def both_ranks(folder, *commands, hook=None, **env) -> list:
    """For each command the one message of two ranks with the same exit code, and whose it is."""
    merged = []
    for ranks in Ranks(folder, [(2, args) for args in commands], hook=hook, **env).results():
        assert len({result.code for result in ranks}) == 1
        speaker = [result for result in ranks if result.err] or ranks
        assert len(speaker) == 1, [result.err for result in ranks]
        merged.append(speaker[0])
    return merged


def test_two_ranks_end_with_one_message(folder, checkpoint):
    (folder / "file").write_text("mine")
    (folder / "state.pt").write_bytes(checkpoint)
    found = both_ranks(
        folder,
        ["--trian_steps=5"],
        ["--slices=5", "--batch_tokens=500"],
        [f"--log_dir={folder / 'file'}"],
        [f"--resume={folder / 'file'}"],
        [f"--resume={folder / 'state.pt'}", "--optimizer=adamw"],
        ["--train_files=nowhere/*.bin"],
        ["--muon_lr=1e30", "--adam_lr=1e30"],
    )
    parts = [
        "did you mean",
        "world size: expected one of 1, 5",
        "--log_dir",
        "another kind of file",
        "leave out settings",
        "expected shards",
        "finite",
    ]
    for result, part, code in zip(found, parts, (2, 2, 2, 2, 2, 2, 1)):
        refused(result, code, part)


def test_a_full_disk_while_saving(folder):
    good = run(folder, "--train_steps=4", "--extension_steps=1", "--save_final=1")
    before = contents(folder)
    [result] = both_ranks(folder, ["--save_final=1"], hook=full_disk)
    refused(result, 1, "expected to write a checkpoint, found: File too large", "free some space")
    left = set(contents(folder)) - set(before)
    assert good.code == 0 and before.items() <= contents(folder).items() and {path.suffix for path in left} == {".txt"}


def test_a_periodic_save_that_fails_warns_and_the_run_goes_on(folder):
    [ranks] = Ranks(folder, [(2, ["--save_every=4"])], hook=full_disk).results()
    assert [result.code for result in ranks] == [0, 0] and max(ranks[0].val) == 12
    warnings = [line for line in ranks[0].log.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 3 and "found: File too large" in warnings[0] and ranks[0].checkpoints == []


def test_a_log_that_cannot_grow_ends_the_run_with_one_message(folder, monkeypatch):
    class Full:
        """A file on a disk that is full after the header."""
        def __init__(self, file):
            self.file = file

        def write(self, text):
            if text.startswith("step:3/"):
                raise OSError(errno.ENOSPC, "No space left on device")
            self.file.write(text)

        def close(self):
            self.file.close()

    header = engine_log.Log.header

    def with_full_disk(self, *args):
        header(self, *args)
        self.file = Full(self.file)

    monkeypatch.setattr(engine_log.Log, "header", with_full_disk)
    refused(run(folder), 1, "expected to write the log, found: No space left on device", "--resume=latest")


def test_a_run_goes_on_when_nobody_reads_its_output_any_more(folder):
    command = [sys.executable, "train_gpt.py", *TINY, f"--log_dir={folder / 'piped'}"]
    env = {**os.environ, "DATA_PATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    path = Path(process.stdout.readline().strip())
    process.stdout.close()
    assert (process.wait(timeout=100), process.stderr.read()) == (0, "")
    assert "step:12/12 val_loss" in path.read_text()


def test_world_size_without_the_rest_of_torchruns_variables(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    refused(run(folder), 2, "torchrun's variables", "found no MASTER_ADDR", "unset WORLD_SIZE")


def test_a_checkpoint_of_other_data_is_refused_unless_asked_for(folder, checkpoint):
    (folder / "state.pt").write_bytes(checkpoint)
    state = torch.load(folder / "state.pt", weights_only=True)
    torch.save({**state, "data": "of another set"}, folder / "state.pt")
    resume = [f"--resume={folder / 'state.pt'}", "--train_steps=6", "--seed=5"]
    refused(run(folder, *resume), 2, "expected the training data of its run", "--force_data")
    result = run(folder, *resume, "--force_data")
    assert result.code == 0 and max(result.val) == 6
    assert result.err.splitlines() == [
        "note: --seed has no effect on a resumed run; its weights come from the checkpoint"]


def test_a_loss_that_is_not_finite_on_one_rank_ends_both(folder):
    [result] = both_ranks(folder, [], hook=non_finite_on_one)
    refused(result, 1, "step 2: expected a finite training loss, found nan")


def die_in_step_three(rank):
    step = train_gpt.Run.train_step

    def train_step(self):
        if rank == 1 and self.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    train_gpt.Run.train_step = train_step


@pytest.mark.parametrize("launched", [False, True])
def test_when_one_rank_dies_the_other_one_ends_with_one_sentence_or_leaves_it_to_the_launcher(folder, launched):
    ranks = Ranks(folder, [(2, [])], hook=die_in_step_three, **({"LAUNCHED_BY": "launch.py"} if launched else {}))
    [[survivor, dead]] = ranks.results()
    assert dead is None and ranks.processes[1].exitcode == -signal.SIGKILL
    if launched:
        assert (survivor.code, survivor.err) == (3, "")
    else:
        refused(survivor, 1, "expected all ranks to go on, found one gone")


def test_a_rank_that_dies_under_the_launcher(folder):
    process = launch(folder, "--save_every=100000")
    try:
        children = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
        ranks = [pid for pid in children if b"\0RANK=1\0" in open(f"/proc/{pid}/environ", "rb").read()]
        os.kill(int(ranks[0]), signal.SIGKILL)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    first, *rest = err.splitlines()
    assert first.startswith("no GPU") and len(rest) == 1 and "found rank 1 ended by SIGKILL" in rest[0], err


def test_an_error_of_the_program_itself_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        report(lambda argv, stop: 1 // 0, [])
