"""Time muon.py in bf16 against torch.optim.Muon on a CPU, for blocks of several sizes and 1, 2 ... threads.

    python -m bench.muon.blocks                    one GPT-2 block, 9 steps each
    python -m bench.muon.blocks --reps=25 --threads=1,2

A symmetric product is computed in blocks of rows up to its diagonal (muon.BLOCK_ROWS): smaller blocks save
more of it, but call the library more often, and with several threads every call starts and ends a parallel
region. All subjects and numbers of threads take turns within a round, so that a busy machine slows them
alike. Prints medians of wall-clock and processor seconds, and how many times as long torch's step takes.
"""
import argparse
import statistics
import sys
import time
from contextlib import contextmanager

import torch

import muon
from bench.muon.questions import GPT2_BLOCK
from bench.muon.speed import problem
from tools.machine import usable_cores

JORDAN = muon.COEFFICIENTS["jordan"][1][0]
ROWS = 128, 192, 256, 384, 2**20  # the last one: whole products


@contextmanager
def settings(threads: int, rows: int | None):
    """Run with so many threads and rows of a block."""
    before = torch.get_num_threads(), muon.BLOCK_ROWS
    torch.set_num_threads(threads)
    muon.BLOCK_ROWS = rows or muon.BLOCK_ROWS
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        muon.BLOCK_ROWS = before[1]


def seconds_of(step) -> tuple[float, float]:
    """Return wall-clock and processor seconds of a call."""
    wall = time.perf_counter()
    processor = time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - processor


def measure(threads: list[int], reps: int, shapes: list[tuple]) -> dict[tuple, list[tuple[float, float]]]:
    """Return {(threads, rows of a block or None for torch): seconds of each step}; the first is left out."""
    theirs, _ = problem(torch.optim.Muon, shapes, {})
    ours, _ = problem(muon.Muon, shapes, dict(ns_dtype=torch.bfloat16, ns_coefficients=JORDAN))
    found = {(count, rows): [] for count in threads for rows in (None, *ROWS)}
    for _ in range(reps + 1):
        for (count, rows), seconds in found.items():
            with settings(count, rows):
                seconds.append(seconds_of(theirs.step if rows is None else ours.step))
    return {key: seconds[1:] for key, seconds in found.items()}


def table(found: dict[tuple, list[tuple[float, float]]]) -> str:
    lines = ["| Threads | Blocks of | Wall-clock s | Processor s | torch / this |", "|" + "---|" * 5]
    medians = {key: [statistics.median(x) for x in zip(*seconds)] for key, seconds in found.items()}
    for (threads, rows), (wall, processor) in medians.items():
        special = {None: "torch.optim.Muon", ROWS[-1]: "whole products"}
        name = special.get(rows, f"{rows} rows")
        ratio = medians[threads, None][0] / wall
        lines.append(f"| {threads} | {name} | {wall:.4f} | {processor:.4f} | {ratio:.2f} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.muon.blocks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    default = sorted({1, usable_cores()})
    parser.add_argument("--threads", type=lambda text: [int(x) for x in text.split(",")], default=default)
    parser.add_argument("--reps", type=int, default=9, help="timed steps per row")
    args = parser.parse_args(argv)
    print(table(measure(args.threads, args.reps, GPT2_BLOCK)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
