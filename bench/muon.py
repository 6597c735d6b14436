"""Muon side by side: step time, work, traffic, memory, accuracy and behaviour of muon.py and of other implementations.

    python -m bench.muon                      a few minutes on two CPU cores: a twelfth of each set of shapes
    python -m bench.muon --blocks=12          all of GPT-2 124M's hidden matrices, and the other sets in full
    python -m bench.muon --only=times         parts: times, limits, work, worlds, plans, accuracy, classes, checks, shares
    python -m bench.muon --peers=FOLDER       other implementations, installed as bench/requirements.txt says

Subjects take turns (A B C A B C ...); what is missing is named and skipped. Prints Markdown; see --help for files. Step
times are taken on the device there is, all else in forked processes on the CPU, so the system has to be Linux.
"""
import argparse
import ctypes
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench.muon_peers import (SUBJECTS, WIRE, Failed, NotPosed, Refused, Subject, first_line, isolated, load_all, ranks, resident,
                              resident_peak, seconds_of, synchronize)
from bench.muon_checks import CHECKS, judge, singular_value_map, update, with_spectrum
from bench.page import write_page
import muon  # after muon_peers, which counts what goes through torch.distributed

ON_DEVICE = "shares", "classes", "limits", "times"
PARTS = "checks", "accuracy", "work", "worlds", "plans", *ON_DEVICE  # first those that fork
BLOCK = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]  # GPT-2 124M: c_attn, attn_proj, fc, mlp_proj; 12 blocks
WORLDS = 2, 3, 4, 8


