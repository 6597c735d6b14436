"""The log, readable by parsers of the public logs, and what a run shows: on a terminal, piped, in Weights & Biases."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import types
import uuid

import pytest
from tests.helpers.runs import ROOT, TINY, TRAIN_KEYS, VAL_KEYS, config, make_shards, run, step_lines

from engine import log as engine_log
from engine.kernels import keep_compiled

NUMBERS = {"val_loss": r"\d+\.\d{4}", "train_time": r"\d+ms", "step_avg": r"\d+\.\d\dms"}  # of the public small track


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module")
def result(folder):
    result = run(folder, "--seed=3")
    assert (result.code, result.err) == (0, "")
    return result


def test_the_path_is_printed_first_and_names_a_uuid4(folder, result):
    path = result.out.splitlines()[0]
    assert os.path.dirname(path) == str(folder / "logs") and open(path).read() == result.log
    assert uuid.UUID(os.path.basename(path).removesuffix(".txt")).version == 4


def test_step_lines_follow_the_public_grammar(result):
    lines = step_lines(result.log)
    assert [(step, "val_loss" in pairs) for step, _, pairs in lines] == [
        (step, val) for step in range(13) for val in (False, True) if (step > 0 or val) and (step % 4 == 0 or not val)
    ]
    for step, total, pairs in lines:
        assert total == 12 and list(pairs) == (VAL_KEYS if "val_loss" in pairs else TRAIN_KEYS)
        assert all(re.fullmatch(NUMBERS[key], value) for key, value in pairs.items())
        if "val_loss" in pairs:
            assert pairs["val_loss"] == f"{result.val[step]:.4f}"
        ms, average = float(pairs["train_time"][:-2]), float(pairs["step_avg"][:-2])
        assert abs(ms - average * max(step, 1)) <= 0.5 + 0.005 * max(step, 1)
    times = [int(pairs["train_time"][:-2]) for _, _, pairs in lines]
    assert times == sorted(times)


def test_no_other_line_looks_like_a_step_line(result):
    """Sources hold such text too, but never a number after step: at the start of a line."""
    assert len(re.findall(r"^step:\d", result.log, re.M)) == len(step_lines(result.log)) == 16


def test_the_log_starts_with_the_sources(result):
    sources, header, steps = re.split(r"^={100}$", result.log, flags=re.M)
    parts = re.split(r"^-{40}\n# (\S+)\n-{40}\n", sources, flags=re.M)
    names, texts = ["train_gpt.py", *parts[1::2]], parts[0::2]
    assert names == list(engine_log.SOURCES) and {"muon.py", "engine/head_loss.py", "data/loader.py"} <= set(names)
    for name, text in zip(names, texts):
        assert text == (ROOT / name).read_text(encoding="utf-8") + "\n", name
    assert step_lines(steps) == step_lines(result.log)


def test_the_log_says_what_the_time_before_the_first_step_went_to(result):
    total, parts = re.search(r"^start-up: ([\d.]+) s: (.*)$", result.log, re.M).groups()
    parts = {name: float(s) for name, s in re.findall(r"([a-z][a-z 0-9]*?) ([\d.]+)(?:, |$)", parts)}
    assert list(parts)[0] == "imports and ranks" and list(parts)[-1] == "validation" and "stage 0" in parts
    assert 0.1 < parts["imports and ranks"] < float(total)  # torch alone takes that long
    assert abs(sum(parts.values()) - float(total)) < 0.06 * len(parts)  # as they are rounded


def test_compiled_graphs_are_kept_beside_the_sources_unless_a_folder_is_named(monkeypatch):
    import torch._functorch.config

    allowed = "autograd_cache_allow_custom_autograd_functions"
    monkeypatch.setattr(torch._functorch.config, allowed, False)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(ROOT / ".cache/compile") and getattr(torch._functorch.config, allowed)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"


def test_the_header_tells_what_ran(folder, result):
    header = result.log.split("=" * 100)[1]
    assert re.search(r"^Running [pP]ython (\S+)", header, re.M)
    torch_line = re.search(
        r"^Running [pP]y[tT]orch (\S+) compiled for CUDA (\S+)(?: on (.+?)\s+with world_size (\d+))?\s*$", header, re.M
    )
    assert torch_line[4] == "1" and torch_line[3].startswith("CPU")
    settings = json.loads(re.search(r"^config: (.*)$", header, re.M)[1])
    expected = dataclasses.asdict(config("--seed=3", f"--log_dir={folder / 'logs'}"))
    assert settings == json.loads(json.dumps(expected))
    for pattern in (
        r"^commit: ([0-9a-f]{40}|unknown)( with changes)?$",
        r"^seed: 3$",
        r"^Muon: \d+ matrices in 1 buckets over 1 ranks, planned balance 1.000$",
        r"^symmetric products for Muon: torch",
        r"^attention: blocked \(fastest on a CPU\)",
        r"^training data: 6,144 tokens from 2 shards, fingerprint [0-9a-f]{16}$",
        r"^validation data: first 1024 tokens, sha256 [0-9a-f]{64}$",
        r"^parameters: [\d,]+, ",
    ):
        assert re.search(pattern, header, re.M), pattern


def test_no_peak_memory_on_a_cpu(result):
    assert not re.search(r"^peak memory", result.log, re.M)


def test_a_gpu_log_ends_with_the_peak_memory_line_of_the_public_logs():
    line = re.search(r'log.write\(f"(peak memory allocated: .*?)"\)', (ROOT / "train_gpt.py").read_text())[1]
    assert re.fullmatch(r"peak memory allocated: (\d+) MiB reserved: (\d+) MiB", re.sub(r"\{.*?\}", "17", line))


def test_in_a_pipe_there_are_plain_lines_and_no_chatter(folder):
    """As a user starts it. Standard error stays empty: no warning of a library gets through."""
    env = {**os.environ, "DATA_PATH": str(folder), "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "default"}
    done = subprocess.run(
        [sys.executable, "train_gpt.py", *TINY, f"--log_dir={folder / 'logs'}"],
        cwd=ROOT,
        env=env,
        text=True,
        capture_output=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")
    first, *steps, target, reached, log = done.stdout.splitlines()
    assert [line.split()[0] for line in steps] == [f"step:{step}/12" for step, _, _ in step_lines(done.stdout)] and len(
        steps
    ) == 16
    assert target.startswith("target: ") and reached == "reached: no" and log == f"log: {first}"
    assert open(first).read().endswith("\n".join([*steps, ""]))


def test_on_a_terminal_there_is_a_progress_bar(folder):
    """With loss, tokens per second and time left; the validations stay as lines above it."""
    import fcntl
    import pty
    import struct
    import termios

    env = {**os.environ, "DATA_PATH": str(folder), "CUDA_VISIBLE_DEVICES": "", "TERM": "xterm"}
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    process = subprocess.Popen(
        [
            sys.executable,
            "train_gpt.py",
            *TINY,
            "--train_steps=40",
            "--max_epochs=9",
            "--val_every=20",
            f"--log_dir={folder / 'logs'}",
        ],
        cwd=ROOT,
        env=env,
        stdin=side,
        stdout=side,
        stderr=side,
    )
    os.close(side)
    shown = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        shown += piece
    os.close(main)
    assert process.wait(30) == 0
    shown = shown.decode().replace("\r\n", "\n")
    assert re.search(r"\d+%\|.*\| \d+/40 \[\d\d:\d\d<\d\d:\d\d, .*loss \d+\.\d{3}, [\d,]+ tokens/s\]", shown)
    lines = [
        line.rpartition("\r")[2].replace("\x1b[A", "").strip() for line in shown.split("\n")
    ]  # what is left to see
    left = [line for line in lines if line]
    assert left[0].startswith(str(folder)) and left[-1] == f"log: {left[0]}"
    assert [line.split()[0] for line in left[1:-3]] == [
        "step:0/40",
        "step:20/40",
        "step:40/40",
    ] and "train_time" in left[1]
    log = open(left[0]).read()
    assert len(step_lines(log)) == 43  # the file has the training lines too


def test_weights_and_biases_gets_settings_and_points(folder, monkeypatch):
    calls = []

    class FakeRun:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self, exit_code):
            calls.append(("finish", exit_code))

    def init(**kwargs):
        calls.append(("init", kwargs))
        return FakeRun()

    fake = types.SimpleNamespace(init=init, Settings=lambda **kwargs: kwargs, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    result = run(folder, "--wandb=speed")
    (_, settings), *points, finish = calls
    assert settings["project"] == "speed" and settings["name"] in result.out.splitlines()[0]
    assert settings["config"] == dataclasses.asdict(config("--wandb=speed", f"--log_dir={folder / 'logs'}"))
    assert {step: values["val_loss"] for step, values in points} == result.val and finish == ("finish", 0)
    assert all(values["train_time_ms"] >= 0 for _, values in points)


def test_weights_and_biases_works_offline(folder, tmp_path):
    pytest.importorskip("wandb")
    env = {
        **os.environ,
        "DATA_PATH": str(folder),
        "CUDA_VISIBLE_DEVICES": "",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py"), *TINY, "--wandb=speed", f"--log_dir={folder / 'logs'}"],
        cwd=tmp_path,
        env=env,
        text=True,
        capture_output=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")
    [file] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert all(word in content for word in (b"val_loss", b"train_time_ms", b"muon_lr"))
    loss = step_lines(done.stdout)[-1][2]["val_loss"]
    assert loss[:4].encode() in content
