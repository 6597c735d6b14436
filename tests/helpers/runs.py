"""Tiny runs of the trainer's main, in this process, on forked ranks, or as a user starts them."""
import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # here, and in all that is started from here
import numpy as np

import train_gpt
from data.files import ROOT
from data.shards import write_shard
from engine import endings
from engine.log import Log
from engine.settings import show_value

BOS = 256
SETTINGS = dict(  # three narrow layers with every role of track small, a dozen steps
    track="shakespeare", recipe="miniature", num_layers=3, model_dim=32, head_dim=16, long_layers=(1,),
    cache_layer=1, skip=(0, 2), value_embed_layers=(0, 2), attn_gate_layers=(1,), xsa_layers=(1,),
    paired_layers=(0,), bigram_rows=64, ngram_rows=0, batch_tokens=(512,), slices=8, max_doc_len=(64,),
    split_docs=0, window_short=(8, 16), window_long=(16, 32), window_final=32, val_tokens=1024,
    val_slice=256, val_every=4, train_steps=12, extension_steps=2, adam_every=1, max_epochs=4,
    target_loss=1.6, mtp_weights=(1.0, 0.5, 0.25), untie_stage=2, untie_delay=0, sample_tokens=0,
    products="float32")  # the same on every processor
TINY = [f"--{name}={show_value(value)}" for name, value in SETTINGS.items()]
STEP_LINE = re.compile(r"^step:(\d+)/(\d+)((?: [A-Za-z_]+:\S+)+)\s*$")  # of the public logs


def config(*flags: str) -> train_gpt.Config:
    """Return the settings of a tiny run with these flags."""
    _, changes = train_gpt.parse_config([*TINY, *flags])
    return train_gpt.Config.for_track(changes.pop("track"), **changes)


def documents(num_tokens: int, seed: int, shortest: int = 5, longest: int = 120) -> np.ndarray:
    """Return documents of easily learned letters: each is likely followed by the next one of the alphabet."""
    rng = np.random.default_rng(seed)
    parts = []
    while sum(map(len, parts)) < num_tokens:
        n = rng.integers(shortest, longest)
        letters = 97 + (rng.integers(26) + np.cumsum(rng.random(n) < 0.9)) % 26
        parts.append(np.concatenate([[BOS], letters]))
    return np.concatenate(parts)[:num_tokens].astype(np.uint16)


def make_shards(folder: Path, tokens: int = 12_000, shards: int = 2) -> Path:
    for i in range(shards):
        write_shard(folder / f"data/shakespeare/shakespeare_train_{i:06d}.bin", documents(tokens, i))
    write_shard(folder / "data/shakespeare/shakespeare_val_000000.bin", documents(1500, 99))
    return folder


def step_lines(text: str) -> list[tuple[int, int, dict[str, str]]]:
    """Return (step, total, {key: value}) of each step line of a log or of what a run printed."""
    matches = filter(None, map(STEP_LINE.match, text.splitlines()))
    return [(int(m[1]), int(m[2]), dict(pair.split(":", 1) for pair in m[3].split())) for m in matches]


# ------------------------------------------------------------------------------------------------------------
# In this process, and on forked ranks


@contextlib.contextmanager
def recorded():
    """Yield ({step: training loss}, {step: validation loss}) of runs of this process meanwhile, unrounded."""
    train, val = {}, {}
    log_train, log_validation = Log.train, Log.validation

    def spy_train(self, step, total, ms, loss, *rest):
        train[step] = loss
        log_train(self, step, total, ms, loss, *rest)

    def spy_validation(self, step, total, ms, loss):
        val[step] = loss
        log_validation(self, step, total, ms, loss)

    Log.train, Log.validation = spy_train, spy_validation
    try:
        yield train, val
    finally:
        Log.train, Log.validation = log_train, log_validation


def run(folder: Path, *args: str) -> SimpleNamespace:
    """Run main in this process with data and logs in folder.

    Returns code, out, err, train and val (losses by step), log (text), checkpoints (sorted paths).
    """
    out, err = io.StringIO(), io.StringIO()
    logs = folder / "logs"
    known = set(logs.glob("*.txt"))
    settings = [] if any(arg.startswith("--resume") for arg in args) else TINY  # a checkpoint has its own
    before = os.environ.get("DATA_PATH")
    os.environ["DATA_PATH"] = str(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), recorded() as (train, val):
            code = endings.report(train_gpt.main, [*settings, f"--log_dir={logs}", *args])
    finally:
        if before is None:
            del os.environ["DATA_PATH"]
        else:
            os.environ["DATA_PATH"] = before
    new = sorted(set(logs.glob("*.txt")) - known)
    return SimpleNamespace(
        code=code,
        out=out.getvalue(),
        err=err.getvalue(),
        train=train,
        val=val,
        log=new[0].read_text() if new else None,
        checkpoints=sorted(new[0].with_suffix("").glob("*.pt")) if new else [])


def on_rank(rank: int, world: int, folder: Path, args: list[str], hook=None) -> SimpleNamespace:
    """Run main on one of several ranks, for run_ranks and Ranks. hook(rank) is called before."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="nowhere", MASTER_PORT="0")  # the ranks have met already
    if hook:
        hook(rank)
    return run(folder, *args)


# ------------------------------------------------------------------------------------------------------------
# As a user starts it


@contextlib.contextmanager
def start(folder: Path, *args: str, program=("train_gpt.py",), cwd=ROOT, env=None, **pipes):
    """Start a tiny run by its command, with data and logs in folder. Yields its Popen, and ends it after."""
    command = [sys.executable, *program, *TINY, f"--log_dir={folder / 'logs'}", *args]
    variables = {**os.environ, "DATA_PATH": str(folder), "CUDA_VISIBLE_DEVICES": "", **(env or {})}
    pipes = pipes or dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=cwd, env=variables, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def launch(folder: Path, *args: str):
    """Start a long run by the launcher on two ranks. Yields its Popen once it has trained three steps."""
    own_data = "--train_files=data/shakespeare/shakespeare_train_*.bin"  # nothing is to be prepared
    long = own_data, "--train_steps=20000", "--max_epochs=10000"
    with start(folder, *long, *args, program=("-m", "tools.launch"), env={"NPROC": "2"}) as process:
        for line in process.stdout:
            if line.startswith("step:3/"):
                break
        else:
            raise AssertionError(process.communicate()[1])
        yield process
