"""Tiny runs of the trainer's main on one rank, in this process or in forked ones: shards, losses, logs, exit codes."""

import contextlib
import io
import multiprocessing
import os
import pickle
import re
import socket
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # here and in the fork server, which inherits it
import numpy as np
import pytest
import torch
import torch._dynamo  # noqa: F401  the first optimizer imports it, which is 2 s: once in the fork server, not in each rank
import torch.distributed as dist

from engine import endings, log as engine_log
import train_gpt
from data.shards import write_shard

ROOT = Path(__file__).resolve().parents[2]
BOS = 256
TINY = """--track=shakespeare --num_layers=3 --model_dim=32 --head_dim=16 --long_layers=1 --cache_layer=1 --skip=0,2
    --value_embed_layers=0,2 --attn_gate_layers=1 --xsa_layers=1 --paired_layers=0 --bigram_rows=64 --batch_tokens=512
    --slices=8 --max_doc_len=64 --split_docs=0 --window_short=8,16 --window_long=16,32 --window_final=32 --val_tokens=1024
    --val_slice=256 --train_steps=12 --extension_steps=2 --val_every=4
    --adam_every=1 --max_epochs=4 --target_loss=1.6""".split()
STEP_LINE = re.compile(r"^step:(\d+)/(\d+)((?: [A-Za-z_]+:\S+)+)\s*$")  # of the public logs
TRAIN_KEYS, VAL_KEYS = ["train_time", "step_avg"], ["val_loss", "train_time", "step_avg"]


def documents(num_tokens: int, seed: int, shortest: int = 5, longest: int = 120) -> np.ndarray:
    """Documents of easily learned letters: each letter is likely followed by the next one of the alphabet."""
    rng, parts = np.random.default_rng(seed), []
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


def config(*args: str) -> train_gpt.Config:
    _, changes = train_gpt.parse_config([*TINY, *args])
    return train_gpt.Config.for_track(changes.pop("track"), **changes)


@contextlib.contextmanager
def recorded():
    """Yield (training losses, validation losses) of runs of this process meanwhile, unrounded."""
    train, val = {}, {}
    log_train, log_validation = engine_log.Log.train, engine_log.Log.validation

    def spy_train(self, step, total, ms, loss, *rest):
        train[step] = loss
        log_train(self, step, total, ms, loss, *rest)

    def spy_validation(self, step, total, ms, loss):
        val[step] = loss
        log_validation(self, step, total, ms, loss)

    engine_log.Log.train, engine_log.Log.validation = spy_train, spy_validation
    try:
        yield train, val
    finally:
        engine_log.Log.train, engine_log.Log.validation = log_train, log_validation


def run(folder: Path, *args: str) -> SimpleNamespace:
    """One run with data and logs in folder, in this process: code, out, err, train, val, log (text), checkpoints (sorted)."""
    out, err, before = io.StringIO(), io.StringIO(), os.environ.get("DATA_PATH")
    logs, known = folder / "logs", set(folder.glob("logs/*"))
    os.environ["DATA_PATH"] = str(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), recorded() as (train, val):
            settings = () if any(arg.startswith("--resume") for arg in args) else TINY  # a checkpoint has its own
            code = endings.report(train_gpt.main, [*settings, f"--log_dir={logs}", *args])
    finally:
        os.environ.pop("DATA_PATH") if before is None else os.environ.update(DATA_PATH=before)
    new = [p for p in sorted(set(folder.glob("logs/*")) - known) if p.suffix == ".txt"]
    return SimpleNamespace(
        code=code,
        out=out.getvalue(),
        err=err.getvalue(),
        train=train,
        val=val,
        log=new[0].read_text() if new else None,
        checkpoints=sorted(new[0].with_suffix("").glob("*.pt")) if new else [],
    )


def _rank(rank: int, world: int, ports: list[int], folder: str, commands, hook, results: str, env: dict):
    """Body of a forked process: run each command with a process group of its own."""
    torch.set_num_threads(1)
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    done = []
    for port, (size, args) in zip(ports, commands):
        if rank < size:
            os.environ.update(WORLD_SIZE=str(size), MASTER_PORT=str(port))
            if hook:
                hook(rank)
            done.append(run(Path(folder), *args))
            if dist.is_initialized():
                dist.destroy_process_group()
        else:
            done.append(None)
        with open(f"{results}/{rank}.partial", "wb") as file:
            pickle.dump(done, file)
        os.replace(f"{results}/{rank}.partial", f"{results}/{rank}")
    sys.stdout.flush()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Ranks:
    """commands, a list of (world size, arguments), run one after another by forked ranks. hook(rank) runs on each rank
    before each command. `results()[command][rank]` is what run() returns, None for a rank that did not get that far."""

    def __init__(self, folder: Path, commands, hook=None, **env: str):
        world = max(size for size, _ in commands)
        context = multiprocessing.get_context(
            "forkserver"
        )  # a fork of a process that has torch takes no 3 s to import it
        context.set_forkserver_preload(["tests.helpers.runs"])
        with pytest.MonkeyPatch.context() as patch:  # before Python 3.14 the server's imports ignore sys.path
            patch.setenv("PYTHONPATH", f"{ROOT}")
            forkserver.ensure_running()
        self.files, self.num_commands = tempfile.TemporaryDirectory(), len(commands)
        ports = [free_port() for _ in commands]
        self.processes = [
            context.Process(
                target=_rank, args=(rank, world, ports, str(folder), commands, hook, self.files.name, env), daemon=True
            )
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def results(self, timeout: float = 90) -> list[list[SimpleNamespace | None]]:
        table = []
        for rank, process in enumerate(self.processes):
            process.join(timeout)
            assert process.exitcode is not None, (process.kill(), f"rank {rank} still runs after {timeout} s")[1]
            path = Path(self.files.name, str(rank))
            done = pickle.loads(path.read_bytes()) if path.exists() else []
            table.append(done + [None] * (self.num_commands - len(done)))
        return [list(row) for row in zip(*table)]


def step_lines(text: str) -> list[tuple[int, int, dict[str, str]]]:
    """(step, total, {key: value}) of each step line of a log or of what a run printed."""
    return [
        (int(m[1]), int(m[2]), dict(pair.split(":", 1) for pair in m[3].split()))
        for m in map(STEP_LINE.match, text.splitlines())
        if m
    ]


def launch(folder: Path, *args: str) -> subprocess.Popen:
    """The real thing: launch.py with two ranks, once it has trained three steps of a long run."""
    env = {**os.environ, "DATA_PATH": str(folder), "NPROC": "2", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        *TINY,
        "--train_files=data/shakespeare/shakespeare_train_*.bin",
        f"--log_dir={folder / 'logs'}",
        "--train_steps=2000",
        "--max_epochs=1000",
        *args,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.launch", *command],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    for line in process.stdout:
        if line.startswith("step:3/"):
            return process
    raise AssertionError(process.communicate()[1])
