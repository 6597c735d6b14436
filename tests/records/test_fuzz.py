"""Mutated logs: no crash, no hang, nothing unbounded, whatever is in them.

    RECORDS_FUZZ=100000 python -m pytest tests/records/test_fuzz.py      # so many mutations instead of 1,000
"""
import io
import json
import math
import os
import random
import subprocess
import sys

import pytest
from pydantic_core import to_json
from tests.helpers.synthetic import LINE, VARIANTS, make, own

from data.files import ROOT
from records import logs, show

NASTY = [  # inserted anywhere, as a line of its own or inside one
    b"\0", b"\xff\xfe", b"\r", b"\n", b"\xe2\x80\xa8", b"\x1b[2J", LINE.encode(), b"=" * 99, b"-" * 40,
    b"# ../../evil.py",
    b"\n" + b"-" * 40 + b"\n# muon.py\n" + b"-" * 40 + b"\n", b"step:", b"step:5/10 ",
    b"step:5/10 val_loss:1.0 train_time:1ms",
    b"step:1" + b"0" * 30 + b"/10 val_loss:1.0 train_time:1ms", b"step:0/0 val_loss:nan train_time:infs",
    b"val_loss:-inf",
    b" train_time:99999999999999999999ms", b"s:3 tel:4.5", b"s:3 trl:", b"Running Python ",
    b"Running PyTorch 2 compiled for CUDA 3 on x with world_size ",
    b"Running on device_name= with world_size=8",
    b"trial:1/9 seed:3", b"=== seed 4 start ", b"Using seed=5",
    b"seed: 999999999999999999", b"config: {", b'config: {"seed": [], "track": {}, "batch_tokens": 3}',
    b"config: " + b"[" * 9999,
    b"peak memory allocated: 1 MiB reserved: 1 MiB", b"|   0  NVIDIA X          On  |",
    b"GPU 9999: NVIDIA Y (UUID",
    b"Model name: Z", b"Training DataLoader: ", b"Resetting Model", b"<script>alert(1)</script>",
    b"[red]x[/red]", b"A" * 70_000,
]


def mutated(rng: random.Random, originals: list[bytes]) -> bytes:
    """One to six random edits of a random log."""
    data = bytearray(rng.choice(originals))
    for _ in range(rng.randint(1, 6)):
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        edit = rng.randrange(8)
        if edit == 0 and data:
            data[a % len(data)] = rng.randrange(256)
        elif edit == 1:
            del data[a:b]
        elif edit == 2:
            data[a:a] = data[a:b]
        elif edit == 3:
            data[a:a] = rng.choice(NASTY)
        elif edit == 4:
            data[a:a] = b"\n" + rng.choice(NASTY) + b"\n"
        elif edit == 5:
            del data[a:]
        elif edit == 6:
            other = rng.choice(originals)
            data[a:a] = other[rng.randrange(len(other) + 1):]
        else:  # shuffle lines
            lines = bytes(data).split(b"\n")
            i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
            lines[i], lines[j] = lines[j], lines[i]
            data = bytearray(b"\n".join(lines))
    return bytes(data)


def check(log: logs.LogFile, data: bytes):
    """Check what holds of every log, and what the verbs do with it first."""
    assert log.size == len(data)
    assert sum(len(run.val_points) for run in log.runs) <= data.count(b"\n") + 1
    for run in log.runs:
        assert all(0 <= point.step < 10**12 and isinstance(point.val_loss, float) for point in run.val_points)
        assert [point.step for point in run.val_points] == sorted({point.step for point in run.val_points})
        assert all(point.train_time_ms is None or math.isfinite(point.train_time_ms)
                   for point in run.val_points)
        time_, steps = run.time_to(3.28), run.steps_to(3.28)
        assert steps is None or 0 <= steps <= run.final_step
        assert time_ is None or math.isfinite(time_)
        for fact in (run.torch, run.cuda, run.triton, run.python, run.gpu_name):
            assert fact is None or fact.isprintable() and len(fact) <= 210
    assert len(log.problems) < 50
    assert all(problem.isprintable() and len(problem) < 600 for problem in log.problems)
    assert all(not name.startswith("/") and ".." not in name for name in log.sources)
    facts = json.loads(to_json(show.as_json(log, 3.28), inf_nan_mode="null"))
    assert list(facts)[:2] == ["path", "runs"]


def test_whatever_is_in_a_log_its_reader_keeps_its_promises(tmp_path, monkeypatch):
    number = int(os.environ.get("RECORDS_FUZZ", 1000))
    originals = [make(variant, seed).text.encode() for variant in VARIANTS
                 for seed in range(2)] + [b"", b"\n", os.urandom(3000)]
    rng, path = random.Random(number), tmp_path / "log.txt"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    for i in range(number):
        data = mutated(rng, originals)
        path.write_bytes(data)
        try:
            log = logs.read(path)
            check(log, data)
            if i % 100 == 0:
                show.print_facts([log], None)
                assert "\x1b[2J" not in sys.stdout.getvalue() and "\0" not in sys.stdout.getvalue()
                sys.stdout.seek(0), sys.stdout.truncate()
        except BaseException:
            (tmp_path / "failed.txt").write_bytes(data)  # pytest keeps the folders of the last runs
            raise


ONE_RUN = own([5.0, 4.0, 3.0]).encode()
HUGE = {  # kind: (first bytes, what is repeated, last bytes, validations to find)
    "zeros": (ONE_RUN, b"\0", b"", 3),
    "one line": (ONE_RUN, b"a", b"", 3),
    "a step line without an end": (ONE_RUN + b"step:300/300 val_loss:1", b"1", b"", 3),
    "training lines": (ONE_RUN, b"step:210/300 train_time:1ms step_avg:1.00ms\n", b"", 3),
    "validations": (ONE_RUN, b"".join(
        b"step:%d/999999 val_loss:3.%07d train_time:%dms step_avg:1.00ms %s\n" % (
        i, i, i, b" ".join(b"k%d:%d" % (k, k) for k in range(20))) for i in range(210, 25_000)), b"",
                    logs.POINT_LIMIT),
    "an embedded source": (b"", b"x = 1  # made up\n", b"\n" + ONE_RUN, 3),
    "headers": (b"", LINE.encode() + b"\nRunning PyTorch 2 compiled for CUDA 3 on " + b"a " * 30_000 + b"\n",
                b"\n" + ONE_RUN, 3),
    "rows of GPUs": (b"", b"|  1 NVIDIA" + b" a" * 30_000 + b"\n", b"\n" + ONE_RUN, 3),
}


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory with /proc")
@pytest.mark.parametrize("kind", HUGE)
def test_large_files_are_read_in_bounded_memory(tmp_path, kind, size=16 << 20):
    first, block, last, expected = HUGE[kind]
    path, block = tmp_path / "log.txt", block * max(1, (1 << 20) // len(block))
    with open(path, "wb") as file:
        file.write(first)
        while file.tell() < size:
            file.write(block)
        file.write(last)
    program = ("import re, sys; from records import logs; log = logs.read(sys.argv[1]); "
               "print(len(log.problems), sum(len(run.val_points) for run in log.runs), "
               "re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])")
    done = subprocess.run([sys.executable, "-c", program, path], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    path.unlink()
    problems, found, kib = map(int, done.stdout.split())
    assert found == expected and kib < 100 << 10  # 100 MB, of which Python itself takes 20
    assert problems or kind == "one line"
