"""Muon against AdamW with equal tuning: the same random search for both, then fresh seeds of both winners.

    python -m bench.tune run OUT [--workers=1]             the search of bench/tune/search.json
    python -m bench.tune final OUT                         fresh seeds of the winners, by train_gpt.py
    python -m bench.tune reuse OUT [--workers=1]           Muon at AdamW's rate and decay
    python -m bench.tune table OUT [--page=bench/TUNE.md]  the tables, or the page and its plot

OUT is a folder. It gets trials.jsonl, with a line for every training, and the logs of the fresh seeds, one
folder for each winner; whatever was interrupted goes on from there. A training that diverges is a result. The
search must stay what it was when OUT was begun.
"""
import sys

from bench import trials
from bench.measurement import Measurement
from bench.tune import analysis, training
from bench.tune.results import read
from data.errors import run_program

MEASUREMENT = Measurement(
    "tune", "Muon and AdamW with equal tuning", __doc__, "OUT",
    {"run": training.run_search, "final": training.run_final, "reuse": training.run_reuse}, read,
    analysis.tables, analysis.draw, trials.add_workers)

if __name__ == "__main__":
    sys.exit(run_program(MEASUREMENT.main, sys.argv[1:], "bench.tune"))
