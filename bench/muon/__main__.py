"""Muon side by side: time, work, traffic, memory, accuracy and behaviour of muon.py and of others.

    python -m bench.muon run OUT.json [--peers=FOLDER]           everything, a twelfth of each set of shapes
    python -m bench.muon run OUT.json --only times --blocks=12   step times of all of GPT-2 124M's matrices
    python -m bench.muon table OUT.json [--page=bench/MUON.md]   the tables, or their page

Subjects take turns (A B C A B C ...); what is missing is named and skipped: bench/requirements.txt says how
to install it. Step times are of the device there is, all else of forked processes on the CPU (Linux only).
"""
import argparse
import json
import os
import platform
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from bench.measurement import Measurement, read_json
from bench.muon import speed
from bench.muon.peers import SUBJECTS, load_subjects
from bench.muon.processes import ChildFailed, NotPosed, Refused, isolated
from bench.muon.questions import GPT2_BLOCK, QUESTIONS, judge
from bench.muon.markdown import tables
from bench.page import count
from data.errors import run_program
from data.files import written_whole
from data.machine import usable_cores
from tools.children import run_limited

PARTS = "questions", "accuracy", "costs", "worlds", "times", "hidden"
LIMIT_S = 30  # after which a forked process counts as hung
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


def per_variant(subjects, function, *more):
    """Yield a row of function(subject, settings, ...) for each variant, or why there is none."""
    for name, (S, settings) in speed.variants(subjects).items():
        try:
            yield dict(subject=name) | isolated(LIMIT_S, function, S, settings, *more)
        except (ChildFailed, NotPosed, Refused) as error:
            yield dict(subject=name, why=str(error))


def ask(subjects, numbers):
    for name, S in subjects.items():
        say(f"  {name}")
        for key in numbers:
            outcome, why = judge(S, key, LIMIT_S)
            yield dict(subject=name, number=key, outcome=outcome, why=why)


def time_steps(subjects, options, device: torch.device):
    entries = speed.variants(subjects)
    for label, shapes in speed.shape_sets(options.blocks).items():
        say(f"  {label}")
        yield from speed.times(entries, label, shapes, device, options.reps)


def times_without_bf16_units(options) -> list[dict]:
    """Time the steps of ours and of torch's in a process that reads the variable when it starts."""
    subjects = [name for name in options.subjects if name in ("muon.py", "torch.optim.Muon")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "times.json")
        command = [sys.executable, "-m", "bench.muon", "run", str(path), "--only", "times",
                   f"--reps={options.reps}", "--subjects", *subjects]
        child = run_limited(command, 600, env=os.environ | AVX512_ONLY)
        if child.returncode != 0:
            return [dict(subject="all", shapes="all", seconds=[], why=child.stderr[-160:])]
        return json.loads(path.read_text())["times"]


def measure(options) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = usable_cores()
    subjects, missing = load_subjects(options.subjects)
    result = dict(
        machine=dict(device=processor(), torch=torch.__version__, python=platform.python_version(),
                     date=time.strftime("%Y-%m-%d"), threads=threads, reps=options.reps),
        versions={name: subject.version for name, subject in subjects.items()}, missing=missing)
    measures = {
        "questions": lambda: ask(subjects, options.questions),
        "accuracy": lambda: per_variant(subjects, speed.accuracy),
        "costs": lambda: per_variant(subjects, lambda *job: speed.costs(0, *job), GPT2_BLOCK),
        "worlds": lambda: speed.worlds(subjects, 12, 4, LIMIT_S),
        "times": lambda: time_steps(subjects, options, device),
        "hidden": lambda: times_without_bf16_units(options),
    }
    for part in PARTS:  # times come after all that forks, which CUDA or a pool of threads would not survive
        if part in options.only:
            say(part)
            torch.set_num_threads(threads if part == "times" else 1)
            result[part] = list(measures[part]())
    if device.type == "cuda":
        result["machine"]["device"] = f"{torch.cuda.get_device_name()}, {processor()}"
    return json.loads(json.dumps(result))  # as it will be read: keys are texts


def run(options) -> None:
    if options.peers:
        sys.path.append(options.peers)
    result = measure(options)
    with written_whole(options.out, "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    print(tables(result))


def add_options(parser: argparse.ArgumentParser) -> None:
    # Asked so, torch finds a GPU without starting CUDA, and this process can still be forked.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    cuda = torch.cuda.is_available()
    parts = [part for part in PARTS if part != "hidden" or not cuda]
    for name, known, default in (
            ("only", PARTS, parts), ("subjects", SUBJECTS, SUBJECTS), ("questions", QUESTIONS, QUESTIONS)):
        parser.add_argument(f"--{name}", nargs="+", choices=known, default=[*default], metavar="NAME",
                            help=f"some of {', '.join(known)}")
    parser.add_argument("--peers", help="folder into which other implementations were installed")
    parser.add_argument("--blocks", type=count, default=12 if cuda else 1,
                        help="of GPT-2's 12; the other sets shrink alike")
    parser.add_argument("--reps", type=count, default=5, help="timed steps per subject")


MEASUREMENT = Measurement("muon", "", __doc__, "OUT.json", {"run": run}, partial(read_json, tables=tables),
                          tables, add_options=add_options)

if __name__ == "__main__":
    sys.exit(run_program(MEASUREMENT.main, sys.argv[1:], "bench.muon"))
