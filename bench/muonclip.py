"""MuonClip at work: what examples/kimi.py shows about logits, loss, experts and ranks.

    python -m bench.muonclip run OUT                                 train what OUT lacks: 10 minutes
    python -m bench.muonclip table OUT [--page=bench/MUONCLIP.md]    the tables, or page and pictures

A run is the example by itself, on one core; OUT gets what it prints, under a name made of its settings, so
that an interrupted sweep goes on where it stopped, and tables show what is there. Rates are tried at seed 0;
what is compared has three seeds, the same ones on both sides.
"""
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from bench.measurement import Measurement
from bench.page import OPTIMIZER_NAMES as NAMES
from bench.page import grid
from bench.pictures import Theme, finish, two_plots
from data.errors import RunError, UsageError, run_program
from data.files import ROOT, written_whole
from records.compare import spread
from tools.children import ending, run_limited

TAU = 15
SANE, HIGH = 0.01, 0.04
RATES = {"muon": (0.005, SANE, 0.02, HIGH), "adamw": (0.002, 0.004, 0.008, 0.016)}
ADAMW = 0.004  # the best of its rates
SEEDS = 0, 1, 2
SETTLED = 50   # steps after which the logits are judged
LIMIT_S = 1200
LINE = re.compile(r"^step:(\d+)/\d+ loss:(\S+) logit:(\S+) clipped:(\d+)/\d+ "
                  r"busiest:(\S+) idlest:(\S+)", re.M)
END = re.compile(r"^val_loss:(\S+) spikes:(\d+) cpu_seconds:(\d+)$", re.M)


class Trial(NamedTuple):
    """The settings of a run of the example."""
    optimizer: str
    lr: float
    clip: int  # tau; 0: no clip
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.optimizer}_{self.lr}_{self.clip or 'off'}_{self.seed}"

    def options(self) -> list[str]:
        return [f"--{name}={value}" for name, value in self._asdict().items()]


COMPARED = (("muon", SANE, 0), ("muon", SANE, TAU), ("muon", HIGH, 0), ("muon", HIGH, TAU),
            ("adamw", ADAMW, 0))
SCAN = [Trial(optimizer, lr, 0) for optimizer, rates in RATES.items() for lr in rates]
ON_RANKS = Trial("muon", SANE, TAU)  # a run that two ranks repeat
TWO_RANKS = f"{ON_RANKS.name}_on_2_ranks"
TRIALS = list(dict.fromkeys([Trial(*settings, seed) for settings in COMPARED for seed in SEEDS] + SCAN))


class Journal(NamedTuple):
    """What a run printed."""
    steps: list[int]
    losses: list[float]   # means over the steps since the line before, as all of these
    logits: list[float]   # largest
    clipped: list[int]    # heads
    busiest: list[float]
    idlest: list[float]
    val_loss: float
    spikes: int
    cpu_seconds: int

    @classmethod
    def read(cls, path: Path) -> "Journal":
        text = path.read_text(encoding="utf-8", errors="replace")
        end = END.search(text)
        lines = LINE.findall(text)
        if not (lines and end):
            raise UsageError(f"{path}: expected what examples/kimi.py prints, to its end, found less; run "
                             "`python -m bench.muonclip run` again without this file")
        columns = [[kind(x) for x in column]
                   for kind, column in zip((int, float, float, int, float, float), zip(*lines))]
        return cls(*columns, float(end[1]), int(end[2]), int(end[3]))

    def settled_logit(self) -> float:
        return max(logit for step, logit in zip(self.steps, self.logits) if step > SETTLED)


# ----------------------------------------------------------------------------------------------------------
# Training


def commands() -> dict[str, list[str]]:
    """Return {name: command} of all runs."""
    program = "examples/kimi.py"
    # An address, because the name of this machine need not resolve.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
                "--nproc_per_node=2"]
    found = {trial.name: [sys.executable, program, *trial.options()] for trial in TRIALS}
    return found | {TWO_RANKS: [*torchrun, program, *ON_RANKS.options()]}


def run(options) -> None:
    """Train what is missing. Raises RunError, after all of it, where runs did not end well."""
    folder = options.out
    failures = []
    missing = {name: command for name, command in commands().items() if not (folder / f"{name}.txt").exists()}
    for k, (name, command) in enumerate(missing.items(), 1):
        print(f"{k}/{len(missing)} {name}", flush=True)
        child = run_limited(command, LIMIT_S, cwd=ROOT)
        if child.returncode != 0:  # it may have diverged, which is no reason to do without the others
            failures.append(f"{name}: expected the example to end well, but it {ending(child, LIMIT_S)}")
            continue
        with written_whole(folder / f"{name}.txt", "w") as file:
            file.write(child.stdout)
    if failures:
        raise RunError("\n".join(failures))


# ----------------------------------------------------------------------------------------------------------
# The page


def journals(folder: Path) -> dict[str, Journal]:
    """Return {name: what it printed} of all runs that are there."""
    paths = {name: folder / f"{name}.txt" for name in commands()}
    found = {name: Journal.read(path) for name, path in paths.items() if path.exists()}
    if not all(group(found, settings) for settings in COMPARED):
        raise UsageError(f"{folder}: expected a run or more of each kind that is compared, found "
                         f"{sorted(found) or 'none'}; run `python -m bench.muonclip run`")
    return found


