"""Read the log of a training run, whatever wrote it."""
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from records.errors import RecordError


@dataclass(frozen=True)
class ValPoint:
    step: int
    val_loss: float  # nats per token, as printed; may be nan or inf
    train_time_ms: float | None
    extra: dict[str, float]  # further keys of the line, such as val_ema_loss


@dataclass(frozen=True)
class Run:
    """One training run; a file may hold several. What the log does not say is None."""
    run_id: str  # stem of the file name; `#k` appended for the k-th, from 1, of several runs in a file
    val_points: tuple[ValPoint, ...]
    total_steps: int | None  # as printed
    complete: bool  # there is a validation at total_steps
    torch: str | None = None
    cuda: str | None = None
    triton: str | None = None
    python: str | None = None
    gpu_name: str | None = None
    num_gpus: int | None = None
    world_size: int | None = None
    seed: int | None = None
    peak_mib: int | None = None
    config: dict = None  # resolved settings of our own logs; {} for others
    val_tokens: int | None = None
    step_avg_ms: float | None = None  # total time / steps of the last validation point
    source_sha256: str | None = None

    @property
    def first_val_loss(self) -> float | None:
        return self.val_points[0].val_loss if self.val_points else None

    @property
    def final_val_loss(self) -> float | None:
        return self.val_points[-1].val_loss if self.val_points else None

    @property
    def final_time_ms(self) -> float | None:
        return self.val_points[-1].train_time_ms if self.val_points else None

    @property
    def final_step(self) -> int | None:
        return self.val_points[-1].step if self.val_points else None

    def at(self, step: int) -> ValPoint | None:
        return next((point for point in self.val_points if point.step == step), None)

    def time_to(self, loss: float) -> float | None:
        """Milliseconds of training until the validation loss is first at or below `loss`, interpolated linearly between
        validations; None where that never happens or times are missing."""
        return self._first_crossing(loss, lambda point: point.train_time_ms)

    def steps_to(self, loss: float) -> float | None:
        """Steps until the validation loss is first at or below `loss`, interpolated linearly between validations."""
        return self._first_crossing(loss, lambda point: point.step)

    def _first_crossing(self, loss, x):
        before = None
        for point in self.val_points:
            if point.val_loss <= loss:
                if before is None or not math.isfinite(before.val_loss) or x(before) is None or x(point) is None:
                    return x(point)
                part = (before.val_loss - loss) / (before.val_loss - point.val_loss)
                return x(before) + part * (x(point) - x(before))
            before = point
        return None


@dataclass(frozen=True)
class Log:
    path: Path
    variant: str  # id of the format: "A" ... "T5" of the public logs, "X" for what is no log, "own" for train_gpt.py's
    runs: tuple[Run, ...]
    sha256: str
    size: int  # bytes
    problems: tuple[str, ...]  # what is odd about the file
    sources: dict[str, str]  # embedded source files by name


LOG_SUFFIXES = {".txt", ".log", ".out", ".stdout"}


def find(paths) -> list[Path]:
    """Log-like files under files and folders: sorted, none twice, no link that leads out of its folder."""
    found = {}
    for path in map(Path, paths):
        if path.is_dir():
            root = path.resolve()
            for folder, folders, names in os.walk(path):
                folders.sort()
                for file in (Path(folder, name) for name in sorted(names)):
                    if file.suffix in LOG_SUFFIXES and file.is_file() and file.resolve().is_relative_to(root):
                        found.setdefault(file.resolve(), file)
        elif path.exists():
            found.setdefault(path.resolve(), path)
        else:
            raise RecordError(f"{path}: expected a log or a folder of logs, found nothing; check the path")
    return sorted(found.values())


def read(path) -> Log:
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as e:
        raise RecordError(f"{path}: expected a readable file, found: {e.strerror}; check the path") from None
    text = data.decode("utf-8", "replace")
    points = tuple(ValPoint(int(s), float(loss), float(t) * (1 if unit == "ms" else 1000), {}) for s, loss, t, unit in
                   re.findall(r"^step:(\d+)/\d+ val_loss:(\d+\.\d+) train_time:(\d+(?:\.\d+)?)(ms|s)", text, re.M))
    totals = re.findall(r"^step:\d+/(\d+) ", text, re.M)
    total = int(totals[-1]) if totals else None
    config = re.findall(r"^config: (\{.*\})$", text, re.M)
    config = json.loads(config[-1]) if config else {}
    torch = re.search(r"^Running PyTorch (\S+) compiled for CUDA (\S+) on (.+?) with world_size (\d+)$", text, re.M)
    source = text.split("=" * 100 + "\n")[0]
    parts = re.split(r"^-{40}\n# (\S+)\n-{40}\n", source, flags=re.M)
    run = Run(run_id=path.stem, val_points=points, total_steps=total, complete=bool(points) and points[-1].step == total,
              torch=torch and torch[1], cuda=torch and torch[2], gpu_name=torch and torch[3], world_size=torch and int(torch[4]),
              seed=config.get("seed"), config=config, val_tokens=config.get("val_tokens"),
              step_avg_ms=points[-1].train_time_ms / max(points[-1].step, 1) if points else None,
              source_sha256=hashlib.sha256(source.encode()).hexdigest())
    return Log(path, "own" if config else "X", (run,), hashlib.sha256(data).hexdigest(), len(data), (),
               dict(zip(["train_gpt.py", *parts[1::2]], parts[0::2])))
