"""Measure this machine for a minute, or set two measured machines side by side.

bench/host.py does the measuring, with as many ranks as a training run would have, and writes logs/host.json, which every log
written next to it carries in a line `host: {...}`. --compare takes two such files or logs. Training is a mixture of matrix
products, memory traffic, blocks of a network and sums over ranks whose shares nobody knows, so every mixture counts as
equally likely: the expected ratio of times is the mean of the parts' ratios, and the less they agree, the wider its error
bar. To that comes the unrest in the course of a measurement. Disk and clocks are shown, but do not count. Measure a machine
that does nothing else: no probe foresees what other programs will do during a run."""
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from records.errors import RecordError
from records.stats import plain, printable

HELP = "measure this machine, and compare measured machines"
EXAMPLE = "python -m records calibrate --compare bench/results/2026-11-24_host/one.json bench/results/2026-11-24_host/other.json"
ROOT = Path(__file__).resolve().parents[1]
SIZE_LIMIT = 1 << 26  # bytes of a log that are searched
LINE = re.compile(rb"^host: (\{.{1,60000}\})\s*$")
LOAD = 0.5  # other work per core above which a machine counts as busy
DRIFT = 0.03  # change of a part above which it is named


@dataclass(frozen=True)
class Host:
    """What bench/host.py wrote. values: work per second of each part, ten times in the course of the measurement."""
    facts: dict  # device, ranks, threads, torch, compute, load, date, ...
    units: dict[str, str]
    values: dict[str, list[float]]
    sensors: dict[str, list[float]]  # clocks, temperature, power of the worst GPU or of the CPU

    @property
    def training(self) -> list[str]:
        """The parts that training consists of."""
        return [name for name in (f"matmul_{self.facts.get('compute')}", "memory", "block", "all_reduce") if name in self.values]


def parse(text: bytes, path: Path) -> Host:
    try:
        facts = json.loads(text)
        parts = facts.pop("parts")
        units = {str(name): str(part["unit"]) for name, part in parts.items()}
        values = {str(name): [float(value) for value in part["values"]] for name, part in parts.items()}
        if not all(len(v) > 1 and all(0 < value < math.inf for value in v) for v in values.values()) or not values:
            raise ValueError
        sensors = {str(name): [float(value) for value in read] for name, read in facts.pop("sensors", {}).items()}
        return Host(facts, units, values, sensors)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise RecordError(f"{path}: expected a measurement by bench/host.py, found something else; make one with "
                          "python -m records calibrate") from None


def read(path: Path) -> Host:
    """The measurement in a file that bench/host.py wrote or in a log."""
    try:
        with open(path, "rb") as file:
            if file.peek(1)[:1] == b"{":
                return parse(file.read(1 << 16), path)
            while file.tell() < SIZE_LIMIT and (line := file.readline(1 << 16)):
                if match := LINE.match(line):
                    return parse(match[1], path)
    except OSError as e:
        raise RecordError(f"{path}: expected a measurement or a log, found: {e.strerror}; check the path") from None
    raise RecordError(f"{path}: expected a log with a line host: {{...}}, found none; run python -m records calibrate before "
                      "training, or name a host.json")


def time_ratio(a: Host, b: Host) -> tuple[dict, float, float]:
    """(interval of time on A / time on B for each part, expected ratio, its 95 % error as a factor), all on logarithms.

    Shares w of k parts that are uniform over all mixtures give the sum of w x the mean of x and the variance of x over k + 1.
    The noise is that of single values rather than of their mean, and moves all parts together: a run falls into another
    stretch of time than the measurement, and how much stretches differ is what consecutive values show."""
    import numpy as np

    from records import statistics
    if a.facts.get("probe") != b.facts.get("probe"):
        raise RecordError("expected measurements by one version of bench/host.py, found two; measure again with the same one")
    ratios = {name: statistics.ratio_interval(b.values[name], a.values[name]) for name in a.values if name in b.values}
    used = [name for name in a.training if name in b.training]
    if not used or any(ratios[name].why for name in used):
        raise RecordError("expected measurements with training parts in common and a spread, found none or one; measure both "
                          "machines with the same bench/host.py")
    logs = [math.log(ratios[name].estimate) for name in used]
    noises = [(np.var(np.log(a.values[name]), ddof=1) + np.var(np.log(b.values[name]), ddof=1)) ** 0.5 for name in used]
    variance = np.mean(noises) ** 2 + (np.var(logs) + np.var(noises)) / (len(used) + 1)
    return ratios, math.exp(np.mean(logs)), math.exp(1.96 * variance ** 0.5)


