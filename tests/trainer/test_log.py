"""The log, readable by parsers of the public logs, and what a run shows: on a terminal, in a pipe, in Weights
& Biases."""
import dataclasses
import json
import os
import re
import subprocess
import sys
import types
import uuid
from pathlib import Path

import pytest

from data.files import ROOT
from engine.adam import adam_update_in_pieces_
from engine.head_loss import summed_cross_entropy
from engine.kernels import keep_compiled
from engine.log import SOURCES
from tests.helpers.runs import config, run, start, step_lines
from tests.helpers.tiny import make_run

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
TRAIN_KEYS, VAL_KEYS = ["train_time", "step_avg"], ["val_loss", "train_time", "step_avg"]
NUMBERS = {"val_loss": r"\d+\.\d{4}", "train_time": r"\d+ms", "step_avg": r"\d+\.\d\dms"}
FLAGS = ["--seed=3", "--wandb=speed"]


class FakeWandb:
    """Stands for the module wandb, and for its run; notes what it is told."""
    Error = RuntimeError
    Settings = staticmethod(lambda **settings: settings)

    def __init__(self):
        self.settings, self.points, self.exit_code = None, {}, None

    def init(self, **settings):
        self.settings = settings
        return types.SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, values, step):
        self.points.setdefault(step, {}).update(values)

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture(scope="module")
def wandb():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", fake := FakeWandb())
        yield fake


@pytest.fixture(scope="module")
def result(folder, wandb):
    result = run(folder, *FLAGS)
    assert (result.code, result.err) == (0, "")
    return result


def test_step_lines_follow_the_public_grammar(result):
    lines = step_lines(result.log)
    expected = [(step, False) for step in range(1, 13)] + [(step, True) for step in (0, 4, 8, 12)]
    assert [(step, "val_loss" in pairs) for step, _, pairs in lines] == sorted(expected)
    for step, total, pairs in lines:
        assert total == 12 and list(pairs) == (VAL_KEYS if "val_loss" in pairs else TRAIN_KEYS)
        assert all(re.fullmatch(NUMBERS[key], value) for key, value in pairs.items())
        if "val_loss" in pairs:
            assert pairs["val_loss"] == f"{result.val[step]:.4f}"
        ms, average = float(pairs["train_time"][:-2]), float(pairs["step_avg"][:-2])
        assert abs(ms - average * max(step, 1)) <= 0.5 + 0.005 * max(step, 1)
    times = [int(pairs["train_time"][:-2]) for _, _, pairs in lines]
    assert times == sorted(times)
    mean = sum(result.train[step] for step in range(1, 11)) / 10
    assert f"\ntraining loss until step 10: {mean:.4f} (mean of 10)\n" in result.log
    # Sources hold such text too, but never a number after step: at the start of a line.
    assert len(re.findall(r"^step:\d", result.log, re.M)) == len(lines)


def test_the_log_has_the_name_that_is_printed_first_and_starts_with_the_sources(folder, result):
    sources, header, steps = re.split(r"^={100}$", result.log, flags=re.M)
    path = Path(result.out.splitlines()[0])
    assert path.parent == folder / "logs" and path.read_text() == result.log
    assert uuid.UUID(path.stem).version == 4 and path.suffix == ".txt"
    first, *others = re.split(r"^-{40}\n# (\S+)\n-{40}\n", sources, flags=re.M)
    texts = {"train_gpt.py": first, **dict(zip(others[::2], others[1::2]))}
    assert list(texts) == list(SOURCES)
    for name, text in texts.items():
        assert text == (ROOT / name).read_text(encoding="utf-8") + "\n", name
    assert step_lines(steps) == step_lines(result.log)


def test_the_log_says_what_the_time_before_the_first_step_went_to(result):
    total, account = re.search(r"^start-up: ([\d.]+) s: (.*)$", result.log, re.M).groups()
    parts = {name: float(s) for name, s in re.findall(r"([a-z][a-z 0-9]*?) ([\d.]+)(?:, |$)", account)}
    assert list(parts)[0] == "imports and ranks" and list(parts)[-1] == "validation" and "stage 0" in parts
    assert abs(sum(parts.values()) - float(total)) < 0.06 * len(parts)  # as they are rounded


def test_the_header_tells_what_ran(folder, result):
    header = result.log.split("=" * 100)[1]
    settings = json.loads(re.search(r"^config: (.*)$", header, re.M)[1])
    expected = dataclasses.asdict(config(*FLAGS, f"--log_dir={folder / 'logs'}"))
    assert settings == json.loads(json.dumps(expected))
    for pattern in (
        r"^Running Python \S+",
        r"^Running PyTorch \S+ compiled for CUDA \S+ on CPU.* with world_size 1$",
        r"^commit: ([0-9a-f]{40}|unknown)( with changes)?$",
        r"^seed: 3$",
        r"^Muon: \d+ matrices in 1 buckets over 1 ranks, planned balance 1.000$",
        r"^Muon's share of the FLOPs of a step, as planned: \d+\.\d% at 512 tokens",
        r"^Newton-Schulz of Muon: float32, symmetric products by torch, as always on a CPU$",
        r"^attention: blocked \(fastest on a CPU\)",
        r"^training data: 6,144 tokens from 2 shards, fingerprint [0-9a-f]{16}$",
        r"^validation data: first 1024 tokens, sha256 [0-9a-f]{64}$",
        r"^parameters: [\d,]+, ",
    ):
        assert re.search(pattern, header, re.M), pattern


