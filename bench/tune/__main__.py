"""Muon against AdamW with equal tuning: the same random search for both in the miniature, then fresh
seeds of both winners.

    python -m bench.tune run OUT [--workers=1]             the search of bench/tune/search.json
    python -m bench.tune final OUT [--seeds=5]             fresh seeds of the winners, by train_gpt.py
    python -m bench.tune reuse OUT [--seeds=2]             Muon at AdamW's rate and decay
    python -m bench.tune table OUT [--page=bench/TUNE.md]  the tables, or the page and its plot

OUT is a folder. It gets trials.jsonl, with a line for every training, and the logs of the fresh seeds, one
folder for each winner; whatever was interrupted goes on from there. A training that diverges is a result. The
search must stay what it was when OUT was begun.
"""
import sys
from functools import partial
from pathlib import Path

from bench.page import count, page_parser
from bench.plots import publish
from bench.tune import page, training
from bench.tune.results import Results
from bench.tune.search import OPTIMIZERS, read_search
from data.errors import UsageError, run_program
from data.files import ROOT

SEARCH_FILE = ROOT / "bench/tune/search.json"


def show(results: Results, options) -> None:
    if not all(results.losses(optimizer, results.search.rungs[0]) for optimizer in OPTIMIZERS):
        raise UsageError(f"{results.path}: expected trials of both optimizers, found too few; see "
                         "`python -m bench.tune run`")
    title = "Muon and AdamW with equal tuning"
    publish(options.page, options.out, page.tables(results), "tune", title, partial(page.draw, results))


def main(argv: list[str]) -> int:
    parser = page_parser("bench.tune", __doc__, "OUT", ("run", "final", "reuse", "table"))
    parser.add_argument("--search", type=Path, default=SEARCH_FILE, metavar="FILE",
                        help="what is searched (default: bench/tune/search.json)")
    parser.add_argument("--workers", type=count, default=1, help="trainings at a time, one thread each")
    parser.add_argument("--seeds", type=count, default=5, help="final, reuse: fresh seeds of each")
    options = parser.parse_args(argv)
    if options.verb != "table":
        options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out, read_search(options.search))
    verbs = {
        "run": training.run_search,
        "final": training.run_final,
        "reuse": training.run_reuse,
        "table": show,
    }
    verbs[options.verb](results, options)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:], "bench.tune"))
