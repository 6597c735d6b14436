"""Synthetic logs: one for each format that records/logs.py reads, written from the grammar, and what must be
read from it.

    log = make("E3", seed=7)            # log.text, log.runs (what went in), log.sources
    path = log.write(tmp_path / "a.txt")
    text = own(losses=[4.0, 1.59], seed=3)   # a log of train_gpt.py

All text is made up here; the embedded sources hold what has misled readers of real logs: step lines and
headers inside strings and comments, rules of dashes, quoted losses.
"""
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from records.tracks import TRACKS

LINE = "=" * 100
VALIDATION_DATA = TRACKS["shakespeare"].val_sha256
SOURCE = '''"""step:0/10 val_loss:9.9999 in the first line of a docstring."""
# The run before ended at val_loss:3.2799, see step:1480/1480 val_loss:3.2799 train_time:1ms step_avg:1.00ms
---------
print0(f"step:{step}/{total} val_loss:{loss:.4f} train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms")
print0(f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda}")
print0("=" * 100)
   step:5/10 val_loss:1.0000 train_time:5ms step_avg:1.00ms
step:{step}
seed: none
# é, and a line of 99:
''' + "=" * 99 + "\n"


@dataclass(frozen=True)
class Format:
    lead: bool = False  # a separator before the source
    source: int = 1  # embedded files
    header: bool = True  # versions between two separators
    python: bool = False
    torch: str = "pytorch"
    # "inline" in the torch line, "line" of its own, "table" of nvidia-smi, "bare" table, "list"
    device: str = ""
    triton: bool = False
    extra: tuple[str, ...] = ()  # lines after the header, before its last separator
    between: tuple[str, ...] = ()  # lines after the last separator, before the steps
    noise: tuple[str, ...] = ()  # lines between steps
    training: str = ""  # "", "timers", "loss"
    nan: bool = False  # no average time in the first training lines
    unit: str = "ms"
    decimals: int = 4
    peak: str = ""
    num_runs: int = 1
    first_step: int = 0
    seeds: str = ""  # how a seed is told: "using", "trial"
    time: bool = True


LOADERS = ("Training DataLoader: total number of tokens: 900000000 across 9 files",
           "Validation DataLoader: total number of tokens: 100000000 across 1 files")
SMI = "0.1.2.3 --- nvidia-smi:"
WARMUP = ("Compiling the model, untimed", "Sampling steps [0, 1, 490, 980] for warmup", "Resetting Model")
B1 = dict(lead=True, device="table", training="loss", nan=True, extra=(SMI,))
C1 = dict(device="table", training="loss", nan=True, extra=(SMI, LINE, *LOADERS))
D2 = dict(torch="PyTorch", python=True, device="table", training="timers", peak="allocated")
T2 = dict(torch="PyTorch", device="inline", unit="s", decimals=5)
T3 = dict(torch="PyTorch", device="line", unit="s", decimals=5, first_step=125, seeds="using",
          between=("Using lr=0.0375", "Experiment=made-up", "Intuition=step:3 is val_loss: 3.1"))

FORMATS = {
    "B1": Format(**B1),
    "B2": Format(**{**B1, "extra": (SMI, LINE, *LOADERS)}),
    "C1": Format(**C1),
    "C2": Format(**{**C1, "training": "timers"}),
    "C3": Format(**{**C1, "training": "timers", "python": True, "peak": "consumption"}),
    "C4": Format(**{**C1, "training": "timers", "python": True, "peak": "allocated"}),
    "C5": Format(torch="PyTorch", python=True, device="table", training="timers", nan=True,
                 peak="consumption",
                 extra=(LINE, "Training files: " + "['a.bin', 'b.bin'] " * 40)),
    "D1": Format(**{**D2, "nan": True}),
    "D2": Format(**D2),
    "D3": Format(**{**D2, "decimals": 6, "noise": ("inductor_output_code: /a/b.py", "tensor([1., 2.])")}),
    "D4": Format(**{**D2, "decimals": 6, "device": "bare", "between": ("None",)}),
    "E1": Format(**D2, triton=True),
    "E2": Format(**D2, triton=True, between=WARMUP),
    "E3": Format(**D2, triton=True, between=WARMUP, source=2),
    "E4": Format(**D2, triton=True, between=WARMUP, source=3, extra=("RUN_ID=made-up",)),
    "T1": Format(torch="PyTorch", unit="s", decimals=5),
    "T2": Format(**T2),
    "T2m": Format(**T2, num_runs=3, seeds="trial"),
    "T3": Format(**T3),
    "T3b": Format(**T3, training="timers"),
    "T4": Format(header=False, between=("logs/made-up.txt", "config lr=0.1 seed=3"), training="timers",
                 unit="s", decimals=5),
    "T4b": Format(header=False, unit="s", decimals=5),
    "T5": Format(source=0, header=False, between=("W0101 torch.distributed: OMP_NUM_THREADS",
                                                  "logs/made-up.txt"), unit="s",
                 decimals=5, device="list"),
}
VARIANTS = (*FORMATS, "A", "X", "own")
NAMES = ("train_gpt.py", "triton_kernels.py", "lib/more.py")


