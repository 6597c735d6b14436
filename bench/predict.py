"""Predicted seconds to 3.28 on eight H100, from counted work and from rates that are public or assumed.

    python -m bench.predict [--page bench/PREDICTION.md]
"""
import argparse
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bench import floors
from bench.page import grid
from data.errors import run_program
from tools.gpus import GPUS
from train_gpt import Config

RANKS, H100 = 8, GPUS["H100"]
PEAK = RANKS * H100.tflops * 1e12
KERNELS = 0.075  # of a step's time: what upstream's kernels save that we have not; estimated 6 to 9 %
GOAL = 60.0  # seconds
RECORD = 1.406 * 60  # record 80: 1480 steps of the same batches, documents and windows
MERGED = 1.23 * 60  # record 89, the newest that is merged: 1285 steps
UNMERGED = 39.914  # a proposal of 2026-08-31 (pull request 360), by its author; record 89 took 73.889 s there


class Input(NamedTuple):
    name: str
    fast: float
    central: float
    slow: float
    kind: str
    source: str


INPUTS = [
    Input("steps", 1440, 1480, 1650, "assumed",
          "1480 is public for record 80, whose schedule and techniques ours follows; that they suffice here, "
          "and both ends, are assumed"),
    Input("utilization of one GPU", 0.55, 0.44 / (1 + KERNELS), 0.33, "public, reduced",
          f"upstream's 44 % (logs of record 88), less {KERNELS:.1%} for kernels that we lack (assumed); "
          "fast: our goal; slow: three quarters of upstream's (assumed)"),
    Input("parallel efficiency", 0.97, 0.946, 0.90, "public",
          "upstream on eight against one: 94.6 %, good to 3 % (logs of record 88); slow: assumed"),
    Input("slowness of the host", 1.0, 1.0, 1.1, "public",
          "record 80 took 10 % longer in its log than in the table"),
]


def seconds(work: float, steps, utilization, efficiency, host, planned: int = 1480):
    """Return the seconds of `steps` steps. work: FLOPs of `planned` of them; they spread evenly over the
    stages."""
    return work * steps / planned / (PEAK * utilization * efficiency) * host


def count(recipe: str = "base") -> dict:
    """Count FLOPs of the schedule, the head's part of them, and the floor of each part on one of 8 ranks,
    in ms."""
    cfg = Config.for_track("small", recipe=recipe)
    work = head = 0.0
    floor, stages = dict.fromkeys(floors.PARTS, 0.0), []
    for first, end in zip(cfg.stage_starts, (*cfg.stage_starts[1:], cfg.train_steps)):
        tokens, docs = cfg.at("batch_tokens", first), floors.synthetic(cfg, first, RANKS)
        whole = floors.count(cfg, torch.bfloat16, docs, first)
        flops = [whole[part].flops for part in ("attention", "projections", "MLP", "head and loss")]
        stages.append((first, end, tokens, sum(flops) / tokens / 1e6))
        work += (end - first) * sum(flops)
        head += (end - first) * flops[-1]
        for part, w in floors.count(cfg, torch.bfloat16, docs[:1], first, RANKS, fp8=True).items():
            floor[part] += (end - first) * w.floor_ms(H100) / cfg.train_steps
    return dict(work=work, head=head / work, floors=floor, stages=stages, steps=cfg.train_steps,
                tokens=cfg.train_tokens)


def spread(work: float) -> tuple[float, float, float]:
    """Return the 5th, 50th and 95th percentile of 100,000 draws of all inputs from triangles."""
    rng, draws = np.random.default_rng(0), []
    for x in INPUTS:
        low, high = sorted((x.fast, x.slow))
        draws.append(rng.triangular(low, x.central, high, 100_000))
    return tuple(np.percentile(seconds(work, *draws), (5, 50, 95)))


