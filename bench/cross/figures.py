"""The figures of a traced run: the file that holds them, and the page that says them.

Imports neither torch nor Triton.
"""
import json
from pathlib import Path

from bench.cross.costs import Launch, by_part, costliest
from bench.page import grid
from data.files import written_whole
from tools.gpus import GPUS

ABOUT = "ranks", "attention", "fp8", "torch", "triton", "flags"
COSTS = "floor_ms", "ms", "gb", "launches"


def write(result: dict, path: Path) -> None:
    """Write PATH.json, a launch a line, and PATH.md, which is made of it."""
    entries = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items()]
    text = "{" + ",\n".join(entries).replace("], [", "],\n[") + "}\n"
    with written_whole(path.with_name(f"{path.name}.json"), "w") as file:
        file.write(text)
    with written_whole(path.with_name(f"{path.name}.md"), "w") as file:
        file.write(page(json.loads(text)))


def launches(result: dict) -> list[list[Launch]]:
    """Return what the mean step of each stage launches."""
    return [[Launch(*row) for row in rows] for rows in result.get("launches", ())]


def page(result: dict) -> str:
    """Return the figures in Markdown."""
    about = ", ".join(f"{key} {result[key]}" for key in ABOUT)
    out = [f"# A run on {result['gpu']}, as far as it can be known without one", about]
    out += seen(result)
    if "passes" in result:
        out += compiled(result)
    for stage, rows in enumerate(launches(result)):
        out.append(f"## Stage {stage}: the least time of a step")
        out += costs(rows, result["gpu"])
    if "code" in result:
        out += machine_code(result["code"])
    return "\n\n".join(out) + "\n"


def seen(result: dict) -> list[str]:
    """Return the paragraphs about graphs, steps, waits and memory."""
    graphs = []
    for phase, found in result["graphs"].items():
        names = ", ".join(f"{n} {name}" for name, n in found.items())
        graphs.append([phase, sum(found.values()), names])

    kinds = "with Adam", "without Adam", "resumed: with Adam", "resumed: without Adam"
    steps = []
    for stage, found in result["steps"].items():
        steps.append([stage, *(found.get(kind, 0) for kind in kinds)])
    resumed = ", ".join(map(str, result["saved"])) or "none"

    waits = []
    for when, found in result["waits"].items():
        waits += [[when, where, n] for where, n in found.items()]

    peaks = []
    for phase, (gib, where) in result["peak_gib"].items():
        peaks.append([phase, f"{gib:.2f}", where])

    return [
        grid(["graphs made", "number", "of"], graphs),
        grid(["steps of stage", *kinds], steps),
        f"Resumed from steps {resumed}. {result['crowded']} sequences had more documents than entries for "
        "them.",
        grid(["the host waits", "for", "times"], waits),
        grid(["fullest moment", "GiB", "at"], peaks),
    ]


def compiled(result: dict) -> list[str]:
    """Return the paragraphs about the warm-up and the memory of each graph of the model."""
    seconds = [[what, f"{s:.1f}"] for what, s in result["warm_up_s"].items()]
    passes = []
    for step, tokens, kept, more in result["passes"]:
        sizes = [f"{size / 2**30:.2f}" for size in (kept, more)]
        passes.append([step, f"{tokens:,}", *sizes])
    header = ["from step", "tokens of a sequence", "GiB kept for backward", "GiB more at the worst moment"]
    return [
        grid(["warm-up, on one core of the machine that traced", "CPU seconds"], seconds),
        grid(header, passes),
    ]


def costs(rows: list[Launch], gpu: str) -> list[str]:
    """Return two tables: a step by part, and its ten costliest kernels."""
    parts = by_part(rows, GPUS[gpu])
    total = {key: sum(row[key] for row in parts.values()) for key in COSTS}
    table = []
    for part, row in [*parts.items(), ("all", total)]:
        table.append([part, *(f"{row[key]:.2f}" for key in COSTS)])

    top = []
    for names, ms in costliest(rows, GPUS[gpu]).most_common(10):
        top.append([f"{ms:.2f}", *names])
    return [
        grid(["part", "floor ms, data sheet", "ms, achieved rates", "GB", "launches"], table),
        grid(["ms", "part", "graph", "operations"], top),
    ]


def machine_code(code: dict) -> list[str]:
    """Return the paragraphs about registers, shared memory and spills."""
    return [
        "## Machine code",
        f"{code['kernels']} kernels in {code['forms']} forms, of which inductor takes the fastest; "
        f"{code['failed']} kernels fail, {code['spilling']} forms spill, {code['stack']} bytes at most; at "
        f"most {code['registers']} registers a thread and {code['shared']} bytes of shared memory a block",
        grid(["kernel", "what", "times"], code["bad"]),
    ]
