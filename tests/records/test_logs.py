"""The reader gives back what went into logs of every format, whole, cut, joined and hostile."""
import hashlib
import math
import os
import tracemalloc
from dataclasses import fields
from pathlib import Path

import pytest
from synthetic import LINE, SOURCE, VARIANTS, make, own

from records import logs
from records.errors import RecordError

ROOT = Path(__file__).resolve().parents[2]
OURS = ROOT / "bench/results/2026-11-22_shakespeare_cpu"


def read(folder: Path, text: str | bytes, name: str = "log.txt") -> logs.Log:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return logs.read(path)


def facts(run: logs.Run, names) -> dict:
    points = [(point.step, point.val_loss, point.train_time_ms) for point in run.val_points]
    return {name: points if name == "val_points" else getattr(run, name) for name in names}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_went_into_a_log_comes_out(tmp_path, variant):
    for seed in range(5):
        made = make(variant, seed)
        log = logs.read(made.write(tmp_path / "log.txt"))
        assert log.variant == variant
        assert [facts(run, expected) for run, expected in zip(log.runs, made.runs, strict=True)] == made.runs
        assert log.sources == made.sources
        assert log.size == len(made.text.encode()) and log.sha256 == hashlib.sha256(made.text.encode()).hexdigest()
        assert log.problems == (("this is no log of a training run",) if variant == "X" else ())
