"""Muon side by side: time, work, traffic, memory, accuracy and behaviour of muon.py and of others.

    python -m bench.muon                           everything, with a twelfth of each set of shapes
    python -m bench.muon --only=times --blocks=12  step times of all of GPT-2 124M's hidden matrices
    python -m bench.muon --peers=FOLDER --page     everything, everybody, into bench/results and bench/MUON.md

Subjects take turns (A B C A B C ...); what is missing is named and skipped: bench/requirements.txt says how
to install it. Prints Markdown. Step times are taken on the device there is, all else in forked processes on
the CPU, which needs Linux.
"""
import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.muon import speed
from bench.muon.peers import SUBJECTS, load_all
from bench.muon.processes import ChildFailed, NotPosed, Refused, isolated
from bench.muon.questions import GPT2_BLOCK, QUESTIONS, judge
from bench.muon.tables import tables
from bench.page import MARKS, write_page
from data.errors import run_program
from tools.children import run_limited
from tools.machine import usable_cores

PARTS = "questions", "accuracy", "costs", "worlds", "times", "hidden"
PAGE = Path("bench/MUON.md")
AVX512_ONLY = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}  # hides a processor's bf16 units from torch's products


def processor() -> str:
    """Return name and vector units of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
        units = [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in fields["flags"].split()]
        return f"{fields['model name']} (family {fields['cpu family']}, {', '.join(units) or 'no AVX-512'})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def per_variant(subjects, limit_s: float, function, *more):
    """Yield a row of function(subject, settings, ...) for each variant, or why there is none."""
    for name, (S, settings) in speed.variants(subjects).items():
        try:
            yield dict(subject=name) | isolated(limit_s, function, S, settings, *more)
        except (ChildFailed, NotPosed, Refused) as error:
            yield dict(subject=name, why=str(error))


def ask(subjects, numbers, limit_s: float):
    for name, S in subjects.items():
        say(f"  {name}")
        for key in numbers:
            outcome, why = judge(S, key, limit_s)
            yield dict(subject=name, number=key, outcome=outcome, why=why)


def time_steps(subjects, args):
    entries = speed.variants(subjects)
    for label, shapes in speed.shape_sets(args.blocks).items():
        say(f"  {label}")
        yield from speed.times(entries, label, shapes, torch.device(args.device), args.reps, args.patience_s)


def times_without_bf16_units(args) -> list[dict]:
    """Time the steps of ours and of torch's in a process that reads the variable when it starts."""
    subjects = [name for name in args.subjects if name in ("muon.py", "torch.optim.Muon")]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.muon", "--only=times", f"--json={folder}/times.json"]
        command += [f"--subjects={','.join(subjects)}", f"--reps={args.reps}"]
        run = run_limited(command, 600, env=os.environ | AVX512_ONLY)
        if run.returncode != 0:
            return [dict(subject="all", shapes="all", seconds=[], why=run.stderr[-160:])]
        return json.loads(Path(folder, "times.json").read_text())["times"]


def measure(args) -> dict:
    cuda = args.device.startswith("cuda")
    threads = usable_cores()
    subjects, missing = load_all(args.subjects)
    result = dict(
        machine=dict(device=processor(), torch=torch.__version__, python=platform.python_version(),
                     date=time.strftime("%Y-%m-%d"), threads=threads, reps=args.reps),
        versions={name: subject.version for name, subject in subjects.items()}, missing=missing)
    measures = {
        "questions": lambda: ask(subjects, args.questions, args.limit_s),
        "accuracy": lambda: per_variant(subjects, args.limit_s, speed.accuracy),
        "costs": lambda: per_variant(subjects, args.limit_s, lambda *job: speed.costs(0, *job), GPT2_BLOCK),
        "worlds": lambda: speed.worlds(subjects, 12, 4, args.limit_s),
        "times": lambda: time_steps(subjects, args),
        "hidden": lambda: times_without_bf16_units(args),
    }
    for part in PARTS:  # times come after all that forks, which CUDA or a pool of threads would not survive
        if part in args.only:
            say(part)
            torch.set_num_threads(threads if part == "times" else 1)
            result[part] = list(measures[part]())
    if cuda:
        result["machine"]["device"] = f"{torch.cuda.get_device_name(args.device)}, {processor()}"
    return json.loads(json.dumps(result))  # as it will be read: keys are texts


def choice(known):
    """Return a parser of names that are separated by commas."""
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, found {unknown[0]}")
        return names
    return parse


def publish(result: dict, page: Path, root: Path = Path("bench/results")) -> None:
    """Write the results under their date, and their tables into the page in place of those it has."""
    machine = result["machine"]
    device = "cpu" if machine["device"] == processor() else "gpu"
    source = root / f"{machine['date']}_muon_{device}" / "muon.json"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(json.dumps(result, indent=1) + "\n")
    text = page.read_text(encoding="utf-8")
    text = re.sub(re.escape(MARKS[0]) + r"\S+ -->", f"{MARKS[0]}{source.as_posix()} -->", text)
    page.write_text(text, encoding="utf-8")
    write_page(page, source.as_posix(), tables(result))


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.muon", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # Asked so, torch finds a GPU without starting CUDA, and this process can still be forked.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    cuda = torch.cuda.is_available()
    parts = [part for part in PARTS if part != "hidden" or not cuda]
    for name, known, default in (
            ("only", PARTS, parts), ("subjects", SUBJECTS, SUBJECTS), ("questions", QUESTIONS, QUESTIONS)):
        add(f"--{name}", type=choice(known), default=list(default), help=f"of {', '.join(known)}")
    add("--peers", help="folder that other implementations were installed to")
    add("--blocks", type=int, default=12 if cuda else 1, help="of GPT-2's 12; the other sets shrink alike")
    add("--reps", type=int, default=5, help="timed steps per subject")
    add("--limit_s", type=float, default=30, help="seconds after which a forked process counts as hung")
    add("--patience_s", type=float, default=10, help="seconds of a first step above which it is the only one")
    add("--device", default="cuda" if cuda else "cpu")
    add("--json", type=Path, help="write the results")
    add("--page", action="store_true", help=f"write the results under bench/results, tables into {PAGE}")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = arguments(argv)
    if args.peers:
        sys.path.append(args.peers)
    result = measure(args)
    print(tables(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.page:
        publish(result, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:], "bench.muon"))
