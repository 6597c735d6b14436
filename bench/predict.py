"""Predicted seconds to 3.28 on eight H100: the kernels of a step by bench.cross, at public or assumed rates.

    python -m bench.predict [--page bench/PREDICTION.md]
"""
import sys
import textwrap
from collections import Counter, defaultdict
from pathlib import Path

from bench.cross.costs import ACHIEVED, SHEET, Rates, by_part, costliest, milliseconds, step_ms
from bench.cross.figures import launches
from bench.page import grid
from data.errors import CommandLine, UsageError, run_program
from data.files import written_whole
from tools.gpus import GPUS
from tools.traced import FOLDER, traced_run
from train_gpt import Config

H100 = GPUS["H100"]
GOAL = 60.0  # seconds
RECORD = 1.406 * 60  # record 80: 1480 steps of the same batches, documents and windows
MERGED = 1.23 * 60  # record 89, the newest that is merged: 1285 steps
UNMERGED = 39.914  # a proposal of 2026-08-31 (pull request 360), by its author; record 89 took 73.889 s there
UPSTREAM = 609e3  # tokens per second of its code on one H100, public logs of record 88
SKETCH = 74.4  # ms of the model's passes from step 960, when they were costed for the first time
MODEL_GOAL = 52  # ms of them
REST = 1.08  # what no roofline knows, times; assumed

RATES = [  # what, its central value, where it comes from
    ["memory, of 3.35 TB/s", f"{ACHIEVED.memory:.0%}",
     "public: copies and triads on an H100 SXM reach 3.0 to 3.1 TB/s"],
    ["products in bf16, of 989 TFLOP/s", f"{ACHIEVED.bf16:.0%}",
     "public: about 790 TFLOP/s by cuBLAS on large products; small ones and a hot GPU reach less"],
    ["products in FP8, of 1979 TFLOP/s", f"{ACHIEVED.fp8:.0%}",
     "public: about 1,300 TFLOP/s on large products"],
    ["attention, of 989 TFLOP/s", f"{ACHIEVED.attention:.0%}",
     "public: FlashAttention-2 reaches 35 % (arXiv 2407.08608), less backward and with short documents"],
    ["links, of 450 GB/s", f"{ACHIEVED.link:.0%}", "assumed; nothing of it is taken to be hidden"],
    ["between two kernels", f"{ACHIEVED.gap_us:g} us", "assumed"],
    ["the rest", f"x {REST:g}",
     "assumed: rows read more than once, clocks that fall, ranks that wait, a host that launches too late"],
]


class Recipe:
    """A recipe of track small, and what the mean step of each of its stages launches on one of some ranks."""

    def __init__(self, name: str, ranks: int = 8):
        self.cfg = Config.for_track("small", recipe=name)
        self.steps = [count for _, count in self.cfg.steps_by_stage]
        run = traced_run(self.cfg, ranks, fp8=True)
        if run is None:
            raise UsageError(f"{FOLDER}: expected a run of {ranks} ranks with the settings of {name}, "
                             "found none; make one by python -m bench.cross --parts costs --out=PATH")
        self.launches = launches(run)

    def seconds(self, rates: Rates) -> float:
        return sum(n * step_ms(found, H100, rates) / 1000 for n, found in zip(self.steps, self.launches))

    def gains(self) -> list[tuple]:
        """Return (names, seconds) of the ten kernels whose end would gain most."""
        seconds = Counter()
        for n, found in zip(self.steps, self.launches):
            for names, ms in costliest(found, H100).items():
                seconds[names] += n * ms / 1000
        return seconds.most_common(10)


PAGE = """
# Time to 3.28 on 8xH100: a prediction, not a measurement

Nobody has run track `small` on a GPU yet. `python -m bench.predict --page bench/PREDICTION.md` makes this
page of the kernels that `python -m bench.cross` found in a step of one of 8 ranks ([CROSS.md](CROSS.md)); a
test keeps both alike.

**Predicted: {central:.0f} s for {steps} steps. With these kernels it cannot be under {floor:.0f} s**: that
is the floor, each kernel at the whole rate of the data sheet and no gap between two. At rates that public
runs achieve they take {achieved:.1f} s. The rest is an assumption, and so is that {steps} steps suffice, as
they did for record 80, whose schedule and techniques ours follows. The goal is under {goal:.0f} s.

    seconds = sum over steps and kernels of (larger of bytes / rate and operations / rate, + gap) x the rest

{rates}

Measured by us: nothing yet; `python -m bench.gpu` compares. Attention counts the keys of documents of
FineWeb's lengths (log-normal, median 403, mean 690 tokens; assumed).

## The step of one rank

{stages}

{parts}

## What the model's passes are made of

Forward and backward pass of the model take {model:.1f} of the {step:.1f} ms from step 960; optimizers, sums
of gradients and communication take the others. The first sketch of these costs, at the same rates and of
the same passes, was {sketch} ms, and the goal {model_goal} ms. Products and attention alone, with nothing
beside them, would take {products:.1f} ms, so that the goal leaves {left:.1f} ms for kernels that take
{others:.1f} ms now, and {beside:.1f} ms if they ran at the whole rate of the memory, without gaps.

{model_parts}

## The ten costliest kernels

What the run would gain if each were gone, at achieved rates. Kernels of the same operations are one row.

{gains}

## Public times

{recipes}

Record 80 trains on the same batches, documents and windows in as many steps, with kernels of its own. On one
H100 upstream's code takes {upstream:,.0f} tokens a second (public logs of record 88); ours would take
{alone:,.0f} at achieved rates, and {slower:,.0f} with the rest. The proposal has changed the training loss,
the tables and the optimizer: [docs/frontier.md](../docs/frontier.md).

## What would have to be true for {goal:.0f} s

{needed}
"""


