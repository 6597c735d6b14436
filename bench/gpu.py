"""All that needs a GPU in one command of ten minutes: what works, how fast, and what it takes.

    python -m bench.gpu [--out=FOLDER] [--only PART ...] [--cpu] [--field=value ...]

Writes gpu.json and gpu.md into bench/results/<date>_<gpu>, or the folder that --out or OUT in the environment
names, anew after every part. A part is a child with a time limit; one that fails or takes too long is
reported and the next one begins. Without a GPU, or with --cpu, the same parts run at reduced size on track
shakespeare: that tries this script, and says nothing about a GPU.
"""
import importlib.util
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.page import grid
from bench.predict import UPSTREAM
from bench.step import ensure_shards
from bench.trials import commit
from data.errors import CommandLine, run_program
from data.files import ROOT
from tools.children import ending, run_limited
from train_gpt import Config, configure

LIMITS_S = {  # below ten minutes together
    "doctor": 60,
    "cold start": 220,
    "warm start": 35,
    "step": 115,
    "head": 45,
    "memory": 20,
    "tests": 50,
    "muon": 35,
}
SHORT = ["--train_steps=24", "--extension_steps=6"]  # a run with every stage, for the sake of its start


class Failed(Exception):
    """Says why a part has no result."""


def config(flags: list[str]) -> Config:
    return configure(flags)[1]


# ------------------------------------------------------------------------------------------------------------
# Parts: each returns a dictionary of results, or raises


class Parts:
    """A method for each part: it runs a child within a time limit, with the settings `flags` of the
    trainer."""

    def __init__(self, cpu: bool, flags: list[str], scratch: Path):
        self.cpu, self.flags, self.scratch = cpu, flags, scratch
        self.env = {
            "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/cache",
            "TRITON_CACHE_DIR": f"{scratch}/cache/triton",
            "OUT": str(scratch),
        }
        if cpu:
            self.env["CUDA_VISIBLE_DEVICES"] = ""

    def call(self, limit_s: float, *command: str, codes=(0,)) -> str:
        """Return what `python COMMAND` prints. Raises Failed."""
        child = run_limited([sys.executable, *command], limit_s, cwd=ROOT, env=os.environ | self.env)
        if child.returncode not in codes:
            raise Failed(ending(child, limit_s))
        return child.stdout

    def doctor(self, limit_s: float) -> dict:
        return dict(text=self.call(limit_s, "-m", "tools.doctor", *self.flags, codes=(0, 1)))

    def start(self, limit_s: float) -> dict:
        """Return the seconds from launch to first timed step, which the trainer's log says."""
        more = [*SHORT, f"--val_tokens={config(self.flags).val_slice}", f"--log_dir={self.scratch}/logs"]
        out = self.call(limit_s, "train_gpt.py", *self.flags, *more)
        log = Path(re.search(r"^log: (.*)$", out, re.M)[1]).read_text(encoding="utf-8")
        said = re.search(r"^start-up: ([\d.]+) s.*$", log, re.M)
        return dict(seconds=float(said[1]), text=said[0])

    def step(self, limit_s: float) -> dict:
        text = self.call(limit_s, "-m", "bench.step", *self.flags)
        return dict(text=text, **json.loads((self.scratch / "bench_step.json").read_text()))

    def head(self, limit_s: float) -> dict:
        text = self.call(limit_s, "-m", "bench.head", *self.flags)
        return dict(text=text, **json.loads(text))

    def memory(self, limit_s: float) -> dict:
        """Return what tools.plan expects at the fullest moment of a training step, without its allowance."""
        text = self.call(limit_s, "-m", "tools.plan", *self.flags)
        planned = re.search(r"^needed: training +([\d.]+)", text, re.M)
        return dict(text=text, planned_mib=1024 * float(planned[1]))

    def tests(self, limit_s: float) -> dict:
        if importlib.util.find_spec("pytest") is None:
            raise Failed("expected pytest, found none; pip install -r requirements-dev.txt and start again")
        command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu")
        text = self.call(limit_s, *command, codes=(0, 1, 5))
        return dict(text=text, summary=text.strip().splitlines()[-1].strip("= "))

    def muon(self, limit_s: float) -> dict:
        path = self.scratch / "muon.json"
        subjects = "--subjects", "muon.py", "torch.optim.Muon"
        text = self.call(limit_s, "-m", "bench.muon", "run", str(path), "--only", "times", *subjects)
        return dict(text=text, **json.loads(path.read_text()))

    def run(self, name: str, limit_s: float) -> dict:
        start = time.monotonic()
        try:
            if limit_s < 5:
                raise Failed("not begun: no time left")
            found = getattr(self, name.removeprefix("cold ").removeprefix("warm "))(limit_s)
        except (Failed, OSError, ValueError, LookupError, TypeError) as e:
            found = dict(why=str(e) if isinstance(e, Failed) else f"{type(e).__name__}: {e}")
        return found | dict(took=time.monotonic() - start)