def test_weights_and_biases_gets_settings_and_points(folder, result, wandb):
    assert wandb.settings["project"] == "speed" and wandb.settings["name"] in result.out.splitlines()[0]
    assert wandb.settings["config"] == dataclasses.asdict(config(*FLAGS, f"--log_dir={folder / 'logs'}"))
    for name, losses in (("val_loss", result.val), ("train_loss", result.train)):
        assert {step: point[name] for step, point in wandb.points.items() if name in point} == losses
    assert {step for step, point in wandb.points.items() if "train_time_ms" in point} == set(result.val)
    assert wandb.exit_code == 0


def test_weights_and_biases_learns_that_a_run_failed(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    assert run(folder, *FLAGS, "--muon_lr=1e30", "--adam_lr=1e30").code == fake.exit_code == 1


def test_weights_and_biases_out_of_reach_is_one_sentence(folder, monkeypatch):
    def init(settings, **others):
        assert settings["init_timeout"] == 20  # seconds; by itself it would try for more than a minute
        raise FakeWandb.Error("no network\nat all")

    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    fake.init = init
    result = run(folder, *FLAGS)
    assert result.code == 2 and len(result.err.splitlines()) == 1
    assert "--wandb: expected to reach Weights & Biases, found: no network; run wandb login" in result.err


def test_weights_and_biases_works_offline(folder, tmp_path):
    pytest.importorskip("wandb")
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "HOME": str(tmp_path)}
    program = [str(ROOT / "train_gpt.py")]
    with start(folder, "--wandb=speed", "--train_steps=4", program=program, cwd=tmp_path, env=env) as process:
        out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    file, = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    loss = step_lines(out)[-1][2]["val_loss"]
    for word in ("val_loss", "train_time_ms", "muon_lr", loss[:4]):
        assert word.encode() in content


def test_in_a_pipe_there_are_plain_lines_and_no_chatter(folder):
    """A user starts it so. Standard error stays empty: no warning of a library gets through."""
    with start(folder, "--sample_tokens=20", env={"PYTHONWARNINGS": "default"}) as process:
        out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    first, *shown, target, reached, last = out.splitlines()
    steps, (bits, *text) = shown[:16], shown[16:]
    assert len(step_lines("\n".join(steps))) == len(step_lines(out)) == 16
    assert bits.startswith("bits per byte: ") and text and all(line.startswith("> ") for line in text)
    assert target.startswith("target: ") and reached == "reached: no" and last == f"log: {first}"
    logged = Path(first).read_text().splitlines()
    assert [line for line in logged if line.startswith("step:")] == steps
    assert logged[-1 - len(text):] == [bits, *text]


def read_terminal(fd: int) -> str:
    """Return all that is written to a terminal until its other side is closed."""
    shown = b""
    while True:
        try:
            piece = os.read(fd, 65536)
        except OSError:
            piece = b""
        if not piece:
            return shown.decode().replace("\r\n", "\n")
        shown += piece


def test_on_a_terminal_there_is_a_progress_bar(folder):
    """It shows loss, tokens per second and time left; the validations stay as lines above it."""
    import fcntl
    import pty
    import struct
    import termios

    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    flags = "--train_steps=40", "--max_epochs=9", "--val_every=20"
    env = {"TERM": "xterm", "TQDM_MININTERVAL": "0"}  # a look at every step, however fast they are
    with start(folder, *flags, env=env, stdin=side, stdout=side, stderr=side) as process:
        os.close(side)
        shown = read_terminal(main)
        assert process.wait() == 0
    os.close(main)
    assert re.search(r"%\|.*\| \d+/40 \[\d\d:\d\d<\d\d:\d\d, .*loss \d+\.\d{3}, [\d,]+ tokens/s\]", shown)
    lines = [line.rpartition("\r")[2].replace("\x1b[A", "").strip() for line in shown.split("\n")]
    first, *steps, bits, target, reached, last = filter(None, lines)  # what is left to see
    assert first.startswith(str(folder)) and last == f"log: {first}"
    assert [line.split()[0] for line in steps] == ["step:0/40", "step:20/40", "step:40/40"]
    assert len(step_lines(Path(first).read_text())) == 43  # the file has the training lines too


def test_a_terminal_that_is_closed_does_not_end_a_run(folder):
    import pty

    main, side = pty.openpty()
    known = set((folder / "logs").glob("*.txt"))
    with start(folder, "--train_steps=40", "--max_epochs=9", stdin=side, stdout=side, stderr=side) as process:
        os.close(side)
        os.read(main, 1)
        os.close(main)  # from here on whatever is written to it is an error
        assert process.wait() == 0
    path, = set((folder / "logs").glob("*.txt")) - known
    assert step_lines(path.read_text())[-1][0] == 40


def test_on_a_cpu_the_model_is_the_only_graph(tmp_path):
    run = make_run(tmp_path, compile="on")
    assert run.kernels.compiled and not run.muon.compile
    assert run.adam.update is adam_update_in_pieces_
    assert run.model.cross_entropy is summed_cross_entropy


def test_compiled_graphs_are_kept_beside_the_sources_unless_a_folder_is_named(monkeypatch):
    import torch._functorch.config

    ours = "autograd_cache_allow_custom_autograd_functions"  # without it the head's loss would not be kept
    monkeypatch.setattr(torch._functorch.config, ours, False)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(ROOT / ".cache/compile")
    assert getattr(torch._functorch.config, ours)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"


def test_a_process_that_compiles_nothing_before_keeps_its_graphs_beside_the_sources():
    program = ("from engine.kernels import keep_compiled; keep_compiled(); "
               "from torch._inductor.runtime.cache_dir_utils import cache_dir; print(cache_dir())")
    env = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    assert found.stdout == f"{ROOT / '.cache/compile'}\n", found.stderr
