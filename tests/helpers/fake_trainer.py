"""Stands for train_gpt.py where a test needs many runs: writes a log in the same grammar within milliseconds.

    python tests/helpers/fake_trainer.py --seed=3 [--loss=1.58] [--ms=85000] [--log_dir=logs]
        [--fail=HOW] [--wait=FILE]

--wait: do not end while there is such a file.
"""
import argparse
import random
import signal
import sys
import time
import uuid
from pathlib import Path

SKELETON = """print("step:{step}/{total} val_loss:{loss}")  # source, as in every log
{line}
Running Python 3.11.0
Running PyTorch 2.13.0+cpu compiled for CUDA None on CPU (x86_64, 1 threads) with world_size {world}
config: {{"track": "shakespeare", "target_loss": 1.6, "seed": {seed}, "val_tokens": 262144}}
seed: {seed}
{line}
"""


def log_text(seed: int, loss: float, ms: float, total: int = 100, world: int = 2) -> str:
    text = SKELETON.format(seed=seed, line="=" * 100, world=world, step=0, total=0, loss=0)
    lot = random.Random(f"{seed} {loss}")
    for step in (0, total // 4, total // 2, total):
        here = loss + (4 * (1 - step / total) ** 2 + 0.05 * lot.random() if step < total else 0)
        timers = f"train_time:{ms * step / total:.0f}ms step_avg:{ms / total:.2f}ms"
        if step:
            text += f"step:{step}/{total} {timers}\n"
        text += f"step:{step}/{total} val_loss:{here:.4f} {timers}\n"
    return text + "peak memory allocated: 100 MiB reserved: 120 MiB\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loss", type=float, default=1.58)
    parser.add_argument("--ms", type=float, default=85_000)
    parser.add_argument("--log_dir", default="logs")
    parser.add_argument("--fail", default="")
    parser.add_argument("--wait", type=Path)
    options = parser.parse_args()
    noise, own = random.Random(options.seed), random.Random(f"{options.seed} {options.ms} {options.loss}")
    # most of the noise is the pair's
    loss = options.loss + 0.01 * noise.gauss(0, 1) + 0.001 * own.gauss(0, 1)
    ms = options.ms * (1 + 0.03 * noise.gauss(0, 1) + 0.003 * own.gauss(0, 1))
    path = Path(options.log_dir, f"{uuid.uuid4()}.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    print("installing nothing", flush=True)
    if options.fail == "silent":
        return 0
    print(path, flush=True)
    text = log_text(options.seed + (options.fail == "seed"), loss, ms)
    if options.fail == "half":
        text = text.rpartition("step:100/100 val_loss")[0]
    if options.fail == "twice":
        text += log_text(options.seed, loss + 0.01, ms).rpartition("=" * 100 + "\n")[2]
    path.write_text(text)
    if options.fail == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while options.wait and options.wait.exists():
        Path("waiting").touch()
        time.sleep(0.02)
    if options.fail == "crash":
        print("expected memory, found none \x1b[31m", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
