"""All that needs a GPU in one command of nine minutes: what works, how fast it is, what it takes, beside what is required.

    python -m bench.gpu [--out=bench/results] [--only=PART ...] [--cpu] [--field=value ...]

Writes <out>/<date>_<gpu>/gpu.json and gpu.md, or both into the folder OUT of the environment, anew after every part. A part is
a process of its own with a time limit; one that fails or takes too long is reported and the next one begins. Without a GPU, or
with --cpu, the same parts run at reduced size on track shakespeare: that tries this script, and says nothing about a GPU.
"""
import argparse
import importlib.util
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.step import synthetic_shards
from data.loader import find_shards
from data.shards import ShardError
from engine.attention import CANDIDATES
from engine.log import ROOT
from train_gpt import Config, parse_config

BUDGET = 530  # seconds for everything
LIMITS = {"doctor": 60, "cold start": 140, "warm start": 30, "step": 110, "attention": 35, "head": 40, "eager": 25, "memory": 15,
          "tests": 45, "muon": 30}
UPSTREAM = 609e3  # tokens per second of upstream's code on one H100, see bench/PREDICTION.md


class Failed(Exception):
    """A part has no result, for the reason given."""


def execute(command: list[str], limit: float, env: dict, codes=(0,), until: str = "") -> list[tuple[float, str]]:
    """(seconds since the start, line) of the output; ends early at a line that starts with `until`."""
    start, lines, rest, ended = time.monotonic(), [], "", False
    with tempfile.NamedTemporaryFile("w") as out, open(out.name) as read, tempfile.TemporaryFile("w+") as errors:
        p = subprocess.Popen(command, cwd=ROOT, env=os.environ | env, stdout=out, stderr=errors, start_new_session=True)
        while not ended and time.monotonic() - start < limit:
            ended = p.poll() is not None  # asked before what is there is read
            *whole, rest = (rest + read.read()).split("\n")
            lines += [(time.monotonic() - start, line) for line in whole]
            found = bool(until) and any(line.startswith(until) for line in whole)
            ended = ended or found
            time.sleep(0 if ended else 0.02)
        late = not ended
        try:
            os.killpg(p.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        p.wait()
        errors.seek(0)
        said = [line.strip() for line in errors.read().splitlines() if line.strip() and not line.startswith("USDT")]
    if late:
        raise Failed(f"stopped after {limit:.0f} s; last line: {(lines or [(0, 'none')])[-1][1][:200]}")
    if p.returncode not in codes and not found or until and not found:
        raise Failed(f"exit code {p.returncode}: {(said or [line for _, line in lines] or ['no message'])[-1][:300]}")
    return lines


def text_of(*args) -> str:
    return "\n".join(line for _, line in execute(*args))


# ---------------------------------------------------------------------------------------------------------------------
# Parts: (settings of the trainer, time limit, results so far, environment) to a dictionary of results


class Session:
    def __init__(self, args, flags: list[str], scratch: Path):
        self.cpu, self.flags, self.result = args.cpu, flags, dict(parts={})
        self.env = {"TORCHINDUCTOR_CACHE_DIR": str(scratch / "cache"), "TRITON_CACHE_DIR": str(scratch / "cache" / "triton"),
                    "OUT": str(scratch), **({"CUDA_VISIBLE_DEVICES": ""} if args.cpu else {})}
        self.scratch = scratch

    def piece(self, limit: float, name: str) -> dict:
        path = self.scratch / "piece.json"
        text_of([sys.executable, "-m", "bench.gpu_pieces", str(path), name, *self.flags], limit, self.env)
        return json.loads(path.read_text())

    def train(self, *more: str) -> list[str]:
        return [sys.executable, "train_gpt.py", *self.flags, f"--log_dir={self.scratch}", *more]

    def doctor(self, limit):
        return dict(text=text_of(self.train("--doctor"), limit, self.env, (0, 1)))

    def start(self, limit):
        """From the launch to the first timed step, by when the trainer's lines appear."""
        lines = execute(self.train(), limit, self.env, until="step:3/")
        marks = {"log opened": r"\.txt$", "first timed step begins": "^step:0/", "it ends": "^step:1/", "third ends": "^step:3/"}
        at = {key: next(t for t, line in lines if re.search(pattern, line)) for key, pattern in marks.items()}
        log = Path(ROOT, next(line for _, line in lines if line.endswith(".txt"))).read_text(encoding="utf-8")
        own = [line for line in log.splitlines() if line.startswith("start-up: ")]
        return dict(seconds=at["first timed step begins"], at=at, said=own)

    def step(self, limit):
        text = text_of([sys.executable, "-m", "bench.step", *self.flags], limit, self.env)
        return dict(text=text, **json.loads((self.scratch / "bench_step.json").read_text()))

    def attention(self, limit):
        names, found, end = ["blocked", "masked"] if self.cpu else [*CANDIDATES, "blocked"], {}, time.monotonic() + limit
        for name in names:
            try:
                found[name] = self.piece(end - time.monotonic(), f"attention:{name}")
            except Failed as e:
                found[name] = dict(why=str(e))
        return dict(backends=found)

    def memory(self, limit):
        """The fullest moment that --plan predicts, its allowance left out, beside the most that bench.step took."""
        text = text_of(self.train("--plan"), limit, self.env)
        needed = {line.split(":")[1].split()[0]: float(re.findall(r"[\d.]+", line)[0]) for line in text.splitlines()
                  if line.startswith("needed")}
        peak = self.result["parts"].get("step", {}).get("peak_mib")
        return dict(text=text, planned_mib=1024 * max(needed.values()), peak_mib=peak)

    def tests(self, limit):
        if importlib.util.find_spec("pytest") is None:
            raise Failed("pytest is not installed")
        text = text_of([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"], limit, self.env, (0, 1, 5))
        return dict(text=text, summary=text.strip().splitlines()[-1])

    def muon(self, limit):
        parts = "accuracy" if self.cpu else "times"
        text = text_of([sys.executable, "-m", "bench.muon", f"--only={parts}", "--subjects=muon.py,torch.optim.Muon",
                        f"--json={self.scratch}/muon.json"], limit, self.env)
        return dict(text=text, **json.loads((self.scratch / "muon.json").read_text()))

    def parts(self) -> dict:
        return {"doctor": self.doctor, "cold start": self.start, "warm start": self.start, "step": self.step,
                "attention": self.attention, "head": lambda limit: self.piece(limit, "head"),
                "eager": lambda limit: self.piece(limit, "eager"), "memory": self.memory, "tests": self.tests, "muon": self.muon}


# ---------------------------------------------------------------------------------------------------------------------
# The page


def speed(cfg: Config, step: dict) -> tuple[float, float]:
    """(tokens per second, part of the peak) over the whole schedule; FLOPs of the keys that are seen in these documents."""
    steps = [sum(cfg.stage(s) == r["stage"] for s in range(cfg.train_steps)) for r in step["rows"]]
    seconds = sum(n * r["ms"] for n, r in zip(steps, step["rows"])) / 1000
    model = ("attention", "projections", "MLP", "head and loss")
    gflop = sum(n * p["gflop"] for n, r in zip(steps, step["rows"]) for p in r["parts"] if p["part"] in model)
    return sum(n * r["tokens"] for n, r in zip(steps, step["rows"])) / seconds, gflop / 1e3 / seconds / step["peak"]["tflops"]


def figures(result: dict) -> list[tuple]:
    """(what, required, measured, met or None) from the parts that have a result."""
    p, rows = {name: part for name, part in result["parts"].items() if "why" not in part}, []
    if "step" in p:
        tokens, share = speed(config(result["flags"]), p["step"])
        same = re.search("H100|H200", p["step"]["device"])
        rows += [("tokens/s of one process", f"> {UPSTREAM:,.0f}, upstream on one H100", f"{tokens:,.0f}",
                  tokens > UPSTREAM if same else None),
                 ("part of the peak, mean over the schedule", "goal 55 %", f"{share:.1%}", share >= 0.55)]
    for name, limit in (("cold start", 120), ("warm start", 20)):
        if name in p:
            rows.append((f"{name}: launch to first timed step", f"<= {limit} s", f"{p[name]['seconds']:.1f} s",
                         p[name]["seconds"] <= limit))
    if "memory" in p:
        off = (p["memory"]["peak_mib"] or math.nan) / p["memory"]["planned_mib"] - 1
        rows.append(("peak memory against --plan", "within 10 %", f"{off:+.1%}" if off == off else "not measured: no peak known",
                     abs(off) <= 0.1 if off == off else None))
    if "eager" in p:
        rows.append(("trains without a compiler in this memory", "yes", f"{'yes' if p['eager']['fits'] else 'no'}, peak "
                     f"{p['eager'].get('peak_mib') or 'unknown'} MiB", p["eager"]["fits"]))
    for name, row in p.get("attention", {}).get("backends", {}).items():
        if "error" in row:
            rows.append((f"attention by {name}: error", "< 0.02", f"{row['error']:.1e}", row["error"] < 0.02))
    if "head" in p:
        fp8, ratio = p["head"]["fp8"], p["head"]["bf16"]["ms"] / p["head"]["fp8"]["ms"]
        error = max(fp8[key] for key in ("loss", "dx", "dw"))
        rows += [("FP8 head: error", "< 0.15", f"{error:.3f}", error < 0.15),
                 ("FP8 head: speed against bf16", "> 1", f"{ratio:.2f}", ratio > 1)]
    if times := p.get("muon", {}).get("times"):
        ms = {r["subject"]: 1000 * statistics.median(r["seconds"]) for r in times
              if r["shapes"] == times[0]["shapes"] and r["seconds"]}
        ours, theirs = ms.get("muon.py", math.inf), ms.get("torch.optim.Muon", math.nan)
        rows += [(f"one Muon step, {times[0]['shapes']}", "<= 3 ms", f"{ours:.2f} ms", ours <= 3),
                 ("the same against torch.optim.Muon", ">= 8 times", f"{theirs / ours:.1f} times", theirs / ours >= 8)]
    if "tests" in p:
        good = "passed" in p["tests"]["summary"] and not re.search("failed|error", p["tests"]["summary"])
        rows.append(("tests/gpu", "all pass", p["tests"]["summary"].strip("= "), good))
    if "doctor" in p:
        rows.append(("doctor", "the run can start", p["doctor"]["text"].splitlines()[-1], "can start" in p["doctor"]["text"]))
    rows += [(name, "", f"not measured: {result['parts'].get(name, {}).get('why', 'left out')}", None)
             for name in LIMITS if name not in p]
    return rows + [("Muon's exposed share of a step of 8 GPUs", "< 1 %", "not measured: needs 8 GPUs", None),
                   ("time to 3.28 on 8xH100", "< 60 s", "not measured: predicted in bench/PREDICTION.md", None)]


def page(result: dict) -> str:
    def table(header, rows):
        return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [header, ["---"] * len(header), *rows])

    m = result["machine"]
    tried = "This tries the script at reduced size without a GPU: no figure says anything about a GPU, none is met or missed."
    verdict = lambda met: "-" if met is None or m["cpu"] else "yes" if met else "**no**"
    out = [f"# {m['device']}, {m['date']}", f"torch {m['torch']}, Python {m['python']}, commit {m['commit']}; "
           f"`python -m bench.gpu {' '.join(result['flags'])}`", tried if m["cpu"] else "",
           table(["what", "required", "measured", "met"], [[*row, verdict(met)] for *row, met in figures(result)]),
           table(["part", "seconds", "outcome"], [[name, f"{part.get('took', 0):.0f}", part.get("why", "done").replace("|", "/")]
                                                  for name, part in result["parts"].items()])]
    for name, part in result["parts"].items():
        if part.get("at"):
            out += [f"## {name}", table(part["at"], [[f"{t:.1f} s" for t in part["at"].values()]]), "\n".join(part["said"])]
        if part.get("backends"):
            out += [f"## {name}", table(["backend", "ms short", "long", "paired", "TFLOP/s short", "long", "paired", "error"], [
                [b, *(f"{x:.3g}" for x in (*r["ms"].values(), *r["tflops"].values(), r["error"]))] if "ms" in r else
                [b, *["-"] * 6, r["why"].replace("|", "/")] for b, r in part["backends"].items()])]
        if "fp8" in part and "bf16" in part:
            out += [f"## {name}", table(["dtype", "ms", "error of the loss", "of dx", "of dw"], [
                [k, f"{part[k]['ms']:.3g}", *(f"{part[k][e]:.1e}" for e in ("loss", "dx", "dw"))] for k in ("bf16", "fp8")])]
        if "text" in part:
            out += [f"## {name}", part["text"] if re.search(r"\| ?---", part["text"]) else f"```\n{part['text']}\n```"]
    return "\n\n".join(filter(None, out)) + "\n"


def config(flags: list[str]) -> Config:
    _, changes = parse_config(flags)
    return Config.for_track(changes.pop("track"), **changes)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the results (bench/results)")
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=list(LIMITS), help="these parts")
    parser.add_argument("--cpu", action="store_true", help="reduced size, without a GPU")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for everything ({BUDGET})")
    args, flags = parser.parse_known_args(argv)
    if not torch.cuda.is_available() and not args.cpu:
        print("No GPU found: the same at reduced size on track shakespeare, which tries this script only.")
        args.cpu = True
    flags = [f"--track={'shakespeare' if args.cpu else 'small'}", "--max_epochs=1000", *flags]
    with tempfile.TemporaryDirectory() as scratch:
        measure(args, flags, Path(scratch))
    return 0


def measure(args, flags: list[str], scratch: Path) -> None:
    begin, session, cfg = time.monotonic(), Session(args, flags, scratch), config(flags)
    name = "CPU" if args.cpu else torch.cuda.get_device_name()
    commit, changes = (subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip() for command in
                       (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]))
    session.result |= dict(flags=flags, machine=dict(
        device=name, cpu=args.cpu, date=time.strftime("%Y-%m-%d"), torch=torch.__version__, python=sys.version.split()[0],
        commit=(commit or "unknown") + " with changes" * bool(changes)))
    slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else args.out / f"{time.strftime('%Y-%m-%d')}_{slug}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        find_shards(cfg.train_files, cfg)
    except ShardError:
        synthetic_shards(cfg, scratch, 2 * 10**6 if args.cpu else 100 * 10**6)
        session.env["DATA_PATH"] = str(scratch)
    for part, function in session.parts().items():
        if part not in args.only:
            continue
        start, left = time.monotonic(), args.budget - (time.monotonic() - begin)
        try:
            if left < 5:
                raise Failed("not begun: no time left")
            found = function(min(LIMITS[part], left))
        except (Failed, OSError, ValueError, LookupError, StopIteration) as e:
            found = dict(why=str(e) if isinstance(e, Failed) else f"{type(e).__name__}: {e}")
        session.result["parts"][part] = found | dict(took=time.monotonic() - start)
        print(f"{part}: {found.get('why', 'done')} ({time.monotonic() - start:.0f} s)", flush=True)
        (folder / "gpu.json").write_text(json.dumps(session.result, indent=1) + "\n")
        (folder / "gpu.md").write_text(page(session.result), encoding="utf-8")
    print(f"{folder / 'gpu.md'} after {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
