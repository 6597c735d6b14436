"""What each technique is worth: trainings with one of them off, on the same tokens, over several seeds.

    python -m bench.ablate run OUT.jsonl [--steps=240] [--seeds=4] [--workers=1]    train what OUT.jsonl lacks
    python -m bench.ablate time OUT.jsonl                                      the time of a step, in turns
    python -m bench.ablate table OUT.jsonl [--page=bench/ABLATION.md]          the table, or its page

OUT.jsonl gets a line for every run and every timing, so an interrupted sweep goes on where it stopped. A run
is the trainer's own class, one process with one thread, without its warm-up and with one validation, at the
end. The step time is that of two threads in one process, all variants in turns, so that what disturbs the
machine disturbs all alike.

Equal tokens compares final losses after as many steps. Equal time adds to a variant's loss what the steps
that its speed gains or loses are worth, by the slope between "10 % fewer steps" and "10 % more steps".
"""
import argparse
import math
import statistics
import sys
import time
from collections import defaultdict

import scipy.stats
import torch

from bench import trials
from bench.measurement import Measurement
from bench.page import count, grid
from data.errors import UsageError, run_program
from engine.ranks import Runtime
from train_gpt import Run

ROUNDS = 12  # of a timing, in each of which every variant takes six steps
BASE, FEWER, MORE = "all on", "10 % fewer steps", "10 % more steps"
OFF = {  # technique -> the settings that turn it off, in the miniature
    "Muon (AdamW for everything)": "--optimizer=adamw --cautious=off --warmup_steps=25",
    "Polar Express (Jordan's coefficients)": "--coefficients=jordan",
    "NorMuon": "--normuon_beta2=0",
    "cautious decay": "--cautious=off",
    "Muon's decay": "--muon_wd=0",
    "larger rate for MLP outputs": "--mlp_out_lr_mul=1",
    "momentum schedule": "--momentum=0.95,0.95",
    "larger rate for tables": "--table_lr_mul=1",
    "average of the weights": "--ema_frac=0",
    "average of the weights (floor 0.15)": "--ema_frac=0 --lr_floor=0.15",
    "learning rate floor": "--lr_floor=0",
    "extension steps": "--extension_steps=0",
    "window schedule": "--window_short=64 --window_long=128",
    "softcap": "--softcap=",
    "attention scale (1 over root d)": "--attn_scale=0.1768",
    "half rotary (all channels)": "--rope_fraction=1",
    "YaRN": "--yarn=off",
    "key offset": "--key_offset=off",
    "paired heads": "--paired_layers=",
    "attention gates": "--attn_gate_layers=",
    "XSA": "--xsa_layers=",
    "smear": "--smear=off",
    "value embeddings": "--value_embed_layers=",
    "bigram and n-gram embeddings": "--bigram_rows=0 --ngram_rows=0",
    "bigram signs": "--bigram_signs=off",
    "n-gram table in host memory": "--ngram_rows=0",
    "x0 injection": "--inject_x0=off",
    "residual factor 1.1 (1.0)": "--resid_init=1",
    "backout": "--backout=off",
    "skip": "--skip=",
}
ON = {  # technique of public records, off there -> the settings that turn it on
    "with multi-token prediction": "--mtp_weights=1,0.5,0.25",
    "tied for two thirds": "--untie_stage=2 --untie_delay=0",
    "always tied": "--untie_stage=-1",
    "with connections": "--mudd=on --backout=off",
    "with gates by networks": "--gate_networks=0,2",
    "with gates by networks and mixing of heads": "--gate_networks=0,2 --mix_window=32",
    "with an average of head and embedding only": "--ema_of=head",
    "with MLP outputs at random": "--mlp_out_std=0.5",
}
ALL = "all of them (with AdamW)"
ONE_OF_TWO = {  # what the others leave nothing of, or turn off otherwise
    "Polar Express (Jordan's coefficients)", "Muon's decay", "bigram signs", "YaRN",
    "average of the weights (floor 0.15)"}


def variants(steps: int) -> dict[str, list[str]]:
    """Return the changed settings of each variant, as on the command line."""
    everything = " ".join(settings for name, settings in OFF.items() if name not in ONE_OF_TWO)
    lengths = {FEWER: f"--train_steps={round(0.9 * steps)}", MORE: f"--train_steps={round(1.1 * steps)}"}
    lines = {BASE: "", **lengths, **OFF, ALL: everything, **ON}
    return {name: settings.split() for name, settings in lines.items()}


def job(name: str, settings: list[str], steps: int, seed: int) -> trials.Job:
    return trials.Job(dict(variant=name), [f"--train_steps={steps}", *settings], seed)


# ------------------------------------------------------------------------------------------------------------
# Runs


def run_all(options) -> None:
    """Train seed by seed, so that what is there at any time is balanced."""
    done = {(row["variant"], row["seed"]) for row in trials.read(options.out, "variant") if "loss" in row}
    jobs = [job(name, settings, options.steps, seed) for seed in range(options.seeds)
            for name, settings in variants(options.steps).items()
            if (name, seed) not in done and (not options.only or name in (BASE, *options.only))]
    print(f"{len(jobs)} runs to do, {len(done)} done", file=sys.stderr)
    trials.run_all(jobs, trials.train, options.workers, options.out)