# ------------------------------------------------------------------------------------------------------------
# What was found beside what is required


def speed(cfg: Config, step: dict) -> tuple[float, float | None]:
    """Return (tokens per second, part of the peak) over the whole schedule; FLOPs are those of the kernels
    that bench.cross found, None where it has not traced these settings."""
    seconds = tokens = gflop = 0.0
    for row, (_, steps) in zip(step["rows"], cfg.steps_by_stage):
        seconds += steps * row["ms"] / 1000
        tokens += steps * row["tokens"]
        gflop += steps * (row["parts"][-1]["costs"] or {}).get("gflop", 0.0)
    share = gflop / 1000 / seconds / step["tflops"] if gflop else None
    return tokens / seconds, share


def figures(result: dict) -> list[tuple]:
    """Return (what, required, measured, met or None) of each requirement, None where it was not measured."""
    found = {name: part for name, part in result["parts"].items() if "why" not in part}
    rows = []

    def add(what: str, required: str, measured: str, met: bool | None):
        rows.append((what, required, measured, met))

    if step := found.get("step"):
        tokens, share = speed(config(result["flags"]), step)
        faster = tokens > UPSTREAM if re.search("H100|H200", step["device"]) else None
        add("tokens/s of one process", f"> {UPSTREAM:,.0f}, upstream on one H100", f"{tokens:,.0f}", faster)
        if share:
            add("part of the peak, mean over the schedule", "goal 55 %", f"{share:.1%}", share >= 0.55)
        for row in step["rows"]:
            if costs := row["parts"][-1]["costs"]:
                slower = row["ms"] / costs["ms"]
                could = f"{costs['ms']:.1f} ms at achieved rates by bench.cross"
                add(f"a step of stage {row['stage']}", could, f"{row['ms']:.1f} ms", slower <= 1.1)
    for name, limit in (("cold start", 120), ("warm start", 20)):
        if part := found.get(name):
            seconds = part["seconds"]
            add(f"{name}: launch to first timed step", f"<= {limit} s", f"{seconds:.1f} s", seconds <= limit)
    if "memory" in found and step and step["peak_mib"]:
        off = step["peak_mib"] / found["memory"]["planned_mib"] - 1
        add("peak memory against tools.plan", "within 10 %", f"{off:+.1%}", abs(off) <= 0.1)
    if head := found.get("head"):
        error = max(head["fp8"][key] for key in ("loss", "dx", "dw"))
        ratio = head["bf16"]["ms"] / head["fp8"]["ms"]
        add("FP8 head: error", "< 0.15", f"{error:.3f}", error < 0.15)
        add("FP8 head: speed against bf16", "> 1", f"{ratio:.2f}", ratio > 1)
    if times := found.get("muon", {}).get("times"):
        shapes = times[0]["shapes"]
        ms = {row["subject"]: 1000 * statistics.median(row["seconds"])
              for row in times if row["shapes"] == shapes and row["seconds"]}
        ours = ms.get("muon.py", math.inf)
        theirs = ms.get("torch.optim.Muon", math.nan)
        add(f"one Muon step, {shapes}", "<= 3 ms", f"{ours:.2f} ms", ours <= 3)
        ratio = theirs / ours
        add("the same against torch.optim.Muon", ">= 8 times", f"{ratio:.1f} times", ratio >= 8)
    if tests := found.get("tests"):
        good = "passed" in tests["summary"] and not re.search("failed|error", tests["summary"])
        add("tests/gpu", "all pass", tests["summary"], good)
    if doctor := found.get("doctor"):
        add("doctor", "the run can start", doctor["text"].splitlines()[-1], "can start" in doctor["text"])
    for name in LIMITS_S:
        if name not in found:
            add(name, "", f"not measured: {result['parts'].get(name, {}).get('why', 'left out')}", None)
    add("time to 3.28 on 8xH100", "< 60 s", "not measured: predicted in bench/PREDICTION.md", None)
    return rows


