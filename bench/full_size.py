"""Track small at its full size takes a few real steps on a CPU: 640 M parameters in bfloat16, every technique
and both optimizers, on Shakespeare's plays as GPT-2 tokens.

    python -m bench.full_size [--steps=5] [--out=FOLDER] [--field=value ...]

Batches are short and there is one stage, so that a step takes less than a minute. Needs 13 GB of memory, and
GPT-2's vocabulary (data/encoding.py). Writes full_size.md with the trainer's log, from its settings on.
"""
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.page import grid
from data import shakespeare
from data.encoding import BYTE_BOS, GPT2_BOS, GPT2Encoding, gpt2_encoding
from data.errors import CommandLine, RunError, run_program
from data.files import ROOT, written_whole
from data.shards import open_shard, write_shard
from tools.children import ending, run_limited

LIMIT_S = 3000
TOKENS = 1024  # of a step and of a validation
SHARDS = {"train_files": shakespeare.TRAIN, "val_files": shakespeare.VAL}


def settings(steps: int, folder: Path) -> dict:
    """Return what differs from track small."""
    schedule = dict(stages=1, untie_stage=0, train_steps=steps, extension_steps=1)
    batch = dict(batch_tokens=TOKENS, slices=1)
    validation = dict(val_tokens=TOKENS, val_slice=TOKENS, val_every=1)
    machine = dict(dtype="bfloat16", sample_tokens=0, max_epochs=100, log_dir=folder / "logs")
    return schedule | batch | validation | machine | {name: folder / file for name, file in SHARDS.items()}


def write_shards(folder: Path, encoding: GPT2Encoding) -> None:
    """Write the plays as GPT-2 tokens, document by document."""
    source = shakespeare.ensure()
    for name in SHARDS.values():
        tokens = np.asarray(open_shard(source / name))
        documents = np.split(tokens, np.flatnonzero(tokens == BYTE_BOS))
        pieces = []
        for document in documents[1:]:
            text = document[1:].astype(np.uint8).tobytes().decode("utf-8")
            pieces += [np.array([GPT2_BOS], dtype=np.uint16), encoding.encode(text)]
        write_shard(folder / name, np.concatenate(pieces))


def run(steps: int, folder: Path, flags: list[str]) -> tuple[str, float]:
    """Return the trainer's log and its seconds. Raises RunError."""
    begin = time.monotonic()
    command = [sys.executable, "train_gpt.py", "--track=small"]
    command += [f"--{name}={value}" for name, value in settings(steps, folder).items()]
    child = run_limited([*command, *flags], LIMIT_S, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    if child.returncode != 0:
        raise RunError(f"expected {steps} steps at full size, found a trainer that {ending(child, LIMIT_S)}; "
                       "see that 13 GB of memory are free")
    path, = (folder / "logs").glob("*.txt")
    log = path.read_text(encoding="utf-8").replace(f"{folder}/", "")
    return log, time.monotonic() - begin


def page(log: str, seconds: float, peak_gb: float) -> str:
    """Return the page: what it took, and the log without the sources that it begins with."""
    facts = log[log.index("\nconfig: "):].strip()
    table = grid(["seconds, start and warm-up included", "peak memory, GB"],
                 [[f"{seconds:.0f}", f"{peak_gb:.1f}"]])
    about = __doc__.partition("\n\n")[0]
    return f"# Track small at full size on a CPU\n\n{about}\n\n{table}\n\n```\n{facts}\n```\n"


def main(argv: list[str]) -> int:
    parser = CommandLine(__doc__, "python -m bench.full_size")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder to write full_size.md to")
    args, flags = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_shards(folder, gpt2_encoding())
        log, seconds = run(args.steps, folder, flags)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9
    text = page(log, seconds, peak_gb)
    print(text, end="")
    if args.out:
        with written_whole(args.out / "full_size.md", "w") as file:
            file.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:], "bench.full_size"))