def shape_sets(blocks: int) -> dict[str, list[tuple]]:
    part = lambda count: max(1, count * blocks // 12)
    return {f"GPT-2 124M, {blocks} of 12 blocks": BLOCK * blocks, f"{part(48)} of 256 x 256": [(256, 256)] * part(48),
            f"{part(8)} of 1024 x 4096": [(1024, 4096)] * part(8), f"a bank of {part(64)} of 512 x 1024": [(part(64), 512, 1024)],
            "one 1000 x 1536": [(1000, 1536)]}


def scaled(shapes: list[tuple], scale: int) -> list[tuple]:
    return [(m // scale, n // scale) for m, n in shapes]


def settings_of(device: torch.device) -> dict[str, dict]:
    """Our variants, by their name in the table."""
    exact = torch.float32 if device.type == "cpu" else torch.float16
    variants = {"muon.py": {}, "muon.py, bf16": dict(ns_dtype=torch.bfloat16, ns_form="standard"),
                f"muon.py, {str(exact)[6:]}, standard": dict(ns_dtype=exact, ns_form="standard"),
                f"muon.py, {str(exact)[6:]}, Gram": dict(ns_dtype=exact, ns_form="gram"),
                "muon.py, deterministic": dict(deterministic=True)}
    if device.type == "cuda":
        variants["muon.py, no symmetric kernel"] = dict(symmetric=muon.symmetric_product)
    return {name: dict(coefficients="jordan", **settings) for name, settings in variants.items()}


def candidates(subjects: dict[str, Subject], device: torch.device) -> dict[str, tuple[Subject, dict]]:
    """name in the tables -> (subject, settings): ours in variants, the others as they are."""
    return {**{name: (subjects["muon.py"], s) for name, s in settings_of(device).items() if "muon.py" in subjects},
            **{name: (subject, {}) for name, subject in subjects.items() if name != "muon.py"}}


def problem(S: Subject, shapes: list[tuple], device: torch.device = torch.device("cpu"), **settings):
    """(optimizer, a function that gives every parameter its gradient again: some optimizers take or change them)."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    grads = [torch.randn(shape, device=device) for shape in shapes]

    def feed():
        for p, g in zip(params, grads):
            p.grad = g
    feed()
    return S(params, **settings), feed


class Products(TorchDispatchMode):
    """Counts matrix products that are launched."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm", "_linear_pointwise")
        return func(*args, **(kwargs or {}))


def count_flops() -> FlopCounterMode:
    """Also those of oneDNN's product, which torch's own counter does not know."""
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return FlopCounterMode(display=False, custom_mapping={} if onednn is None else {
        onednn: lambda x, w, *_, **__: 2 * math.prod(x) * w[0]})


# ----------------------------------------------------------------------------------------------------------------------
# One process, in a fork: work and memory

def release_at_once() -> None:
    """Blocks of 64 KiB or more go back to the system when freed, so that resident memory is memory in use (glibc)."""
    ctypes.CDLL(None).mallopt(-3, 65536)


def kept_and_peak(S: Subject, settings: dict, shapes: list[tuple], scale: int) -> tuple:
    """(optimizer, its feed, bytes that it keeps after a step beside weights and gradients, bytes that a step takes on top)."""
    if S.offers("bucket_mb"):
        settings = dict(bucket_mb=16 / scale**2) | settings  # as many buckets as at full size
    torch.compiler.set_stance("force_eager")
    release_at_once()
    problem(S, shapes, **settings)[0].step()  # brings the libraries' code and kernels for these shapes into memory
    gc.collect()
    start = resident()
    optimizer, feed = problem(S, shapes, **settings)
    optimizer.step()
    gc.collect()
    kept = resident() - start - 2 * 4 * sum(m * n for m, n in shapes)
    feed()
    WIRE.reset()
    return optimizer, feed, kept, resident_peak(optimizer.step)


def work_of(S: Subject, settings: dict, scale: int) -> dict:
    """FLOPs of matrix products and their number for one GPT-2 block; bytes per element that stay and that come and go."""
    scale = max(1, scale // (4 if S.name == "muon.py" else 2))  # what ours saves on a CPU depends on the size
    shapes = scaled(BLOCK, scale)
    optimizer, feed, kept, peak = kept_and_peak(S, settings, shapes, scale)
    feed()
    with count_flops() as flops, Products() as products:
        optimizer.step()
    elements = sum(m * n for m, n in shapes)
    return dict(gflop=flops.get_total_flops() * scale**3 / 1e9, products=products.count, state=kept / elements,
                peak=peak / elements)


# ----------------------------------------------------------------------------------------------------------------------
# Several processes: balance and traffic

def rank_work(rank: int, S: Subject, settings: dict, blocks: int, scale: int) -> dict:
    shapes = scaled(BLOCK * blocks, scale)
    optimizer, feed, kept, peak = kept_and_peak(S, settings, shapes, scale)
    sent, elements = WIRE.sent, sum(m * n for m, n in shapes)
    feed()
    with count_flops() as flops:
        optimizer.step()
    return dict(flops=flops.get_total_flops() * scale**3, sent=sent * scale**2, state=kept / elements, peak=peak / elements)


def model_bytes(W: int, elements: int, per_element: int) -> float:
    """What a ring sends per rank and step when every element passes once."""
    return (W - 1) / W * elements * per_element


def worlds(subjects: dict[str, Subject], blocks: int, scale: int, seconds: float, world_sizes=WORLDS) -> list[dict]:
    """Real gloo processes. Balance is the work of one process, divided by the ranks and by what the busiest rank does."""
    bf16, N, rows = dict(ns_dtype=torch.bfloat16), sum(m * n for m, n in BLOCK * blocks), []
    entries = [("muon.py, bf16", "muon.py", bf16, 2), ("muon.py, bf16, sync_grads", "muon.py", bf16 | dict(sync_grads=True), 6),
               *((name, name, {}, None) for name in ("dion", "muon-optimizer", "optimuon", "torch.optim.Muon"))]
    for label, name, settings, per_element in entries:
        alone = None
        for W in (1, *world_sizes) if name in subjects else ():
            rows.append(row := dict(subject=label, world=W))
            try:
                found = isolated(seconds, ranks, W, rank_work, subjects[name], settings, blocks, scale)
            except (Failed, Refused) as error:
                row["why"] = str(error)
                continue
            row |= {key: max(f[key] for f in found) for key in found[0]}
            alone = alone or row["flops"]
            row |= dict(balance=alone / W / row["flops"], model=per_element and model_bytes(W, N, per_element))
    return rows


def plans(world_sizes=(2, 3, 4, 8, 16, 32)) -> list[dict]:
    """Planned efficiency (mean load over the busiest rank's) for all of GPT-2 124M."""
    never, long = lambda m, n: False, lambda m, n: max(m, n) >= 2 * min(m, n)
    rows = []
    for label, block, gram in (("standard form", BLOCK, never), ("Gram form where l >= 2 s", BLOCK, long),
                               ("standard form, QKV split in three", [(768, 768)] * 3 + BLOCK[1:], never)):
        costs, sizes = zip(*((muon.newton_schulz_flops(m, n, 5, gram(m, n)), m * n) for m, n in block * 12))
        made = {W: muon.place_units(costs, sizes, W, 4_000_000) for W in world_sizes}
        rows.append(dict(label=label, efficiency={W: plan.efficiency for W, plan in made.items()}))
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Accuracy

def accuracy_of(S: Subject, settings: dict, m: int = 192, n: int = 576) -> dict:
    """One step on a matrix with singular values from 1 to 0.01, against fp64."""
    torch.compiler.set_stance("force_eager")
    values = torch.logspace(0, -2, m)
    U, V, G = with_spectrum(m, n, values)
    scale = muon.ADJUST_LR[S.adjust_lr](m, n)
    O = update(S, G.float(), **settings)[0].double() / scale
    found, exact = torch.linalg.svdvals(O), singular_value_map(values, settings.get("coefficients", S.coefficients))
    mapped = (O - U @ exact.diag() @ V).norm() / exact.norm()
    sizes = {}
    for exponent in (-100, -33, 33, 100):
        other = update(S, G.float() * 2.0**exponent, **settings)[0].double() / scale
        sizes[exponent] = ((other - O).norm() / O.norm()).item()
    finite = {k: v if math.isfinite(v) else None for k, v in sizes.items()}
    return dict(coefficients=settings.get("coefficients", S.coefficients), polar=((O - U @ V).norm() / m**0.5).item(),
                low=found.min().item(), high=found.max().item(), map=mapped.item(), sizes=finite)


# ----------------------------------------------------------------------------------------------------------------------
# Time, on the device there is

def launched(run) -> int:
    """Kernels of one call, by torch.profiler; on a CPU nothing is launched."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as p:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in p.events())


def times(entries: dict[str, tuple[Subject, dict]], label: str, shapes: list[tuple], device, reps: int,
          patience: float) -> list[dict]:
    """A row per subject. The first step, which may compile, is not among those timed, unless it takes longer than `patience`
    seconds: then it is the only one, and the subject leaves `entries`."""
    rows, running = [], []
    for name, (S, settings) in list(entries.items()):
        rows.append(row := dict(subject=name, shapes=label, seconds=[]))
        try:
            optimizer, feed = problem(S, shapes, device, **settings)
            row["first"] = seconds_of(optimizer.step, device)
            if row["first"] > patience:
                row |= dict(seconds=[row["first"]], why=f"the first step took {row['first']:.0f} s; no more were tried")
                del entries[name]
                continue
            feed()
            optimizer.step()
            if device.type == "cuda":
                feed()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                optimizer.step()
                row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
                feed()
                row["kernels"] = launched(optimizer.step)
            running.append((row, optimizer, feed))
        except Exception as error:  # whatever a foreign optimizer raises on these shapes
            row["why"] = first_line(error)
    for _ in range(reps):
        for row, optimizer, feed in running:
            feed()
            synchronize(device)
            row["seconds"].append(seconds_of(optimizer.step, device))
    return rows


def classes(device, reps: int, batch: int) -> list[dict]:
    """Achieved FLOP/s of our orthogonalize per kind of matrix, short x long side, by dtype and form."""
    rows = []
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.bfloat16, torch.float16)
    for s, l in ((256, 256), (768, 768), (768, 2304), (768, 3072), (1024, 4096)):
        G = torch.randn(batch, s, l, device=device)
        for dtype in dtypes:
            for form in ("standard", "gram") if dtype != torch.bfloat16 else ("standard",):
                run = lambda: muon.orthogonalize(G, 5, "jordan", dtype, form)
                run()
                seconds = [seconds_of(run, device) for _ in range(reps)]
                rows.append(dict(short=s, long=l, batch=batch, dtype=str(dtype)[6:], form=form, seconds=seconds,
                                 flop=batch * muon.newton_schulz_flops(s, l, 5, form == "gram")))
    return rows


def least_flops(m: int, n: int, gram: bool) -> float:
    """Of five steps, if symmetric products take half; with one restart in the Gram form."""
    s, l = min(m, n), max(m, n)
    standard = 5 * (3 * s * s * l + s**3)
    return min(standard, 6 * s * s * l + 14 * s**3) if gram else standard


def limits(reps: int) -> list[dict]:
    """What a CPU allows: the best rate of a plain product, the least work, and how many times as fast as the standard form in bf16
    at that rate this would be."""
    rows, plain = [], sum(muon.newton_schulz_flops(m, n, 5, False) for m, n in BLOCK)
    for dtype in torch.bfloat16, torch.float32:
        A = torch.randn(2048, 2048).to(dtype)
        run = lambda: muon.product(A, A)
        seconds = min(seconds_of(run, torch.device("cpu")) for _ in range(20 * reps))
        rows.append(dict(dtype=str(dtype)[6:], rate=2 * 2048**3 / seconds, plain=plain,
                         least=sum(least_flops(m, n, dtype == torch.float32) for m, n in BLOCK)))
    return [row | dict(ratio=plain / rows[0]["rate"] / (row["least"] / row["rate"])) for row in rows]


def shares(S: Subject, device, reps: int, blocks: int, world_size: int = 8) -> list[dict]:
    """Simulated: what each of 8 ranks would compute, one after the other on this device, without communication."""
    shapes, rows = BLOCK * blocks, []
    plan = muon.place_units([muon.newton_schulz_flops(m, n, 5, False) for m, n in shapes], [m * n for m, n in shapes],
                           world_size, 4_000_000)
    for rank in range(world_size):
        mine = [shapes[u] for bucket in plan.buckets for u in bucket[rank]]
        if mine:
            optimizer, feed = problem(S, mine, device, coefficients="jordan")
            optimizer.step()
            seconds = [seconds_of(optimizer.step, device) for _ in range(reps)]
            rows.append(dict(rank=rank, matrices=len(mine), seconds=seconds))
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# From results to tables

def spread(seconds: list[float]) -> str:
    ms = [1000 * s for s in seconds]
    return f"{statistics.median(ms):,.1f} ({min(ms):,.1f}-{max(ms):,.1f})" if ms else "-"


def number(x, digits: int = 3) -> str:
    return "-" if x is None else "not finite" if x != x or abs(x) == math.inf else f"{x:.{digits}g}"


def table(header: list, rows: list[list]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [header, ["---"] * len(header), *rows])


def reasons(rows: list[dict], *keys: str) -> str:
    return "\n".join(f"- {', '.join(str(row[key]) for key in keys)}: {row['why']}" for row in rows if row.get("why"))


def summary(result: dict) -> str:
    """A row per subject: times of the first set of shapes, and the gist of the other parts."""
    first = result["times"][0]["shapes"] if result.get("times") else "nothing yet"
    timed = {row["subject"]: row for row in result.get("times", []) if row["shapes"] == first}
    work, exact = ({row["subject"]: row for row in result.get(part, [])} for part in ("work", "accuracy"))
    theirs, rows = timed.get("torch.optim.Muon", {}).get("seconds"), []
    for name in dict.fromkeys([*timed, *work, *(row["subject"] for row in result.get("checks", []))] or exact):
        seconds, w, a = timed.get(name, {}).get("seconds", []), work.get(name, {}), exact.get(name, {})
        verdicts = [row["outcome"] for row in result.get("checks", []) if row["subject"] == name]
        ratio = statistics.median(theirs) / statistics.median(seconds) if theirs and seconds else None
        rows.append([name, spread(seconds), len(seconds), "-" if ratio is None else f"{ratio:.2f}", number(w.get("gflop"), 4),
                     w.get("products", "-"), number(w.get("state")), number(w.get("peak")), number(a.get("map"), 2),
                     f"{verdicts.count('pass')} of {len(verdicts) - verdicts.count('-')}" if verdicts else "-"])
    return f"Step times are of {first}; work and memory of one block; bytes are per element of the weights.\n\n" + table(
        ["implementation", "ms/step, median (min-max)", "n", "speed against torch.optim.Muon", "GFLOP", "matrix products",
         "bytes kept", "bytes more during a step", "distance to the exact result", "checks passed of those posed"], rows)


def targets(result: dict) -> str:
    """What we set out to reach, and whether it was."""
    rows, first = [], result["times"][0]["shapes"] if result.get("times") else None
    medians = {row["subject"]: statistics.median(row["seconds"]) for row in result.get("times", [])
               if row["shapes"] == first and row["seconds"]}
    others = {name: seconds for name, seconds in medians.items() if not name.startswith("muon.py")}
    for name in [name for name in ("muon.py", "muon.py, bf16") if name in medians and "torch.optim.Muon" in others]:
        ratio = others["torch.optim.Muon"] / medians[name]
        rows.append([f"4 times as fast as torch.optim.Muon, {first}: {name}", f"{ratio:.2f} times", ratio >= 4])
        best = min(others, key=others.get)
        rows.append([f"not slower than any other: {name}", f"{others[best] / medians[name]:.2f} times as fast as {best}",
                     others[best] >= medians[name]])
    for row in result.get("plans", []):
        rows.append([f"balance planned for 8 ranks at least 0.97, {row['label']}", f"{row['efficiency']['8']:.3f}",
                     row["efficiency"]["8"] >= 0.97])
    if deviations := [row["sent"] / row["model"] - 1 for row in result.get("worlds", []) if row.get("model")]:
        rows.append(["traffic within 2 % of the model", f"{max(deviations, key=abs):+.2%}", max(map(abs, deviations)) <= 0.02])
    if verdicts := [row["outcome"] for row in result.get("checks", []) if row["subject"] == "muon.py"]:
        rows.append(["passes every check", f"{verdicts.count('pass')} of {len(verdicts)}", set(verdicts) == {"pass"}])
    return table(["target for muon.py", "measured", "reached"], [[*row, "yes" if ok else "**no**"] for *row, ok in rows])


def times_table(rows: list[dict]) -> str:
    sets, subjects = (list(dict.fromkeys(row[key] for row in rows)) for key in ("shapes", "subject"))
    cells = {(row["subject"], row["shapes"]): spread(row["seconds"]) if row["seconds"] else
             "refused" if row["why"].startswith("Refused") else "fails" for row in rows}
    text = table(["ms/step, median (min-max)", *sets], [[s, *(cells.get((s, x), "-") for x in sets)] for s in subjects])
    counted = [row for row in rows if "kernels" in row]
    return "\n\n".join([text, reasons(rows, "subject", "shapes"), *([table(
        ["implementation", "shapes", "kernels launched", "MiB more during a step"],
        [[r["subject"], r["shapes"], r["kernels"], f"{r['peak_mib']:,.0f}"] for r in counted])] if counted else [])])


def worlds_table(rows: list[dict]) -> str:
    def cells(row):
        if "why" in row:
            return ["fails", *["-"] * 6]
        model = row["model"]
        return [f"{row['flops'] / 1e9:,.1f}", f"{row['balance']:.3f}", f"{row['sent'] / 1e6:,.1f}",
                f"{model / 1e6:,.1f}" if model else "-", f"{row['sent'] / model - 1:+.2%}" if model else "-",
                number(row["state"]), number(row["peak"])]
    return table(["implementation", "ranks", "GFLOP of the busiest", "balance", "MB sent per rank", "model", "deviation",
                  "bytes kept", "bytes more during a step"],
                 [[row["subject"], row["world"], *cells(row)] for row in rows]) + "\n\n" + reasons(rows, "subject", "world")


def accuracy_table(rows: list[dict]) -> str:
    exponents = next((list(row["sizes"]) for row in rows if "sizes" in row), [])
    return table(["implementation", "coefficients", "distance to U V^T", "singular values", "distance to the exact result",
                  *(f"gradient times 2^{e}" for e in exponents)], [
        [row["subject"], row["coefficients"], number(row["polar"]), f"{row['low']:.3f}-{row['high']:.3f}", number(row["map"], 2),
         *(number(x, 2) for x in row["sizes"].values())] for row in rows if "why" not in row]) + "\n\n" + reasons(rows, "subject")


def checks_table(rows: list[dict]) -> str:
    subjects, keys = (list(dict.fromkeys(row[key] for row in rows)) for key in ("subject", "check"))
    cells = {(row["check"], row["subject"]): row["outcome"].replace("fail", "**fail**") for row in rows}
    return table(["", "check", *subjects], [[key, CHECKS[key][0], *(cells[key, s] for s in subjects)] for key in keys]
                 ) + "\n\n" + reasons([row for row in rows if row["outcome"] in ("fail", "refused")], "check", "subject")


def plans_table(rows: list[dict]) -> str:
    return table(["cost", *rows[0]["efficiency"]], [
        [row["label"], *(f"{x:.3f}" for x in row["efficiency"].values())] for row in rows])


def limits_table(rows: list[dict]) -> str:
    return table(["dtype", "GFLOP/s of a plain product of 2048 x 2048, best", "GFLOP of the standard form", "least GFLOP",
                  "ms at that rate", "largest possible speed against the standard form in bf16"],
                 [[row["dtype"], f"{row['rate'] / 1e9:,.0f}", f"{row['plain'] / 1e9:.1f}", f"{row['least'] / 1e9:.1f}",
                   f"{row['least'] / row['rate'] * 1e3:.0f}", f"{row['ratio']:.2f}"] for row in rows])


def shares_table(rows: list[dict]) -> str:
    busiest = max(rows, key=lambda row: statistics.median(row["seconds"]))
    return f"The busiest rank: {spread(busiest['seconds'])} ms.\n\n" + table(
        ["rank", "matrices", "ms/step, median (min-max)"],
        [[row["rank"], row["matrices"], spread(row["seconds"])] for row in rows])


def classes_table(rows: list[dict]) -> str:
    return table(["matrices", "dtype", "form", "ms, median (min-max)", "TFLOP/s"], [
        [f"{row['batch']} of {row['short']} x {row['long']}", row["dtype"], row["form"], spread(row["seconds"]),
         number(row["flop"] / statistics.median(row["seconds"]) / 1e12)] for row in rows])


SECTIONS = {  # part -> (heading and explanation, table)
    "times": ("Step time", times_table),
    "limits": ("What the CPU allows\n\nNewton-Schulz of one block, if nothing else took time: in bf16 half of every symmetric "
               "product, in fp32 the Gram form as well.", limits_table),
    "worlds": ("Ranks\n\nReal gloo processes; matrices with shorter sides, figures for full size, all 12 blocks. Balance: work "
               "of one process / ranks / work of the busiest. Model: a ring through which every element passes once.",
               worlds_table),
    "plans": ("Balance planned for GPT-2 124M, by number of ranks", plans_table),
    "shares": ("Shares of 8 ranks, simulated\n\nOne after the other on this device, nothing sent.", shares_table),
    "classes": ("Newton-Schulz by kind of matrix", classes_table),
    "accuracy": ("Accuracy\n\nOne step on a 192 x 576 matrix with singular values from 1 to 0.01, against fp64; relative, in "
                 "the Frobenius norm. Last columns: how much the result changes with the size of the gradient.",
                 accuracy_table),
    "checks": ("Behaviour\n\nrefused: the parameters are turned away when the optimizer is built. -: cannot be asked.",
               checks_table),
}


def tables(result: dict) -> str:
    machine, versions = result["machine"], ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    text = [f"{machine['device']}; torch {machine['torch']}, Python {machine['python']}; {machine['date']}; "
            f"{machine['threads']} threads for step times, one per process elsewhere; n = {machine['reps']} unless given. "
            f"{versions}.", *(f"Missing: {name} ({why})." for name, why in result["missing"].items()),
            targets(result), summary(result)]
    for part, (title, render) in SECTIONS.items():
        if result.get(part):
            text += [f"### {title}", render(result[part]).strip()]
    return "\n\n".join(text) + "\n"


# ----------------------------------------------------------------------------------------------------------------------

def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        field = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
        units = [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in field["flags"].split()]
        name = f"{field['model name']} (family {field['cpu family']}, {', '.join(units) or 'no AVX-512'})"
    except (OSError, KeyError):
        name = platform.processor() or platform.machine()
    hidden = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return f"{name}, matrix units limited to {hidden}" if hidden else name


def measure_without_cuda(args) -> dict:
    """The parts that fork, in a process that sees no GPU: a fork cannot use CUDA once its parent has."""
    parts = [part for part in args.only if part not in ON_DEVICE]
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "bench.muon", "--device=cpu", f"--only={','.join(parts)}", f"--json={file.name}",
                   f"--subjects={','.join(args.subjects)}", f"--checks={','.join(args.checks)}", f"--scale={args.scale}",
                   f"--seconds={args.seconds}", *([f"--peers={args.peers}"] if args.peers else [])]
        if not parts:
            return {}
        subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, stdout=subprocess.DEVNULL, check=True)
        return json.load(file)


def measure(args, device: torch.device) -> dict:
    subjects, missing = load_all(args.subjects)
    threads, entries = torch.get_num_threads(), candidates(subjects, device)
    extra = {name: (subjects["muon.py"], settings) for name, settings in (
        ("muon.py, default coefficients", {}), ("muon.py, float16, Gram", dict(
            coefficients="jordan", ns_dtype=torch.float16, ns_form="gram"))) if "muon.py" in subjects}
    result = json.loads(args.load.read_text()) if args.load else {}
    if device.type == "cuda":
        result |= measure_without_cuda(args)
    result |= dict(
        machine=dict(device=f"{torch.cuda.get_device_name(device)}, {processor()}" if device.type == "cuda" else processor(),
                     torch=torch.__version__, python=platform.python_version(), date=time.strftime("%Y-%m-%d"),
                     threads=threads, reps=args.reps, scale=args.scale, blocks=args.blocks),
        versions={name: subject.version for name, subject in subjects.items()}, missing=missing)

    def say(text):
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    def rows_of(entries, function, *more):
        for name, (S, settings) in entries.items():
            try:
                yield dict(subject=name) | isolated(args.seconds, function, S, settings, *more)
            except (Failed, NotPosed, Refused) as error:
                yield dict(subject=name, why=str(error))

    def all_checks():
        for name, S in subjects.items():
            say(f"  {name}")
            for key in args.checks:
                outcome, why = judge(S, key, args.seconds)
                yield dict(subject=name, check=key, outcome=outcome, why=why)

    def all_times():
        for label, shapes in shape_sets(args.blocks).items():
            say(f"  {label}")
            yield from times(entries, label, shapes, device, args.reps, args.patience)
    measures = {
        "checks": all_checks, "work": lambda: rows_of(entries, work_of, args.scale),
        "accuracy": lambda: rows_of(entries | extra, accuracy_of),
        "worlds": lambda: worlds(subjects, 12, args.scale, args.seconds), "plans": plans,
        "shares": lambda: shares(subjects["muon.py"], device, args.reps, args.blocks),
        "classes": lambda: classes(device, args.reps, 1 if device.type == "cpu" else 8), "limits": lambda: limits(args.reps),
        "times": all_times}
    for part in [part for part in PARTS if part in args.only and (device.type == "cpu" or part in ON_DEVICE)]:
        say(part)
        torch.set_num_threads(threads if part in ON_DEVICE else 1)  # a pool of threads survives no fork
        result[part] = list(measures[part]())
    return json.loads(json.dumps(result))  # as it will be read: keys are texts


def choice(known):
    """Parse names that are separated by commas."""
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, found {', '.join(unknown)}")
        return names
    return parse


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.muon", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--only", type=choice(PARTS), help=f"parts of {', '.join(PARTS)}")
    parser.add_argument("--subjects", type=choice(SUBJECTS), default=list(SUBJECTS), help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument("--checks", type=choice(CHECKS), default=list(CHECKS), help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--peers", help="folder that other implementations were installed to")
    parser.add_argument("--blocks", type=int, default=12 if cuda else 1, help="of GPT-2's 12; other sets shrink alike (CPU: 1)")
    parser.add_argument("--reps", type=int, default=5, help="timed steps per subject (5)")
    parser.add_argument("--scale", type=int, default=4, help="divides the sides of matrices where work is counted (4)")
    parser.add_argument("--seconds", type=float, default=60, help="after which a forked process counts as hung (60)")
    parser.add_argument("--patience", type=float, default=60, help="seconds of a first step above which it is the only one (60)")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--json", type=Path, help="write the results")
    parser.add_argument("--markdown", type=Path, help="write the tables")
    parser.add_argument("--load", type=Path, help="start from earlier results: measure what --only names, or just print")
    parser.add_argument("--page", type=Path, help="put the tables into this page")
    args = parser.parse_args(argv)
    sys.path += [args.peers] if args.peers else []
    if args.load and not args.only:
        result = json.loads(args.load.read_text())
    else:
        args.only = args.only or [part for part in PARTS if part != ("limits" if cuda else "shares")]
        result = measure(args, torch.device(args.device))
    print(tables(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(tables(result))
    if args.page:
        write_page(args.page, (args.json or args.load or Path("nothing")).as_posix(), tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