def page(result: dict) -> str:
    machine = result["machine"]

    def verdict(met: bool | None) -> str:
        return "-" if met is None or machine["cpu"] else "yes" if met else "**no**"

    judged = [[*row, verdict(met)] for *row, met in figures(result)]
    command = f"python -m bench.gpu {' '.join(result['flags'])}"
    out = [f"# {machine['device']}, {machine['date']}",
           f"torch {machine['torch']}, commit {machine['commit']}; `{command}`"]
    if machine["cpu"]:
        out.append("This tries the script at reduced size: no figure says anything about a GPU, and none is "
                   "met or missed.")
    out.append(grid(["what", "required", "measured", "met"], judged))
    for name, part in result["parts"].items():
        out += [f"## {name}", f"{part['took']:.0f} s; {part.get('why', 'done')}"]
        if "text" in part:
            out.append(part["text"] if "|---" in part["text"] else f"```\n{part['text']}\n```")
    return "\n\n".join(out) + "\n"


def describe_machine(cpu: bool) -> dict:
    return dict(
        cpu=cpu,
        device="CPU" if cpu else torch.cuda.get_device_name(),
        date=time.strftime("%Y-%m-%d"),
        torch=torch.__version__,
        commit=commit() or "unknown",
    )


def main(argv: list[str]) -> int:
    parser = CommandLine(__doc__, "python -m bench.gpu")
    parser.add_argument("--out", type=Path, help="folder to write the results to")
    parser.add_argument("--only", nargs="+", choices=LIMITS_S, default=list(LIMITS_S),
                        help="parts to run (default: all)")
    parser.add_argument("--cpu", action="store_true", help="run at reduced size, without a GPU")
    args, flags = parser.parse_known_args(argv)
    cpu = args.cpu or not torch.cuda.is_available()
    flags = [f"--track={'shakespeare' if cpu else 'small'}", "--max_epochs=1000", *flags]
    machine = describe_machine(cpu)
    result = dict(flags=flags, parts={}, machine=machine)
    slug = re.sub("[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    folder = args.out or Path(os.environ.get("OUT") or f"bench/results/{machine['date']}_{slug}")
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        ensure_shards(config(flags), Path(scratch), 2 * 10**6 if cpu else 100 * 10**6)
        parts = Parts(cpu, flags, Path(scratch))
        for name in args.only:
            left = sum(LIMITS_S.values()) - (time.monotonic() - begin)
            part = parts.run(name, min(LIMITS_S[name], left))
            result["parts"][name] = part
            print(f"{name}: {part.get('why', 'done')} ({part['took']:.0f} s)", flush=True)
            (folder / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
            (folder / "gpu.md").write_text(page(result), encoding="utf-8")
    print(f"{folder / 'gpu.md'} after {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:], "bench.gpu"))