@dataclass
class Synthetic:
    text: str
    # facts of each run by the names of records.logs.RunFacts; val_points as (step, loss, ms or None)
    runs: list[dict]
    sources: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        path.write_text(self.text, encoding="utf-8", newline="")
        return path


def sources(number: int) -> dict[str, str]:
    return {name: f"# file {i}\n{SOURCE}\n" for i, name in enumerate(NAMES[:number])}


def embedded(files: dict[str, str]) -> list[str]:
    """The lines of embedded files; a source of train_gpt.py's log is followed by one empty line."""
    lines = []
    for name, text in files.items():
        lines += ([] if not lines else ["-" * 40, f"# {name}", "-" * 40]) + text.split("\n")
    return lines


def points(rng: random.Random, fmt: Format, total: int) -> list[tuple[int, float, float | None]]:
    """A falling curve whose numbers have exactly the decimals that the format prints."""
    scale, curve = 10**fmt.decimals, []
    for step in range(fmt.first_step, total + 1, 125):
        loss = round((3.27 + 7 / (1 + step / 20) + rng.uniform(-0.002, 0.002)) * scale) / scale
        ms = step * 60_000 // 125 + rng.randrange(500)  # a multiple of a millisecond in both units
        curve.append((step, loss, float(ms) if fmt.time else None))
    return curve


def step_lines(fmt: Format, curve, total: int) -> list[str]:
    lines = []
    for step, loss, ms in curve:
        time = f"{ms:.0f}ms" if fmt.unit == "ms" else f"{ms / 1000:.3f}s"
        timers = f"train_time:{time} step_avg:{ms / max(step, 1):.2f}ms"
        if fmt.training and step > 0:
            early = f"train_time:{time} step_avg:{'nan' if fmt.nan and step < 250 else '77.00'}ms"
            lines.append(f"step:{step}/{total}{' train_loss:3.9999' if fmt.training == 'loss' else ''} "
                         f"{early}")
        lines += [*fmt.noise, f"step:{step}/{total} val_loss:{loss:.{fmt.decimals}f} {timers}"]
    return lines


