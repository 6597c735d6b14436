"""Read a whole archive of public logs and compare what the reader finds with a table of finals.

    python -m bench.archive ARCHIVE

ARCHIVE is the folder `records` of KellerJordan/modded-nanogpt, which is not part of this repository. Prints Markdown: how long
it took, how many files there are of each format, for how many runs each field agrees, each difference, and each odd file.
"""
import argparse
import csv
import math
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

from records import logs
from records.errors import RecordError

HISTORY = Path(__file__).resolve().parents[1] / "records/history"
FIELDS = {  # column of the table of finals: the same fact of a run
    "final_val_loss": lambda run: run.final_val_loss,
    "final_train_time_ms": lambda run: run.final_time_ms,
    "final_step": lambda run: run.final_step,
    "total_steps": lambda run: run.total_steps,
    "n_val_points": lambda run: len(run.val_points),
    "torch_version": lambda run: run.torch,
    "gpu_name": lambda run: run.gpu_name,
    "n_gpus": lambda run: run.num_gpus,
    "world_size": lambda run: run.world_size,
}


def equal(expected: str, found) -> bool:
    """Whether a cell of the table, empty for unknown, says what the reader found."""
    if found is None or isinstance(found, str):
        return expected == (found or "")
    return expected != "" and math.isclose(float(expected), found, rel_tol=1e-9)


def by_path(archive: Path) -> dict[str, logs.Log]:
    """Every log of the archive by its path from the folder that holds `records`, as the table of finals names it."""
    return {Path("records", path.relative_to(archive)).as_posix(): logs.read(path) for path in logs.find([archive])}


def compare(archive: dict[str, logs.Log], table: list[dict]) -> tuple[Counter, dict]:
    """(how many runs agree in each field, the differences: (field, expected, found) to log paths)."""
    agree, differences = Counter(), defaultdict(list)
    for row in table:
        log, number = archive.get(row["log_path"]), int(row["run_id"].partition("#")[2] or 1)
        if log is None or len(log.runs) < number:
            differences["run", "present", "absent"].append(row["log_path"])
            continue
        for field, fact in FIELDS.items():
            found = fact(log.runs[number - 1])
            if equal(row[field], found):
                agree[field] += 1
            else:
                found = "unknown" if found is None else found if isinstance(found, str) else f"{found:.12g}"
                differences[field, row[field] or "unknown", found].append(row["log_path"])
    return agree, differences


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.archive", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, metavar="ARCHIVE", help="folder of logs")
    parser.add_argument("--finals", nargs="+", type=Path, metavar="CSV",
                        default=[HISTORY / "finals.csv", HISTORY / "finals_other.csv"],
                        help="tables with one row for each run (default: those of records/history)")
    options = parser.parse_args(argv)
    try:
        started = time.perf_counter(), time.process_time()
        archive = by_path(options.archive)
        seconds, busy = time.perf_counter() - started[0], time.process_time() - started[1]
        table = [row for path in options.finals for row in csv.DictReader(path.open(encoding="utf-8", newline=""))]
    except (OSError, RecordError) as e:
        print(f"bench.archive: {e}", file=sys.stderr)
        return 2
    size, num_runs = sum(log.size for log in archive.values()), sum(len(log.runs) for log in archive.values())
    print(f"{len(archive):,} files, {size / 1e6:.1f} MB, {num_runs:,} runs, read in {seconds:.1f} s "
          f"by one process ({busy:.1f} s of processor time).\n")
    variants = Counter(log.variant for log in archive.values())
    print("| format | files |\n|---|---|")
    print("\n".join(f"| {name} | {variants[name]} |" for name, _ in logs.VARIANTS if variants[name]))
    agree, differences = compare(archive, table)
    print(f"\n| field | agrees, of {len(table):,} rows |\n|---|---|")
    print("\n".join(f"| {field} | {agree[field]:,} |" for field in FIELDS))
    print("\n| field | table | reader | rows | for example |\n|---|---|---|---|---|")
    for (field, expected, found), paths in sorted(differences.items()):
        print(f"| {field} | {expected} | {found} | {len(paths)} | `{paths[0]}` |")
    print("\n| odd file | why |\n|---|---|")
    print("\n".join(f"| `{path}` | {'; '.join(log.problems)} |" for path, log in archive.items() if log.problems))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