def drift(values: list[float]) -> float:
    """Mean of the last third over that of the first, less 1."""
    third = max(1, len(values) // 3)
    return sum(values[-third:]) / sum(values[:third]) - 1


def warnings(host: Host):
    cores, load = host.facts.get("cores"), host.facts.get("load")
    if isinstance(cores, int) and isinstance(load, (int, float)) and load > LOAD * cores:
        yield f"The machine was busy before the measurement (load {load} on {cores} cores): it says little about other times."
    drifts = {name: drift(host.values[name]) for name in host.training}
    if drifted := [f"{name} {change:+.1%}" for name, change in drifts.items() if abs(change) > DRIFT]:
        yield f"Drift in the course of the measurement (heat, other work, a clock that moves): {', '.join(drifted)}."


def describe(host: Host) -> str:
    facts = [f"{key} {host.facts.get(key)}" for key in ("ranks", "threads", "torch", "compute", "date")]
    sensors = [f"{name} {min(read):g} to {max(read):g}" for name, read in host.sensors.items() if read]
    return ", ".join(text[:80] for text in (str(host.facts.get("device")), *facts, *sensors))


def default_ranks() -> int:
    """One for each GPU, else two on a CPU, as ./run.sh does."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout.count("GPU ")
    except (OSError, subprocess.TimeoutExpired):
        listed = 0
    return listed or min(2, os.cpu_count() or 1)


def measure(seconds: float, ranks: int, out: Path) -> Host:
    """Run the probe, which imports torch, as a program of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "bench" / "host.py"), f"--seconds={seconds}", f"--out={out}"]
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    process = subprocess.Popen(command, env={"OMP_NUM_THREADS": threads, **os.environ})
    try:
        code = process.wait()
    finally:
        process.wait()  # Ctrl-C reaches torchrun, too, which needs a moment to end its ranks
    if code:
        raise RecordError(f"expected bench/host.py to measure with {ranks} ranks, found that it ended with exit code {code}; "
                          "mend what it complains about")
    return read(out)


def show(host: Host):
    """Rows of a table, sentences and a dictionary about one machine."""
    from records.statistics import mean_interval
    means = {name: mean_interval(values) for name, values in host.values.items()}
    rows = [("part", "per second", "drift"), *((name, f"{means[name]:.4g} {host.units[name]}", f"{drift(values):+.1%}")
                                               for name, values in host.values.items())]
    return rows, [describe(host), *warnings(host)], dict(host.facts, parts=means)


def compare(a: Host, b: Host):
    """The same about two."""
    ratios, expected, error = time_ratio(a, b)
    low, high = expected / error, expected * error
    rows = [("part", "A", "B", "time on A / time on B"), *(
        (name, *(f"{sum(host.values[name]) / len(host.values[name]):.4g} {host.units[name]}" for host in (a, b)), f"{ratio:.3f}")
        for name, ratio in ratios.items())]
    lines = [f"{name}: {line}" for name, host in (("A", a), ("B", b)) for line in (describe(host), *warnings(host))]
    lines.append(f"Expected: training takes {expected:.3f} times as long on A as on B (95 %: {low:.3f} to {high:.3f}).")
    return rows, lines, dict(time_ratio=expected, low=low, high=high, parts=ratios)


def add_arguments(parser):
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="measurements, or logs that carry one")
    parser.add_argument("--seconds", type=float, default=60, help="time of the measurement, 5 to 600 (60)")
    parser.add_argument("--ranks", type=int, metavar="N", help="processes (default: one for each GPU, or two on a CPU)")
    parser.add_argument("--out", type=Path, default=ROOT / "logs" / "host.json", metavar="FILE", help="output (logs/host.json)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args) -> int:
    if args.compare:
        rows, lines, result = compare(*map(read, args.compare))
    else:
        for name, value, low, high in (("seconds", args.seconds, 5, 600), ("ranks", args.ranks, 1, 1024)):
            if value is not None and not low <= value <= high:
                raise RecordError(f"--{name}: expected {low} to {high}, found {value}; give a number in between")
        rows, lines, result = show(measure(args.seconds, args.ranks or default_ranks(), args.out))
        lines.append(f"Written to {args.out}.")
    if args.json:
        print(json.dumps(plain(result), indent=1))
    else:
        from rich.console import Console
        from rich.table import Table
        table = Table(*rows[0])
        for row in rows[1:]:
            table.add_row(*map(printable, row))
        Console(width=None if sys.stdout.isatty() else 120, markup=False, highlight=False).print(table)
        print("\n".join(map(printable, lines)))
    return 0
