"""Mean and spread of the runs in folders of logs: the figures of README.md.

    python -m bench.summary bench/results/2026-11-22_shakespeare_cpu/*

The last validation of every log counts. t is the distance of the mean loss from the target in standard errors; a
one-sided t-test at 1 % wants 3.75 of 5 runs, 3.00 of 8, 2.82 of 10.
"""
import argparse
import json
import re
import statistics
import sys
from pathlib import Path

VALIDATION = re.compile(r"^step:(\d+)/(\d+) val_loss:(\d+\.\d+) train_time:(\d+)ms", re.M)
CONFIG = re.compile(r"^config: (\{.*\})$", re.M)


def final(path: Path) -> tuple[float, float, float]:
    """(final validation loss, training seconds, target loss) of a log of train_gpt.py, which is read and never run."""
    text = path.read_text(encoding="utf-8", errors="replace")
    points, config = VALIDATION.findall(text), CONFIG.findall(text)
    if not points or points[-1][0] != points[-1][1] or not config:
        raise ValueError(f"{path}: expected the log of a finished run, found {len(points)} validations and "
                         f"{'a' if config else 'no'} config line; leave it out or run again")
    return float(points[-1][2]), int(points[-1][3]) / 1000, json.loads(config[-1])["target_loss"]


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def row(folder: Path, target: float | None = None) -> str:
    """One Markdown row about the logs of a folder."""
    logs = sorted(folder.glob("*.txt"))
    if len(logs) < 2:
        raise ValueError(f"{folder}: expected two or more logs, found {len(logs)}; name a folder of *.txt")
    losses, seconds, targets = (list(column) for column in zip(*map(final, logs)))
    t = ((target or targets[0]) - statistics.mean(losses)) / (statistics.stdev(losses) / len(losses) ** 0.5)
    return f"| `{folder.name}/` | {len(logs)} | {spread(losses, 4)} | {spread(seconds, 1)} | {t:.1f} |"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.summary", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folder of logs")
    parser.add_argument("--target", type=float, help="target loss (default: the one in the logs)")
    options = parser.parse_args(argv)
    print("| runs | n | final validation loss | training seconds | t |\n|---|---|---|---|---|")
    try:
        for folder in options.folders:
            print(row(folder, options.target))
    except (OSError, ValueError) as e:
        print(f"bench.summary: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