PAGE = """
# Time to 3.28 on 8xH100: a prediction, not a measurement

Nobody has run track `small` yet. Made by `python -m bench.predict --page bench/PREDICTION.md`; a test keeps
both alike.

**Predicted: {central:.0f} s; 90 % of draws between {low:.0f} and {high:.0f} s (median {median:.0f}); all
inputs at their best {fast:.0f} s, at their worst {slow:.0f} s.** So the goal, under {goal:.0f} s, is not
predicted; the last section says what it would take.

    seconds = FLOPs of all steps / (8 x {peak} TFLOP/s x utilization of one GPU x parallel efficiency)
              x slowness of the host

## Inputs

{inputs}

Measured by us: nothing yet; `python -m bench.gpu` will replace the utilization of one GPU. Counted from the
code (`bench/floors.py`): {tokens:.1f} M tokens in {steps} steps, {work:.2f}e17 FLOPs of the model,
{head:.1%} of them in the head; the optimizer's are not in it. Documents are drawn with FineWeb's lengths
(log-normal, median 403, mean 690; assumed), so attention counts the keys that are there. A draw takes each
input from a triangle over its range with the top at its central value.

{stages}

## Checks of the formula

Record 80 took {record:.1f} s on 8xH100 for {steps} steps of the same size (public). In our count of FLOPs
that is {record_share:.1%} of the peak, against {our_share:.1%} in the central prediction: the difference is
what the kernels that we lack are assumed to cost.

The utilization is in units of bf16's peak and includes a head in FP8 at twice the rate. Without FP8 it
would take up to {longer:.0%} longer: {without:.0f} s.

The floors of all parts on one of 8 ranks add up to {floor_ms:.1f} ms per step, {floor_s:.0f} s in all, if
nothing overlaps; the central prediction is {step_ms:.1f} ms per step. Elementwise is an estimate, of
kernels that do not melt into products. The utilization and the efficiency include the optimizer and the
communication already, as upstream's do.

{floors}

## Recipes and public times

{recipes}

The prediction of `--recipe=record89` takes the same rates, and 1285 steps for granted. The public record 89
also has FP8 in the products of its MLP, 1.8 s of its time by its own records, which ours has not. The
unmerged proposal has changed the training loss, the tables and the optimizer too:
[docs/frontier.md](../docs/frontier.md).

## What would have to be true for {goal:.0f} s

{needed}

Upstream's best merged code reaches 41.7 % on eight GPUs (public) and needs 1285 steps. At {steps} steps the
floors leave hardly any room for {goal:.0f} s unless elementwise passes melt into the products around them.
One GPU at our goal of 55 % and 1285 steps together would take {best:.0f} s; either alone is not enough.
"""


def row_of(name: str, counted: dict, predicted: float, public: float) -> list:
    """Return a row of the table of recipes. counted: see count()."""
    tokens = f"{counted['tokens'] / 1e6:.1f}"
    work = f"{counted['work'] / 1e17:.2f}"
    return [name, counted["steps"], tokens, work, f"{predicted:.0f}", f"{public:.1f}"]


def page() -> str:
    c = count()
    work, steps, efficiency = c["work"], c["steps"], INPUTS[2].central
    fast = seconds(work, *(x.fast for x in INPUTS))
    central = seconds(work, *(x.central for x in INPUTS))
    slow = seconds(work, *(x.slow for x in INPUTS))
    low, median, high = spread(work)
    floor = {part: ms for part, ms in c["floors"].items() if ms > 0.05}
    more = count("record89")
    recipe = seconds(more["work"], 1285, INPUTS[1].central, efficiency, 1, planned=1285)
    needed = {n: work * n / steps / PEAK / GOAL for n in (1480, 1400, 1285)}
    text = PAGE.lstrip("\n").format(
        central=central, low=low, median=median, high=high, fast=fast, slow=slow, goal=GOAL, peak=H100.tflops,
        tokens=c["tokens"] / 1e6, steps=steps, work=work / 1e17, head=c["head"], record=RECORD,
        record_share=work / PEAK / RECORD, our_share=INPUTS[1].central * efficiency,
        
        longer=1 / (1 - c["head"] / 2) - 1, without=central / (1 - c["head"] / 2),
        floor_ms=sum(floor.values()), floor_s=steps * sum(floor.values()) / 1000,
        step_ms=1000 * central / steps, best=seconds(work, 1285, 0.55, efficiency, 1),
        inputs=grid(Input._fields, [
            [x.name, f"{x.fast:g}", f"{x.central:.4g}", f"{x.slow:g}", x.kind, x.source] for x in INPUTS]),
        recipes=grid(["what", "steps", "tokens, M", "FLOPs, e17", "predicted, s", "public, s"], [
            row_of("track small, and record 80", c, central, RECORD),
            row_of("--recipe=record89, and record 89 (merged)", more, recipe, MERGED),
            ["pull request 360 (not merged)", "-", "-", "-", "-", f"{UNMERGED:.1f}"]]),
        stages=grid(["steps", "tokens per step", "MFLOP per token"], [
            [f"{first} to {end}", f"{n:,}", f"{mflop:.1f}"] for first, end, n, mflop in c["stages"]]),
        floors=grid(["part", "floor, ms per step and rank", "of the central step"], [
            [part, f"{ms:.1f}", f"{ms * steps / central / 1000:.0%}"] for part, ms in floor.items()]),
        needed=grid(["steps", "utilization of eight GPUs", "of one, at 94.6 % efficiency", "ms per step"], [
            [n, f"{u:.1%}", f"{u / efficiency:.1%}", f"{1000 * GOAL / n:.1f}"] for n, u in needed.items()]))
    paragraphs = text.split("\n\n")
    prose = [p for p in paragraphs if p[0] not in "#| "]
    wrapped = {p: textwrap.fill(p, 118, break_on_hyphens=False) for p in prose}
    return "\n\n".join(wrapped.get(p, p) for p in paragraphs).rstrip("\n") + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description=__doc__.partition("\n")[0])
    parser.add_argument("--page", type=Path, help="write the page")
    args = parser.parse_args(argv)
    text = page()
    if args.page:
        args.page.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:], "bench.predict"))
