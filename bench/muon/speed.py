"""What a step costs: seconds on the device there is; FLOPs, bytes sent and memory on the CPU; digits."""
import ctypes
import gc
import math
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.muon.peers import Subject
from bench.muon.processes import ChildFailed, NotPosed, Refused, Traffic, first_line, isolated, ranks
from bench.muon.questions import ADJUST_LR, GPT2_BLOCK, mapped, update, with_spectrum
from engine.self_test import synchronize

WORLDS = 1, 2, 3, 4, 8
PATIENCE_S = 10
SHARED = {  # row -> (subject, settings, bytes that every element costs on the way)
    "muon.py": ("muon.py", dict(ns_dtype=torch.bfloat16), 2),
    "muon.py, sync_grads": ("muon.py", dict(ns_dtype=torch.bfloat16, sync_grads=True), 6),
    "muon.py, replicate_state": ("muon.py", dict(ns_dtype=torch.bfloat16, replicate_state=True), 2),
    **{name: (name, {}, None) for name in ("dion", "muon-optimizer", "optimuon", "torch.optim.Muon")},
}
Variants = dict[str, tuple[Subject, dict]]  # name in the tables -> (subject, settings)


def shape_sets(blocks: int) -> dict[str, list[tuple]]:
    """Return the shapes of each column of step times; the other sets shrink as GPT-2's 12 blocks do."""
    def part(count: int) -> int:
        return max(1, count * blocks // 12)
    return {
        f"GPT-2 124M, {blocks} of 12 blocks": GPT2_BLOCK * blocks,
        f"{part(48)} of 256 x 256": [(256, 256)] * part(48),
        f"{part(8)} of 1024 x 4096": [(1024, 4096)] * part(8),
        f"a bank of {part(64)} of 512 x 1024": [(part(64), 512, 1024)],
        "one 1000 x 1536": [(1000, 1536)],
    }


def variants(subjects: dict[str, Subject]) -> Variants:
    """Return ours in the dtypes people choose, with the coefficients of most others, and the others."""
    found = {}
    for name, S in subjects.items():
        if name == "muon.py":
            jordan = dict(ns_coefficients="jordan")
            found |= {
                name: (S, jordan),
                f"{name}, bf16": (S, jordan | dict(ns_dtype=torch.bfloat16)),
                f"{name}, fp32": (S, jordan | dict(ns_dtype=torch.float32)),
                f"{name}, deterministic": (S, jordan | dict(deterministic=True)),
            }
        else:
            found[name] = (S, {})
    return found


def problem(S: Subject, shapes: list[tuple], settings: dict, device=torch.device("cpu")):
    """Return (optimizer, a function that gives every parameter its gradient again: some take them away)."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    grads = [torch.randn(shape, device=device) for shape in shapes]

    def feed():
        for p, g in zip(params, grads):
            p.grad = g
    feed()
    return S(params, **settings), feed


# ----------------------------------------------------------------------------------------------------
# Time


def seconds_of(run, device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begin


def times(entries: Variants, label: str, shapes: list[tuple], device, reps: int) -> list:
    """Return a row per subject; they take turns. The first two steps, which may compile, are not timed,
    unless the first takes longer than PATIENCE_S: then it is the only one, and the last of the subject."""
    rows = []
    running = []
    for name, (S, settings) in list(entries.items()):
        row = dict(subject=name, shapes=label, seconds=[])
        rows.append(row)
        try:
            optimizer, feed = problem(S, shapes, settings, device)
            first = seconds_of(optimizer.step, device)
            if first > PATIENCE_S:
                row |= dict(seconds=[first], why=f"the first step took {first:.0f} s; no more were tried")
                del entries[name]
                continue
            feed()
            optimizer.step()
            running.append((row, optimizer, feed))
        except Exception as error:  # whatever a foreign optimizer raises on these shapes
            row["why"] = first_line(error)
    for _ in range(reps):
        for row, optimizer, feed in running:
            feed()
            row["seconds"].append(seconds_of(optimizer.step, device))
    return rows


# ----------------------------------------------------------------------------------------------------
# Work, traffic and memory


def resident(key: str = "VmRSS") -> int:
    """Return the bytes of this process in memory, as Linux counts them; VmHWM: at most, since a reset."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


def resident_peak(run) -> int:
    """Return the bytes by which run() raises the memory of this process at most."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the mark
    except OSError:
        raise NotPosed("the system keeps no high-water mark that can be reset") from None
    before = resident()
    run()
    return resident("VmHWM") - before


def costs(_, S: Subject, settings: dict, shapes: list[tuple], bucket_mb: float = 16) -> dict:
    """Return FLOPs of products and bytes sent in one step on this rank, and bytes of memory per element of
    the weights: `kept` after a step beside weights and gradients, `peak` during a step on top of that."""
    if S.offers("bucket_mb"):
        settings = dict(bucket_mb=bucket_mb) | settings
    torch.compiler.set_stance("force_eager")
    ctypes.CDLL(None).mallopt(-3, 65536)  # glibc: freed blocks of 64 KiB and more go back to the system
    problem(S, shapes, settings)[0].step()  # brings the libraries' code and kernels into memory
    gc.collect()
    start = resident()
    optimizer, feed = problem(S, shapes, settings)
    optimizer.step()
    gc.collect()
    elements = sum(math.prod(shape) for shape in shapes)
    kept = resident() - start - 2 * 4 * elements
    feed()
    peak = resident_peak(optimizer.step)
    feed()
    with Traffic() as wire, FlopCounterMode(display=False, custom_mapping=ONEDNN_FLOPS) as counter:
        optimizer.step()
    return dict(flops=counter.get_total_flops(), sent=wire.sent, kept=kept / elements, peak=peak / elements)


def onednn_flops(x, w, *_, **__) -> int:
    """Count oneDNN's product, which torch's own counter does not know: shapes (..., k) and (n, k)."""
    return 2 * math.prod(x) * w[0]


ONEDNN_FLOPS = {}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    ONEDNN_FLOPS[torch.ops.mkldnn._linear_pointwise] = onednn_flops


def worlds(subjects: dict[str, Subject], blocks: int, scale: int, limit_s: float, world_sizes=WORLDS) -> list:
    """Return a row per subject and number of gloo ranks; sides are divided by `scale`, figures for full size.
    Balance: the work of one process, divided by the ranks and by what the busiest rank does."""
    shapes = [(m // scale, n // scale) for m, n in GPT2_BLOCK * blocks]
    elements = sum(m * n for m, n in GPT2_BLOCK * blocks)
    rows = []
    for label, (name, settings, per_element) in SHARED.items():
        alone = None
        for W in world_sizes if name in subjects else ():
            row = dict(subject=label, world=W)
            rows.append(row)
            try:
                found = isolated(limit_s, ranks, W, costs, subjects[name], settings, shapes, 16 / scale**2)
            except (ChildFailed, Refused) as error:
                row["why"] = str(error)
                continue
            row |= {key: max(rank[key] for rank in found) for key in found[0]}
            row["flops"] *= scale**3
            row["sent"] *= scale**2
            alone = alone or row["flops"]
            row["balance"] = alone / W / row["flops"]
            if per_element:  # a ring, through which every element passes once
                row["model"] = (W - 1) / W * elements * per_element
    return rows


# ----------------------------------------------------------------------------------------------------
# Digits


def accuracy(S: Subject, settings: dict, m: int = 192, n: int = 576) -> dict:
    """Compare one step on a matrix with singular values from 1 to 0.01 with fp64."""
    torch.compiler.set_stance("force_eager")
    coefficients = settings.get("ns_coefficients", S.coefficients)
    values = torch.logspace(0, -2, m)
    U, V, G = with_spectrum(m, n, values)
    scale = ADJUST_LR[S.adjust_lr_fn](m, n)
    O = update(S, G.float(), **settings)[0].double() / scale
    found = torch.linalg.svdvals(O)
    exact = mapped(values, coefficients)
    by_size = {}
    for exponent in (-100, -33, 33, 100):
        other = update(S, G.float() * 2.0**exponent, **settings)[0].double() / scale
        by_size[exponent] = ((other - O).norm() / O.norm()).nan_to_num(math.inf).item()
    polar = (O - U @ V).norm() / m**0.5
    error = (O - U @ exact.diag() @ V).norm() / exact.norm()
    return dict(coefficients=coefficients, low=found.min().item(), high=found.max().item(), by_size=by_size,
                polar=polar.item(), error=error.item())