def time_all(options) -> None:
    """Hold the runs of all variants in memory; each takes six steps, two in each stage, in every round."""
    torch.set_num_threads(2)
    runs = {}
    for name, settings in variants(options.steps).items():
        if name not in (FEWER, MORE) and (not options.only or name in (BASE, *options.only)):
            first = job(name, settings, options.steps, 0)
            runs[name] = Run(trials.config(first.settings, first.seed), Runtime())
    places = [options.steps * k // 6 for k in (1, 3, 5)]
    seconds = defaultdict(list)
    for turn in range(ROUNDS + 1):  # the first does not count
        for name, run in runs.items():
            spent = 0.0
            for place in places:
                run.step = place
                run.loader.load_state_dict({**run.loader.state_dict(), "step": place})
                start = time.perf_counter()
                run.train_step()
                run.train_step()
                spent += time.perf_counter() - start
            if turn:
                seconds[name].append(spent / 6)
    for name, values in seconds.items():
        ratio = statistics.median(value / base for value, base in zip(values, seconds[BASE]))
        row = dict(variant=name, ms=[round(1000 * v, 2) for v in values], rounds=ROUNDS,
                   ratio=round(ratio, 4), threads=2)
        trials.append(options.out, row)


# ------------------------------------------------------------------------------------------------------------
# The table


def loss_differences(losses: dict[str, dict[int, float]]) -> tuple[dict[str, list[float]], float, int]:
    """Return (variant -> its loss minus the trainer's at each seed that both have, standard deviation of such
    a difference around its variant's mean, degrees of freedom).

    A seed's first weights are better or worse for all variants alike, so that pairs tell more than means; and
    one spread of all pairs tells more than that of two.
    """
    found = {}
    for name, runs in losses.items():
        if name != BASE:
            seeds = [seed for seed, loss in runs.items() if seed in losses[BASE] and math.isfinite(loss)]
            found[name] = [runs[seed] - losses[BASE][seed] for seed in seeds]
    squares = [(d - statistics.mean(ds)) ** 2 for ds in found.values() for d in ds]
    free = sum(len(ds) - 1 for ds in found.values() if ds)
    return found, math.sqrt(sum(squares) / free) if free else math.nan, free


def table(rows: list[dict]) -> str:
    """Return the table by the loss at equal time, the worst first: what helps most stands on top."""
    losses, steps, ratios = defaultdict(dict), {}, {}
    for row in rows:
        if "loss" in row:
            losses[row["variant"]][row["seed"]] = row["loss"]
            steps[row["variant"]] = row["steps"]
        else:
            ratios[row["variant"]] = row["ratio"]
    if not (losses[BASE] and losses[FEWER] and losses[MORE]):
        raise UsageError(f"expected runs of {BASE!r}, {FEWER!r} and {MORE!r}, found too few; see "
                         "`python -m bench.ablate run`")
    pairs, sd, free = loss_differences(losses)
    more = {name: statistics.mean(ds) if ds else math.nan for name, ds in pairs.items()}
    slope = (more[MORE] - more[FEWER]) / (steps[MORE] - steps[FEWER])
    lines = {}
    for name, ds in pairs.items():
        half = float(scipy.stats.t.ppf(0.975, free)) * sd / math.sqrt(len(ds)) if ds and free else math.nan
        rank, at_time, ratio = more[name], "", ratios.get(name)
        if ratio and name not in (FEWER, MORE):
            rank += slope * steps[BASE] * (1 / ratio - 1)
            at_time = f"{rank:+.4f}"
        loss = statistics.mean(losses[name].values())
        cells = [name, len(ds), f"{loss:.4f}", f"{more[name]:+.4f} ± {half:.4f}",
                 f"{ratio:.3f}" if ratio else "", at_time]
        lines[math.inf if math.isnan(rank) else rank, name] = cells
    header = ["variant", "n", "final loss", "more than the trainer at the same seeds (95 %)",
              "time of a step", "more at equal time"]
    return "\n".join([
        f"The trainer: {statistics.mean(losses[BASE].values()):.4f} over {len(losses[BASE])} seeds.",
        f"1 % of the steps is worth {abs(slope) * steps[BASE] / 100:.4f} of the loss.",
        f"A difference at one seed has a standard deviation of {sd:.4f} ({free} degrees of freedom).", "",
        grid(header, [cells for _, cells in sorted(lines.items(), reverse=True)])]) + "\n"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=count, default=240, help="optimizer steps of a run")
    parser.add_argument("--seeds", type=count, default=4, help="runs of each variant, with the same seeds")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME",
                        help="variants to train (default: all)")
    trials.add_workers(parser)


MEASUREMENT = Measurement("ablate", "", __doc__, "OUT.jsonl", {"run": run_all, "time": time_all},
                          lambda path: trials.read(path, "variant"), table, add_options=add_options)


if __name__ == "__main__":
    sys.exit(run_program(MEASUREMENT.main, sys.argv[1:], "bench.ablate"))