def group(found: dict[str, Journal], settings: tuple) -> list[Journal]:
    names = [Trial(*settings, seed).name for seed in SEEDS]
    return [found[name] for name in names if name in found]


def title(settings: tuple) -> str:
    optimizer, lr, clip = settings
    return f"{NAMES[optimizer]} {lr}, " + (f"tau {clip}" if clip else "no clip")


def extremes(values: list[float], digits: int = 1) -> str:
    ends = dict.fromkeys(f"{value:.{digits}f}" for value in (min(values), max(values)))
    return " to ".join(ends)


def loss_differences(found: dict[str, Journal], a: tuple, b: tuple) -> list[float]:
    """Return the differences in validation loss, a minus b, of runs with the same seed."""
    pairs = [(Trial(*a, seed).name, Trial(*b, seed).name) for seed in SEEDS]
    return [found[x].val_loss - found[y].val_loss for x, y in pairs if x in found and y in found]


def gap_of_ranks(found: dict[str, Journal]) -> float:
    """Return the largest difference between 1 and 2 ranks of any loss that they print."""
    one, two = (found[name].losses + [found[name].val_loss] for name in (ON_RANKS.name, TWO_RANKS))
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


def tables(found: dict[str, Journal]) -> str:
    rows = []
    for settings in COMPARED:
        runs = group(found, settings)
        settled = [k for k, step in enumerate(runs[0].steps) if step > SETTLED]
        rows.append([
            title(settings), len(runs), spread([run.val_loss for run in runs], ".4f"),
            extremes([run.settled_logit() for run in runs]),
            extremes([max(run.clipped) for run in runs], 0),
            f"{max(run.busiest[k] for run in runs for k in settled):.2f}",
            f"{min(run.idlest[k] for run in runs for k in settled):.2f}",
            sum(run.spikes for run in runs),
            extremes([run.cpu_seconds for run in runs], 0)])
    sane, clipped, high, held, adamw = COMPARED
    pairs = []
    for a, b in ((clipped, sane), (held, high), (clipped, adamw)):
        differences = loss_differences(found, a, b)
        pairs.append([f"{title(a)}, minus {title(b)}", len(differences), spread(differences, ".4f"),
                      extremes(differences, 4)])
    rates = [[NAMES[trial.optimizer], trial.lr, f"{found[trial.name].val_loss:.4f}",
              f"{found[trial.name].settled_logit():.1f}"] for trial in SCAN if trial.name in found]
    page = [
        f"Mean and standard deviation over n seeds; logits and experts are those after step {SETTLED}.",
        grid(["run", "n", "validation loss", "largest logit of a run", "heads clipped", "busiest expert",
              "idlest", "loss spikes", "CPU seconds"], rows),
        "Difference in validation loss of runs with the same seed:",
        grid(["", "n", "mean", "lowest to highest"], pairs),
        "All rates that were tried, without the clip, at seed 0:",
        grid(["", "rate", "validation loss", "largest logit"], rates)]
    if TWO_RANKS in found:
        page.append(f"Largest difference of any printed loss, on 2 ranks for 1 ({title(ON_RANKS[:3])}): "
                    f"{gap_of_ranks(found):g}.")
    missing = [name for name in commands() if name not in found]
    if missing:
        page.append(f"Not there, or not ended well: {', '.join(missing)}.")
    return "\n\n".join(page) + "\n"


def draw(found: dict[str, Journal], theme: Theme, figure: Figure) -> None:
    """Draw the largest logits against the step, and the validation loss against the rate."""
    left, right = two_plots(figure, theme, ("largest attention logit", "validation loss"),
                            ("step", "learning rate"))
    for settings, color in zip(COMPARED[:4], ("nanogpt", "target", "adamw", "muon")):
        runs = group(found, settings)
        together = list(zip(*(run.logits for run in runs)))
        left.fill_between(runs[0].steps, [min(logits) for logits in together],
                          [max(logits) for logits in together], color=theme.colors[color], alpha=0.2)
        left.plot(runs[0].steps, [statistics.mean(logits) for logits in together],
                  color=theme.colors[color], linewidth=3, label=title(settings))
    left.set_yscale("log")
    left.set_yticks((5, 15, 50, 150), ("5", "15", "50", "150"))
    left.set_ylim(4, 1500)  # room for the names of the curves
    for optimizer, rates in RATES.items():
        names = {lr: Trial(optimizer, lr, "off").name for lr in rates}
        losses = {lr: found[name].val_loss for lr, name in names.items() if name in found}
        right.plot(losses.keys(), losses.values(), color=theme.colors[optimizer], linewidth=3, marker="o",
                   label=f"{NAMES[optimizer]}, no clip")
    for settings in (COMPARED[1], COMPARED[3]):
        first = group(found, settings)[0]
        right.plot([settings[1]], [first.val_loss], color=theme.colors["target"], marker="D", markersize=9,
                   linewidth=0, label=f"Muon, tau {TAU}" if settings is COMPARED[1] else "_at the high rate")
    right.set_xscale("log")
    finish(left, theme)
    finish(right, theme, (0.002, 0.005, 0.01, 0.02, 0.04))


MEASUREMENT = Measurement("muonclip", "Attention logits and loss with MuonClip", __doc__, "OUT", {"run": run},
                          journals, tables, draw)

if __name__ == "__main__":
    sys.exit(run_program(MEASUREMENT.main, sys.argv[1:], "bench.muonclip"))