def make(variant: str, seed: int = 0) -> Synthetic:
    """A log of a format with numbers that depend on the seed."""
    rng = random.Random(f"{variant} {seed}")
    if variant == "A":
        curve = [(250 * k, round(11 - k + rng.random(), 4), None) for k in range(5)]
        lines = [f"s:{step} tel:{loss:.4f}\ns:{step} trl:{loss + 1:.4f} lr:0.000001 norm:15.37" for step,
                 loss, _ in curve]
        return Synthetic("\n".join([*lines, ""]), [dict(val_points=curve, total_steps=None, complete=False)])
    if variant == "X":
        return Synthetic("seed=0\nlog_dir=/tmp/logs\nstep: no\nval_loss: none\n", [])
    if variant == "own":
        losses = [round(5.9 - k + rng.random() / 10, 4) for k in range(5)]
        times = [float(1000 * k + rng.randrange(99)) for k in range(5)]
        text = own(losses, times, seed=seed)
        curve = [(100 * k, loss, ms) for k, (loss, ms) in enumerate(zip(losses, times))]
        run = dict(val_points=curve, total_steps=400, complete=True, seed=seed, torch="2.13.0+cpu",
                   python="3.11.7", world_size=2,
                   gpu_name="CPU (x86_64, 1 threads), Model T", num_gpus=0, val_tokens=262_144)
        return Synthetic(text, [run], {"train_gpt.py": "# the trainer\n", "muon.py": "# the optimizer\n"})
    fmt, total = FORMATS[variant], rng.choice([1375, 1500])
    facts = dict(total_steps=total, complete=True)
    files = sources(fmt.source)
    lines = ([LINE] if fmt.lead else []) + embedded(files)
    if fmt.source:
        lines.append(LINE)
    if fmt.header:
        torch, cuda = f"2.{rng.randrange(5, 12)}.0.dev20250101+cu126", "12.6"
        name = rng.choice(["NVIDIA H100 80GB HBM3", "NVIDIA A40"])
        facts |= dict(torch=torch, cuda=cuda)
        inline = f" on {name}   with world_size 8" if fmt.device == "inline" else ""
        if fmt.python:
            facts["python"] = "3.12.9"
            lines.append(f"Running {'P' if fmt.torch == 'PyTorch' else 'p'}ython 3.12.9 | packaged by "
                         "somebody | [GCC 13.2.0]")
        lines.append(f"Running {fmt.torch} {torch} compiled for CUDA {cuda}{inline}")
        if fmt.triton:
            facts["triton"] = "3.4.0"
            lines.append("Running Triton version 3.4.0")
        if fmt.device == "line":
            lines.append(f"Running on device_name={name}  with world_size=8")
        if fmt.device in ("inline", "line"):
            facts |= dict(gpu_name=name, num_gpus=8, world_size=8)
        if fmt.device == "table":
            lines += ["| GPU  Name                 Persistence-M | Bus-Id          Disp.A |",
                      "|" + "=" * 100 + "|"]
            lines += [f"|   {i}  {name}          On  | 00000000:0{i}:00.0 Off |                    0 |"
                      for i in range(8)]
            lines += ["|    0   N/A  N/A            1234      C   /usr/bin/python3                        "
                      "1000MiB |"]
        if fmt.device == "bare":
            lines += ["nvidia-smi not found"] + [f"{i}   {name}     35    117        6340            81559"
                                                 for i in range(8)]
        if fmt.device in ("table", "bare"):
            facts |= dict(gpu_name=name, num_gpus=8)
        lines += [*fmt.extra, LINE]
    if fmt.device == "list":
        lines += [f"GPU {i}: NVIDIA H200 (UUID: GPU-0000-{i})" for i in range(4)] * 2
        facts |= dict(gpu_name="NVIDIA H200", num_gpus=4)
    lines += fmt.between
    runs = []
    for k in range(fmt.num_runs):
        number = rng.randrange(100)
        if fmt.seeds == "using":
            lines.append(f"Using seed={number}")
        elif fmt.seeds == "trial":
            lines.append(f"trial:{k + 1}/{fmt.num_runs} seed:{number}")
        curve = points(rng, fmt, total)
        lines += step_lines(fmt, curve, total)
        runs.append({**facts, "val_points": curve, **({"seed": number} if fmt.seeds else {})})
    if fmt.peak:
        lines.append("peak memory consumption: 31234 MiB" if fmt.peak == "consumption"
                     else "peak memory allocated: 31234 MiB reserved: 40000 MiB")
        runs = [{**run, "peak_mib": 31234} for run in runs]
    # A source ends with a newline; embedding adds another one, which is not part of the file.
    return Synthetic("\n".join([*lines, ""]), runs,
                     {name: text.rstrip("\n") + "\n" for name, text in files.items()})


def own(losses, times=None, seed: int = 0, every: int = 100, world_size: int = 2,
        device: str = "CPU (x86_64, 1 threads)",
        torch: str = "2.13.0+cpu", files: dict[str, str] | None = None, total: int | None = None,
        **settings) -> str:
    """A log of train_gpt.py: validations every `every` steps from step 0 on, times in ms.

    Further settings go into its config.
    """
    times = [1000.0 * k for k in range(len(losses))] if times is None else times
    files = files or {"train_gpt.py": "# the trainer\n", "muon.py": "# the optimizer\n"}
    total = total or every * (len(losses) - 1)
    config = {"track": "shakespeare", "target_loss": 1.6, "seed": seed, "val_tokens": 262_144,
              "train_steps": total, "val_every": every,
              "extension_steps": 10, "stages": 3, "batch_tokens": [2048], "adam_every": 1, **settings}
    lines = [*embedded(files), LINE, "Running Python 3.11.7 (main) [GCC 12.2.0]",
             f"Running PyTorch {torch} compiled for CUDA None on {device} with world_size {world_size}",
             "no GPU: Architecture:  x86_64", "Model name:                              Model T",
             f"commit: {'0' * 40}",
             "config: " + json.dumps(config), f"seed: {seed}", "attention: blocked (fastest on a CPU)",
             f"training data: {total * 2048:,} tokens from 1 shards, fingerprint {'0' * 16}",
             f"validation data: first {config['val_tokens']} tokens, sha256 {VALIDATION_DATA}", LINE]
    for k, (loss, ms) in enumerate(zip(losses, times)):
        step, timers = k * every, f"train_time:{ms:.0f}ms step_avg:{ms / max(k * every, 1):.2f}ms"
        lines += ([f"step:{step}/{total} {timers}"] if k
                  else []) + [f"step:{step}/{total} val_loss:{loss:.4f} {timers}"]
    return "\n".join([*lines, ""])