def predicted(recipe: Recipe) -> float:
    return REST * recipe.seconds(ACHIEVED)


def stage_rows(recipe: Recipe) -> list[list]:
    rows = []
    for (first, n), found in zip(recipe.cfg.steps_by_stage, recipe.launches):
        times = [f"{step_ms(found, H100, rates):.1f}" for rates in (SHEET, ACHIEVED)]
        rows.append([f"{first} to {first + n}", f"{recipe.cfg.at('batch_tokens', first):,}", *times])
    return rows


def part_rows(recipe: Recipe) -> list[list]:
    """Return the parts of a step of the last stage but the extension, the costliest first."""
    parts = by_part(recipe.launches[-2], H100)
    rows = sorted(parts.items(), key=lambda row: -row[1]["ms"])
    keys = "floor_ms", "ms", "gb", "launches"
    return [[part, *(f"{row[key]:.1f}" for key in keys)] for part, row in rows if row["ms"] >= 0.05]


def model_rows(recipe: Recipe) -> list[list]:
    """Return what products and attention take in the passes of the model, by part, and what all other kernels
    take beside them, in the last stage but the extension."""
    rows = defaultdict(Counter)
    for launch in recipe.launches[-2]:
        if not launch.graph.startswith("GPT"):
            continue
        row, ms = rows[launch.part], milliseconds(launch, H100, ACHIEVED)
        if launch.flops:
            row["products"] += ms
            continue
        row["others"] += ms
        row["floor"] += milliseconds(launch, H100, SHEET)
        row["gb"] += launch.times * launch.bytes / 1e9
        row["launches"] += launch.times
    order = sorted(rows.items(), key=lambda row: -row[1]["products"] - row[1]["others"])
    keys = "products", "others", "floor", "gb", "launches"
    order.append(("all", sum(rows.values(), Counter())))
    return [[part, *(row[key] for key in keys)] for part, row in order]


def recipe_row(what: str, recipe: Recipe, public: float) -> list:
    cfg = recipe.cfg
    times = f"{recipe.seconds(SHEET):.1f}", f"{predicted(recipe):.0f}", f"{public:.1f}"
    return [what, cfg.train_steps, f"{cfg.train_tokens / 1e6:.1f}", *times]


def needed_row(name: str, recipe: Recipe) -> list:
    n = recipe.cfg.train_steps
    now = predicted(recipe)
    return [name, n, f"{1000 * GOAL / n:.1f}", f"{1000 * now / n:.1f}", f"{1 - GOAL / now:.0%}"]


def page() -> str:
    base, more = Recipe("base"), Recipe("record89")
    alone = Recipe("base", ranks=1).seconds(ACHIEVED)
    step = ["floor, ms", "achieved rates, ms"]
    recipes = [
        recipe_row("track small, and record 80", base, RECORD),
        recipe_row("--recipe=record89, and record 89 (merged)", more, MERGED),
        ["pull request 360 (not merged)", "-", "-", "-", "-", f"{UNMERGED:.1f}"],
    ]
    model = model_rows(base)
    _, products, others, beside, *_ = model[-1]
    text = PAGE.lstrip("\n").format(
        steps=base.cfg.train_steps,
        goal=GOAL,
        floor=base.seconds(SHEET),
        achieved=base.seconds(ACHIEVED),
        central=predicted(base),
        upstream=UPSTREAM,
        alone=base.cfg.train_tokens / alone,
        slower=base.cfg.train_tokens / alone / REST,
        step=step_ms(base.launches[-2], H100, ACHIEVED),
        model=products + others,
        sketch=SKETCH,
        model_goal=MODEL_GOAL,
        products=products,
        left=MODEL_GOAL - products,
        others=others,
        beside=beside,
        model_parts=grid(["part", "products and attention, ms", "kernels beside them, ms", "their floor, ms",
                          "their GB", "their launches"],
                         [[part, *(f"{x:.1f}" for x in row)] for part, *row in model]),
        rates=grid(["rate", "taken", "source"], RATES),
        stages=grid(["steps", "tokens per step", *step], stage_rows(base)),
        parts=grid(["part, from step 960", *step, "GB", "launches"], part_rows(base)),
        gains=grid(["s of the run", "part", "graph", "operations"],
                   [[f"{s:.2f}", *names] for names, s in base.gains()]),
        recipes=grid(["what", "steps", "tokens, M", "floor, s", "predicted, s", "public, s"], recipes),
        needed=grid(["recipe", "steps", "ms per step needed", "predicted", "less by"],
                    [needed_row("base", base), needed_row("record89", more)]),
    )
    paragraphs = text.split("\n\n")
    for i, paragraph in enumerate(paragraphs):
        if paragraph[0] not in "#| ":
            paragraphs[i] = textwrap.fill(paragraph, 118, break_on_hyphens=False)
    return "\n\n".join(paragraphs).rstrip("\n") + "\n"


def main(argv: list[str]) -> int:
    parser = CommandLine(__doc__, "python -m bench.predict")
    parser.add_argument("--page", type=Path, help="page to write")
    args = parser.parse_args(argv)
    text = page()
    if args.page:
        with written_whole(args.page, "w") as file:
            file.write(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:], "bench.predict"))
