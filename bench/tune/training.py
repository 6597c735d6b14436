"""The trainings of a search, of fresh seeds of its winners, and of Muon with the rate of AdamW's winner."""
import os
import shutil
import sys
import tempfile
from pathlib import Path

from bench import pictures, trials
from bench.tune.results import SearchResults, read
from bench.tune.search import OPTIMIZERS
from data.errors import RunError
from data.files import ROOT, data_root
from tools.children import ending, run_limited
from train_gpt import Run

FRESH = 1000  # first of the seeds that the search has not seen
FINAL_SEEDS, REUSE_SEEDS = 5, 2
STEP_SECONDS = 20  # no step takes so long on any machine
FACTORS = 0.5, 1.0, 2.0  # of the rate of AdamW's winner, for Muon


def run_search(options) -> None:
    """Train rung by rung, both optimizers in turn, so that what is there at any time is balanced."""
    results = read(options.out)
    search = results.search
    for rung in range(len(search.rungs) + 1):
        jobs = []
        for optimizer in OPTIMIZERS:
            if rung < len(results.rungs(optimizer)):
                jobs += missing_jobs(results, optimizer, rung)
        jobs.sort(key=lambda job: job.labels["trial"])
        if jobs:
            print(f"rung {rung + 1}: {len(jobs)} trainings to do", file=sys.stderr)
        results.rows += trials.run_all(jobs, trials.train, options.workers, results.path)


def missing_jobs(results: SearchResults, optimizer: str, rung: int) -> list[trials.Job]:
    search = results.search
    steps = results.rungs(optimizer)[rung]
    done = results.losses(optimizer, steps)
    return [
        trials.Job(
            dict(kind="search", search=search.sha256, optimizer=optimizer, trial=trial),
            [*search.settings(optimizer, trial, steps), f"--val_tokens={search.val_tokens}"],
            search.seed)
        for trial in results.wanted(optimizer, rung) if trial not in done]


def run_final(options) -> None:
    """Train the winners with seeds that the search has not seen, seed by seed."""
    results = read(options.out)
    for optimizer in OPTIMIZERS:
        results.winner(optimizer, results.search.rungs[-1])  # without these there is nothing to compare

    done = {(row["group"], row["seed"]) for row in results.of("final")}
    winners = results.winners()
    for seed in range(FRESH, FRESH + FINAL_SEEDS):
        for group, (optimizer, steps, trial) in winners.items():
            settings = results.search.settings(optimizer, trial, steps)
            if (group, seed) not in done:
                loss, seconds = train_with_log(settings, seed, steps, results.folder / group)
                row = dict(
                    kind="final", search=results.search.sha256, group=group, settings=settings, seed=seed,
                    steps=steps, loss=loss, seconds=seconds)
                trials.append(results.path, row)
                print(trials.said(row), file=sys.stderr, flush=True)


def train_with_log(settings: list[str], seed: int, steps: int, folder: Path) -> tuple[float, float]:
    """Run train_gpt.py alone, move its log into the folder, return final loss and training seconds."""
    with tempfile.TemporaryDirectory() as place:  # there, so that the log's settings name no folder of ours
        command = [sys.executable, str(ROOT / "train_gpt.py"), "--track=shakespeare",
                   "--recipe=miniature", *settings,
                   f"--seed={seed}", f"--val_every={steps}", "--sample_tokens=0"]
        limit = 600 + STEP_SECONDS * steps
        env = os.environ | {"OMP_NUM_THREADS": "1", "DATA_PATH": str(data_root().resolve())}
        child = run_limited(command, limit, cwd=place, env=env)
        written = list(Path(place).glob("logs/*.txt"))
        if child.returncode or not written:
            raise RunError(f"expected a fresh seed of a winner to train to its end, but it "
                           f"{ending(child, limit)}; run the same command again")
        facts = pictures.own_run(written[0])
        folder.mkdir(parents=True, exist_ok=True)
        shutil.move(written[0], folder / written[0].name)
    _, seconds, loss = facts[-1]
    return loss, seconds


def run_reuse(options) -> None:
    """Train Muon at the rate and the decay of AdamW's winner, and at half and twice that rate."""
    results = read(options.out)
    steps = results.search.rungs[-1]
    winner = results.search.settings("adamw", results.winner("adamw", steps), steps)
    done = {(row["factor"], row["seed"]) for row in results.of("reuse")}
    jobs = [reuse_job(winner, factor, seed, results.search.sha256)
            for seed in range(FRESH, FRESH + REUSE_SEEDS) for factor in FACTORS
            if (factor, seed) not in done]
    trials.run_all(jobs, trials.train, options.workers, results.path)


def reuse_job(winner: list[str], factor: float, seed: int, sha256: str) -> trials.Job:
    """Return the training of Muon with the settings of AdamW's winner, its rate times a factor."""
    values = dict(setting.removeprefix("--").split("=", 1) for setting in winner)
    values["optimizer"] = "muon"
    values["adamw_lr"] = f"{factor * float(values['adamw_lr']):.4g}"
    values["mlp_out_lr_mul"] = values["adamw_out_lr_mul"]
    settings = [f"--{name}={value}" for name, value in values.items()]
    return trials.Job(dict(kind="reuse", search=sha256, factor=factor), settings, seed, match_rms)


def match_rms(run: Run) -> None:
    """Give Muon the rate and the decay that AdamW would have, and updates of AdamW's usual size."""
    cfg = run.cfg
    for group in run.muon.param_groups:
        row = group["row"]
        rate = cfg.adamw_lr * row.lr / cfg.muon_lr
        group["row"] = row._replace(lr=rate, wd=cfg.adamw_wd, wd_follows_lr=False)
        group["adjust_lr_fn"] = "match_rms_adamw"
