"""Sets of synthetic logs for a claim on track shakespeare, and ways to doctor them."""
import random
import re
from pathlib import Path

from tests.helpers.synthetic import LINE, own

EVERY, TOTAL = 5, 20
RUNS, BASELINE = 8, 4


def uuid(k: int) -> str:
    return f"{k:08x}-0000-4000-8000-{k:012x}"


def log(seed: int, final: float = 1.58, pace: float = 100.0, spread: float = 0.004, **settings) -> str:
    """A log with every training line.

    Losses depend on the seed and `final`, times on the seed and `pace`, ms a step.
    """
    rng = random.Random(f"{seed} {final}")
    losses = [5.9, *(final + (TOTAL - step) / 10 + rng.uniform(-spread, spread)
                     for step in range(EVERY, TOTAL + 1, EVERY))]
    clock, rng = [0.0], random.Random(f"{seed} {pace}")
    for _ in range(TOTAL):
        clock.append(clock[-1] + pace * rng.uniform(0.98, 1.02))
    head = own(losses, clock[::EVERY], seed=seed, every=EVERY,
               **settings).rpartition(LINE + "\n")[0] + LINE + "\n"
    lines = []
    for step, ms in enumerate(clock):
        timers = f"train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms"
        if step:
            lines.append(f"step:{step}/{TOTAL} {timers}")
        if step % EVERY == 0:
            lines.append(f"step:{step}/{TOTAL} val_loss:{losses[step // EVERY]:.4f} {timers}")
    return head + "\n".join([*lines, "peak memory allocated: 10 MiB reserved: 20 MiB", ""])


def runs(number: int = RUNS, **options) -> list[str]:
    return [log(seed, **options) for seed in range(1, number + 1)]


def slow(number: int = BASELINE) -> list[str]:
    """The baseline: as good, and slower."""
    return [log(seed, pace=120.0) for seed in range(101, 101 + number)]


def write(folder: Path, texts: list[str], first: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k, text in enumerate(texts, start=first):
        (folder / f"{uuid(k)}.txt").write_text(text, newline="")
    return folder


def replaced(text: str, pattern: str, new: str, count: int = 0) -> str:
    """A text with something changed; it must be there."""
    result, found = re.subn(pattern, new, text, count=count, flags=re.M)
    assert found, pattern
    return result


def public(seed: int, pace: float = 100.0) -> str:
    """A log as the public speedrun's, of January 2025."""
    body = log(seed, 3.2765, pace, spread=0.001).rpartition(LINE + "\n")[2]
    rows = [f"|   {i}  NVIDIA H100 80GB HBM3          On  | 00000000:0{i}:00.0 Off |                    0 |"
            for i in range(8)]
    versions = ["Running Python 3.12.9 | packaged by somebody | [GCC 13.2.0]",
                "Running PyTorch 2.8.0+cu126 compiled for CUDA 12.6"]
    return "\n".join(["# the trainer", "", LINE, *versions, *rows, LINE, body])
