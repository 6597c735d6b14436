"""What a user or a machine can get wrong: one message (expected, found, what to do next), exit code 2 or 1,
on all ranks, with earlier logs and checkpoints as they were."""
import errno
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt
from data.shards import write_shard
from engine.endings import report
from engine.log import Log
from tests.helpers.dist import Ranks, run_ranks
from tests.helpers.runs import make_shards, on_rank, run, start

TRAIN = "data/shakespeare/shakespeare_train_000000.bin"
VAL = "data/shakespeare/shakespeare_val_000000.bin"
SHORT = ["--train_steps=4", "--extension_steps=1"]


@pytest.fixture
def folder(tmp_path):
    return make_shards(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with data, and the log and checkpoint of a finished run."""
    folder = make_shards(tmp_path_factory.mktemp("saved"))
    assert run(folder, *SHORT, "--save_final=1").code == 0
    return folder


def checkpoint_of(folder: Path) -> bytes:
    path, = folder.glob("logs/*/*.pt")
    return path.read_bytes()


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(result, code: int, *parts: str):
    """One line on standard error with all parts, in the order expected, found, what to do next."""
    assert result.code == code, (result.out, result.err)
    line, = result.err.splitlines()
    assert line.startswith("train_gpt.py: ") and "Traceback" not in result.out
    assert 0 < line.find("expected") < line.find("found") < line.rfind(";"), line
    for part in parts:
        assert part in line, line


# ------------------------------------------------------------------------------------------------------------
# Settings, data, checkpoints

FLAGS = {
    "--trian_steps=5": ["'--trian_steps=5'", "did you mean --train_steps?"],
    "--zzzz": ["'--zzzz'", "see --help"],
    "stray": ["expected a setting", "'stray'"],
    "--resume": ["--resume"],
    "--train_steps=many": ["--train_steps: expected a value like '1480'", "'many'"],

    "--window_long=1,b": ["--window_long", "'1,b'"],
    "--backout=perhaps": ["--backout", "'perhaps'"],
    "--track=large": ["--track: expected one of small, ", "shakespeare, found 'large'; choose one"],
    "--track=": ["--track: expected one of small, ", "found ''"],
    "--batch_tokens=513": ["--batch_tokens: expected multiples of 8 slices"],
    "--seed=99999999999999999999": ["--seed: expected zero or more and less than 2^63"],
    "--train_steps=900": ["--train_steps: expected about"],  # more than the data last for
}


@pytest.mark.parametrize("flag", FLAGS)
def test_unusable_settings_are_refused_in_one_line(folder, flag):
    refused(run(folder, flag), 2, *FLAGS[flag])
    assert not (folder / "logs").exists()


def unlink_training_shards(folder):
    for path in folder.glob("data/shakespeare/*train*"):
        path.unlink()


SHARDS = {
    "no training shard": (unlink_training_shards, "expected shards", "data.shakespeare"),
    "truncated": (
        lambda f: os.truncate(f / TRAIN, 5000), "expected 25,024 bytes", "found 5,000", "cut short"),
    "another vocabulary in validation": (
        lambda f: write_shard(f / VAL, np.full(9000, 50256)), "size 257, found 50256 at position 0"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_unusable_shards_are_refused_before_a_log_is_begun(folder, name):
    spoil, *parts = SHARDS[name]
    spoil(folder)
    refused(run(folder), 2, *parts)
    assert not (folder / "logs").exists()


def edit(change):
    """A change of the state in a checkpoint file."""
    def apply(path):
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return apply


def keep(path):
    pass


def make_folder(path):
    path.unlink()
    path.mkdir()


CHECKPOINTS = {
    "no such file": (Path.unlink, [], "no such file"),
    "not a checkpoint": (lambda p: p.write_text("step:1/4\n"), [], "another kind of file"),
    "a folder": (make_folder, [], "is a directory"),
    "tensors of another program": (lambda p: torch.save([torch.ones(2)], p), [], "another kind of file"),
    "truncated": (lambda p: os.truncate(p, p.stat().st_size // 2), [], "damaged"),
    "without loader": (edit(lambda state: state.pop("loader")), [], "differs in loader"),
    "without a weight": (edit(lambda state: state["model"].pop("attn_qk")), [], "attn_qk"),

    "settings of other types": (
        edit(lambda state: state.update(config={"slices": "many"})), [], "differs in"),
    "another width": (keep, ["--model_dim=64"], "model_dim 32 instead of 64; leave out --model_dim"),
    "another optimizer": (keep, ["--optimizer=adamw"], "leave out settings"),
    "another track": (keep, ["--track=small"], "--track: expected the checkpoint's track, shakespeare"),
    "fewer steps": (keep, ["--train_steps=3"], "--train_steps: expected at least the 4 steps", "found 3"),
    "other data": (
        edit(lambda state: state.update(data="another set")), [],
        "expected the training data of its run", "--force_data"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_unusable_checkpoints_are_refused_in_one_line(folder, saved, name):
    spoil, args, *parts = CHECKPOINTS[name]
    path = folder / "state.pt"
    path.write_bytes(checkpoint_of(saved))
    spoil(path)
    refused(run(folder, f"--resume={path}", *args), 2, *parts)


def test_a_checkpoint_goes_on_with_other_data_where_asked_to_and_a_seed_changes_nothing(folder, saved):
    path = folder / "state.pt"
    path.write_bytes(checkpoint_of(saved))
    edit(lambda state: state.update(data="another set"))(path)
    result = run(folder, f"--resume={path}", "--train_steps=6")
    assert (result.code, result.log) == (2, None)  # before a warm-up, which compiles for minutes on a GPU
    result = run(folder, f"--resume={path}", "--train_steps=6", "--seed=5", "--force_data")
    assert result.code == 0 and max(result.val) == 6
    told = "note: --seed has no effect on the weights of a resumed run, which come from the checkpoint\n"
    assert result.err == told


def test_a_screen_that_is_full_closed_or_without_such_characters_ends_no_run(tmp_path):
    folder = make_shards(tmp_path / "données [1]")  # nor does such a folder
    with open("/dev/full", "w") as full:
        with start(folder, *SHORT, stdout=full, preexec_fn=lambda: os.close(2)) as process:
            assert process.wait() == 0
    with start(folder, *SHORT, env={"PYTHONIOENCODING": "ascii"}) as process:
        out, err = process.communicate()
    assert (process.returncode, err) == (0, "") and "donn?es [1]/logs/" in out
    assert len(list(folder.glob("logs/*.txt"))) == 2


def test_too_few_open_files_are_one_sentence(capsys):
    def main(argv, stop):
        raise OSError(errno.EMFILE, "Too many open files")

    assert report(main, []) == 1
    assert capsys.readouterr().err == (
        "train_gpt.py: expected files to open and to write, found: Too many open files; raise the limit of "
        "open files (ulimit -n 1024) and start again\n")


def test_a_log_folder_that_cannot_be_written_is_refused(folder):
    (folder / "file").write_text("mine")
    result = run(folder, f"--log_dir={folder / 'file'}")
    refused(result, 2, "--log_dir: expected a folder to write to", "choose another one")
    assert (folder / "file").read_text() == "mine"


@pytest.mark.parametrize("rank", ["0", "3"])
def test_a_world_size_without_the_rest_of_torchruns_variables_is_refused(folder, monkeypatch, rank):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    refused(run(folder), 2, "torchrun's variables", "found no MASTER_ADDR", "unset WORLD_SIZE")


# ------------------------------------------------------------------------------------------------------------
# Failures on the way


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_saved(saved):
    before = contents(saved)
    bad = run(saved, "--muon_lr=1e30", "--adam_lr=1e30")
    refused(bad, 1, "finite", "found nan", "lower")
    assert "ended after step" in bad.log.splitlines()[-1]
    assert before.items() <= contents(saved).items()


def test_a_validation_loss_that_is_not_finite_ends_the_run(folder, monkeypatch):
    monkeypatch.setattr(train_gpt.Run, "evaluate", lambda self: float("nan"))
    refused(run(folder), 1, "step 0: expected a finite validation loss, found nan")


class Full:
    """A log file on a disk that is full after step 2."""

    def __init__(self, file):
        self.file = file

    def write(self, text):
        if text.startswith("step:3/"):
            raise OSError(errno.ENOSPC, "No space left on device")
        self.file.write(text)

    def close(self):
        self.file.close()


def test_a_log_that_cannot_grow_ends_the_run_with_one_message(folder, monkeypatch):
    header = Log.header

    def with_full_disk(self, *args):
        header(self, *args)
        self.file = Full(self.file)

    monkeypatch.setattr(Log, "header", with_full_disk)
    refused(run(folder), 1, "expected to write the log, found: No space left on device", "--resume=latest")


def test_a_run_goes_on_when_nobody_reads_its_output_any_more(folder):
    with start(folder) as process:
        path = Path(process.stdout.readline().strip())
        process.stdout.close()
        assert (process.wait(), process.stderr.read()) == (0, "")
    assert "step:12/12 val_loss" in path.read_text()


def test_an_error_of_the_program_itself_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        report(lambda argv, stop: 1 // 0, [])


# ------------------------------------------------------------------------------------------------------------
# On two ranks


def one_voice(ranks: list):
    """The result of the rank that speaks for all, which end alike."""
    assert len({result.code for result in ranks}) == 1
    speaker, = [result for result in ranks if result.err]
    return speaker


def test_two_ranks_end_with_one_message(saved):
    (saved / "file").write_text("mine")
    checkpoint, = saved.glob("logs/*/*.pt")
    for args, part in (
        (["--trian_steps=5"], "did you mean"),
        (["--slices=5", "--batch_tokens=500"], "world size: expected one of 1, 5"),
        ([f"--log_dir={saved / 'file'}"], "--log_dir"),
        ([f"--resume={checkpoint}", "--optimizer=adamw"], "leave out settings"),
        (["--train_files=nowhere/*.bin"], "expected shards"),
    ):
        refused(one_voice(run_ranks(2, on_rank, saved, args)), 2, part)


def full_disk(rank):
    """Files of this process may not grow beyond 400 kB, which logs do not reach and checkpoints do."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))


def test_a_full_disk_is_a_warning_at_a_periodic_save_and_an_error_at_the_final_one(saved):
    before = contents(saved)
    ranks = run_ranks(2, on_rank, saved, ["--save_every=4", "--save_final=1"], full_disk)
    refused(one_voice(ranks), 1, "expected to write a checkpoint, found: File too large", "free some space")
    warnings = [line for line in ranks[0].log.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 3 and "found: File too large" in warnings[0]
    assert "step:12/12 val_loss:" in ranks[0].log  # not lost with the weights
    after = contents(saved)
    assert before.items() <= after.items()
    assert {path.suffix for path in set(after) - set(before)} == {".txt"}


def non_finite_on_one(rank):
    """Rank 1 meets a NaN in its second step."""
    accumulate = train_gpt.Run.accumulate

    def spoiled(self, batches, step, upcoming=None):
        training = self.clock.started is not None  # not in the warm-up
        loss = accumulate(self, batches, step, upcoming)
        return loss * torch.nan if rank == 1 and training and step == 1 else loss

    train_gpt.Run.accumulate = spoiled


def test_a_loss_that_is_not_finite_on_one_rank_ends_both(folder):
    result = one_voice(run_ranks(2, on_rank, folder, [], non_finite_on_one))
    refused(result, 1, "step 2: expected a finite training loss, found nan")


def die_in_step_three(launched, rank):
    if launched:
        os.environ["LAUNCHED_BY"] = "tools.launch"
    train_step = train_gpt.Run.train_step

    def step(self):
        if rank == 1 and self.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(self)

    train_gpt.Run.train_step = step


@pytest.mark.parametrize("launched", [False, True])
def test_when_one_rank_dies_the_other_one_says_so_or_leaves_it_to_the_launcher(folder, launched):
    ranks = Ranks(2, on_rank, folder, [], partial(die_in_step_three, launched))
    survivor, dead = ranks.join()
    assert dead is None and ranks.processes[1].exitcode == -signal.SIGKILL
    if launched:
        assert (survivor.code, survivor.err) == (3, "")
    else:
        refused(survivor, 1, "expected all ranks to go on, found one gone")
