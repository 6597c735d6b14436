"""Read the log of a training run: the 24 formats of the public speedrun, and that of train_gpt.py.

A log is: embedded source, a line of 100 `=`, a header (versions, hardware, settings), the same line, then
step lines:

    step:125/1480 val_loss:4.0123 train_time:6021ms step_avg:48.17ms      validation
    step:125/1480 train_time:6021ms step_avg:48.17ms                      training

Whatever part is missing, the rest is read. A log is hostile text: it is searched line by line for those that
matter, in bounded memory and with patterns that cannot backtrack badly, nothing of it is run, and what is odd
about it is said in `LogFile.problems`. The source can hold anything, so whatever looks like output before the
last header counts as source.
"""
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.errors import UsageError
from records.experiment import ROLES, read_experiment
from records.formatting import printable

RECORD_FILE = "record.json"  # what the folder of a record claims; its logs are in runs/
SUFFIXES = {".txt", ".log", ".out", ".stdout"}  # of files that may be logs
LINE_LIMIT = 1 << 16  # bytes; no line as long is read (the longest that matters in the public logs has 587)
SOURCE_LIMIT = 1 << 22  # bytes; no longer source is kept (the longest in the public logs has 187,761)
POINT_LIMIT = 20_000  # validations kept of a file (the most in the public logs are 1,080)
COMPRESSED = b"\x1f\x8b", b"PK\3\4", b"(\xb5/\xfd"  # the first bytes of gzip, zip and zstd
UNPACK = "the file is compressed: unpack it first"


@dataclass(frozen=True)
class ValPoint:
    step: int
    val_loss: float  # nats per token, as printed; may be nan or inf
    train_time_ms: float | None


@dataclass(frozen=True)
class RunFacts:
    """One training run; a file may hold several. What the log does not say is None."""
    run_id: str  # stem of the file name; of several runs in a file the first appends #01
    val_points: tuple[ValPoint, ...]
    total_steps: int | None = None  # as printed
    complete: bool = False  # there is a validation at total_steps
    torch: str | None = None
    cuda: str | None = None
    triton: str | None = None
    python: str | None = None
    gpu_name: str | None = None  # on a CPU its description and model
    num_gpus: int | None = None  # rows of nvidia-smi's table, else the world size; 0 on a CPU
    world_size: int | None = None
    seed: int | None = None
    peak_mib: int | None = None  # peak of allocated memory
    config: dict = field(default_factory=dict)  # resolved settings of our own logs; {} for others
    val_tokens: int | None = None  # tokens of a validation
    # total time / steps of the last validation, whatever the log calls its average
    step_avg_ms: float | None = None
    # hash of the embedded source, all files of it; a single file has its own
    source_sha256: str | None = None
    commit: str | None = None
    training_data: str | None = None  # fingerprint of the shards
    validation_data: str | None = None  # SHA-256 of the tokens that are validated
    resumed: bool = False  # went on from a checkpoint

    @property
    def hardware(self) -> str | None:
        return f"{self.num_gpus} x {self.gpu_name}" if self.gpu_name and self.num_gpus else self.gpu_name

    @property
    def final_val_loss(self) -> float | None:
        return self.val_points[-1].val_loss if self.val_points else None

    @property
    def final_time_ms(self) -> float | None:
        return self.val_points[-1].train_time_ms if self.val_points else None

    @property
    def final_step(self) -> int | None:
        return self.val_points[-1].step if self.val_points else None

    @property
    def end(self) -> ValPoint | None:
        """The last validation of a run that came to its end; llm.c does not say where that is."""
        ended = self.complete or self.total_steps is None
        return self.val_points[-1] if self.val_points and ended else None

    def at(self, step: int) -> ValPoint | None:
        """The validation at a step."""
        return next((point for point in self.val_points if point.step == step), None)

    def time_to(self, loss: float) -> float | None:
        """Training milliseconds at which the validation loss first is `loss` or less, on straight lines
        between validations; None where it never is, or where times are missing."""
        return self._first_crossing(loss, lambda point: point.train_time_ms)

    def steps_to(self, loss: float) -> float | None:
        """The step at which time_to has its time."""
        return self._first_crossing(loss, lambda point: point.step)

    def _first_crossing(self, loss, x) -> float | None:
        before = None
        for point in self.val_points:
            if point.val_loss <= loss:
                if before is None or not (math.isfinite(before.val_loss) and math.isfinite(point.val_loss)):
                    return x(point)
                if x(before) is None or x(point) is None:
                    return None
                part = (before.val_loss - loss) / (before.val_loss - point.val_loss)
                return x(before) + part * (x(point) - x(before))
            before = point
        return None


@dataclass(frozen=True)
class LogFile:
    path: Path
    runs: tuple[RunFacts, ...]  # none where it is no log
    sha256: str  # of the file
    size: int  # bytes
    problems: tuple[str, ...]  # what is odd about the file
    sources: dict[str, str]  # embedded source files by name


SEPARATOR = "=" * 100
# before the second, third, ... source file
DIVIDER = re.compile(r"^-{40}\n# ([\w./-]{1,200})\n-{40}\n", re.M)
NUMBER = re.compile(r"-?(?:\d{1,20}(?:\.\d{1,20})?(?:e[+-]?\d{1,3})?|inf)|nan", re.A)
TIME = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)(ms|s)", re.A)
STEP = re.compile(r"step:(\d{1,12})/(\d{1,12})((?: \w{1,40}:\S{1,40})+)", re.A)
LLMC = re.compile(r"s:(\d{1,12}) (tel|trl):(\S{1,40})(?: .*)?", re.A)
SEED = re.compile(r"(?:Using seed=|seed: |trial:\d{1,9}/\d{1,9} seed:)(\d{1,18})", re.A)
GPU = re.compile(r"(?:\|? *(\d{1,4}) +(NVIDIA(?: \S+)+)(?:  .*)?"  # of nvidia-smi, or of a table without bars
                 r"|GPU (\d{1,4}): (NVIDIA(?: [^ (]+)+) \(UUID.*)", re.A)  # of nvidia-smi -L
FACTS = [re.compile(pattern, re.A) for pattern in (  # the name of a group names the fact
    r"Running [pP]ython (?P<python>\S+)",
    r"Running (?:PyTorch|pytorch) (?P<torch>\S+) compiled for CUDA (?P<cuda>\S+)"
    r"(?: on (?P<device>\S+(?: \S+)*) +with world_size (?P<world_size>\d{1,9}))?$",
    r"Running Triton version (?P<triton>\S+)",
    r"Running on device_name=(?P<device>\S+(?: \S+)*) +with world_size=(?P<world_size>\d{1,9})$",
    r"Model name: +(?P<cpu>\S+(?: \S+)*)$",
    r"commit: (?P<commit>[0-9a-f]{40}(?: with changes)?)$",
    r"training data: .{1,200}, fingerprint (?P<training_data>[0-9a-f]{8,64})$",
    r"validation data: first \d{1,15} tokens, sha256 (?P<validation_data>[0-9a-f]{64})$",
    r"(?P<resumed>resumed): ",
    r"peak memory (?:consumption|allocated): (?P<peak_mib>\d{1,12}) MiB",
)]
PLAIN_FACTS = ("torch", "cuda", "triton", "python", "commit", "training_data", "validation_data")
MATTERS = re.compile(  # the beginning of a line that matters
    rb"step:\d|s:\d|={100}|Running |\|? *\d+ +NVIDIA |GPU \d+: |Using seed=|seed: |trial:"
    rb"|config: \{|Model name: |commit: |training data: |validation data: |resumed: |peak memory "
    rb"|ended after step ")


def find(paths) -> list[Path]:
    """Files that may be logs, sorted: each file of `paths`, and those with a usual suffix below its folders.

    None comes twice. Hidden files, such as those that macOS leaves behind, and links are left out; so is all
    but the logs of both arms in the folder of an A/B experiment, and all but the runs in that of a record.
    """
    found = {}
    for path in map(Path, paths):
        try:
            if not path.exists():
                raise UsageError(f"{path}: expected a log or a folder of logs, found nothing there; check "
                                 "the path")
            for file in sorted(files_below(path)) if path.is_dir() else [path]:
                found.setdefault(file.resolve(), file)
        except OSError as e:
            refuse(e, path)
    return sorted(found.values())


def files_below(root: Path) -> Iterator[Path]:
    """The files of a folder that may be logs."""
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        inside = ROLES if read_experiment(Path(folder)) else ["runs"] if RECORD_FILE in names else None
        subfolders[:] = [name for name in subfolders if not name.startswith(".")
                         and (inside is None or name in inside)]
        for file in (Path(folder, name) for name in names if inside is None and not name.startswith(".")):
            if file.suffix in SUFFIXES and file.is_file() and not file.is_symlink():
                yield file


def refuse(error: OSError, path: Path | None = None):
    raise UsageError(f"{path or error.filename}: expected something readable, found: {error.strerror}; "
                     "check path and permissions") from None


def read(path) -> LogFile:
    """The log at a path. Raises UsageError where there is no readable file, and never for what is in it."""
    path = Path(path)
    notes = {}  # what is odd about the file: the first example of each kind of oddity
    digest = hashlib.sha256()
    try:
        with opened(path) as file:
            body = Body(notes)
            for offset, line in lines(file, digest, notes):
                body = body.take(offset, line)
            size = file.tell()
            source = read_source(file, body, notes)
    except OSError as e:
        refuse(e, path)

    sources = split_source(source, notes)
    runs = body.runs(path.stem, hashlib.sha256(source).hexdigest() if source else None)
    if not size:
        notes.setdefault("the file is empty", "")
    elif not any(run.val_points for run in runs):
        notes.setdefault("there is no validation in it" if runs else "this is no log of a training run", "")
    problems = tuple(f"{kind}: {example}" if example else kind for kind, example in notes.items())
    return LogFile(path, runs, digest.hexdigest(), size, problems, sources)


def opened(path: Path):
    """Open a file for reading. A pipe is refused, for it might never end."""
    if path.is_file():
        return open(path, "rb")
    kind = "a folder" if path.is_dir() else "a device or a pipe" if path.exists() else "nothing there"
    raise UsageError(f"{path}: expected a log, found {kind}; name a file")


def lines(file, digest, notes: dict[str, str]) -> Iterator[tuple[int, str]]:
    """Yield (offset, line) of each line that matters; only the beginning of a long one is ever in memory."""
    offset = 0
    begins = True  # whether what is read next begins a line
    while text := file.readline(LINE_LIMIT):
        digest.update(text)
        if not offset and text.startswith(COMPRESSED):
            notes.setdefault(UNPACK, "")
        elif b"\0" in text and UNPACK not in notes:
            notes.setdefault("the file is binary: it holds NUL bytes", "")
        ends = text.endswith(b"\n")
        short = len(text) < LINE_LIMIT
        matters = begins and MATTERS.match(text)
        if matters and (ends or short and text.endswith((b"ms", b" MiB"))):
            yield offset, text.decode("utf-8", "replace").rstrip()
        elif short and not ends:  # a number at the end of the last line may be cut
            notes.setdefault("the last line is cut and not read", quoted(text.decode("utf-8", "replace")))
        elif matters:
            notes.setdefault(f"a line of {LINE_LIMIT:,} bytes and more is not read", "")
        offset += len(text)
        begins = ends


def read_source(file, body: "Body", notes: dict[str, str]) -> bytes:
    """The embedded source with LF line ends and one newline at the end, as a file has; empty without one."""
    if body.source_end > SOURCE_LIMIT:
        notes.setdefault(f"an embedded source of more than {SOURCE_LIMIT:,} bytes is not read", "")
        return b""
    file.seek(0)
    source = file.read(body.source_end).replace(b"\r\n", b"\n")
    if body.leads:
        source = source[len(SEPARATOR) + 1:]
    return source.rstrip(b"\n") + b"\n" if source.strip() else b""


def split_source(source: bytes, notes: dict[str, str]) -> dict[str, str]:
    """The files of an embedded source by name. The first bears none in the public formats, and is
    train_gpt.py where it does not."""
    if not source:
        return {}
    text = source.decode("utf-8", "replace")
    first, *parts = DIVIDER.split(text)
    names = parts[0::2]
    texts = parts[1::2]
    if first.strip() or not parts:
        names = ["train_gpt.py", *names]
        texts = [first, *texts]
    if len(set(names)) < len(names) or any(name.startswith("/") or ".." in name.split("/") for name in names):
        notes.setdefault("the embedded source has file names that cannot be used: it is one file here", "")
        return {"train_gpt.py": text}
    return {name: part.rstrip("\n") + "\n" for name, part in zip(names, texts)}


def quoted(line: str) -> str:
    return ascii(line[:100])


@dataclass
class Part:
    """A run while it is being read."""
    seed: int | None = None
    points: list[ValPoint] = field(default_factory=list)
    total: int | None = None
    step: int = -1  # of the last line, training lines included
    ms: float = 0.0  # of the last line whose time counts


def read_config(text: str) -> dict:
    """The settings in a config line of train_gpt.py: plain values and lists by name. Raises ValueError."""
    def plain(value) -> bool:
        number = isinstance(value, (bool, int, float))
        return value is None or number or isinstance(value, str) and value.isprintable()

    try:
        config = json.loads(text)
    except RecursionError:
        raise ValueError from None
    for name, value in config.items():
        if not (plain(name) and all(map(plain, value)) if isinstance(value, list) else plain(value)):
            raise ValueError
    return config


def whole_number(value) -> int | None:
    """Return a setting that is a whole number of sane size, else None."""
    return value if type(value) is int and abs(value) < 10**18 else None


class Body:
    """What is known from the last header on; where there is no header, from the last separator on."""

    def __init__(self, notes: dict[str, str], leads: bool = False, separator: int | None = None):
        self.notes = notes
        self.leads = leads  # whether a separator begins the file
        self.separator = separator  # offset of the last one
        self.source_end = separator or 0
        self.has_header = False
        self.has_steps = False
        self.facts: dict[str, str] = {}
        self.gpus: dict[int, str] = {}
        self.config: dict = {}
        self.parts, self.num_points = [Part()], 0

    def take(self, offset: int, line: str) -> "Body":
        """Learn from a line. Returns the body to which the next line belongs."""
        if line.startswith(("step:", "s:")):
            if self.num_points >= POINT_LIMIT:
                self.notes.setdefault(f"more than {POINT_LIMIT:,} validations: the rest is not read", "")
            elif line.startswith("step:"):
                self.take_step(line)
            else:
                self.take_llmc(line)
        elif line == SEPARATOR:
            if offset == 0:
                self.leads = True
            elif not self.has_header:
                return self.restarted(offset)
            self.separator = offset
        elif line.startswith("Running ") and self.is_just_before(offset):
            body = self.restarted(self.separator)
            body.has_header = True
            body.take_fact(line)
            return body
        else:
            self.take_fact(line)
        return self

    def is_just_before(self, offset: int) -> bool:
        """Return whether the last separator is the line before."""
        return self.separator is not None and offset - self.separator <= len(SEPARATOR) + 2

    def restarted(self, separator: int) -> "Body":
        if self.has_steps:
            self.notes.setdefault("step lines before the last header, as in a source, are not read", "")
        return Body(self.notes, self.leads, separator)

    def take_fact(self, line: str):
        if line.startswith("config: "):
            try:
                self.config = self.config or read_config(line.removeprefix("config: "))
            except ValueError:
                self.notes.setdefault("the config line cannot be read", quoted(line))
        elif match := SEED.fullmatch(line):
            if self.parts[-1].points:
                self.start_part()
            self.parts[-1].seed = int(match[1])
        elif match := GPU.fullmatch(line):
            self.gpus[int(match[1] or match[3])] = printable((match[2] or match[4])[:100])
        elif line.startswith("ended after"):
            self.notes.setdefault("the run ended early", quoted(line))
        elif not self.has_steps or line.startswith("peak memory"):
            for pattern in FACTS:
                if match := pattern.match(line):
                    found = {name: printable(text[:100]) for name, text in match.groupdict().items()
                             if text not in (None, "None")}
                    self.facts = found | self.facts

    def take_step(self, line: str):
        match = STEP.fullmatch(line)
        values = dict(pair.split(":", 1) for pair in match[3].split(" ")[1:]) if match else {}
        loss = NUMBER.fullmatch(values.get("val_loss", "0"))
        time = TIME.fullmatch(values.get("train_time", "0ms"))
        if not match or not loss or not time or len(values) < line.count(" "):
            return self.notes.setdefault("a step line cannot be read", quoted(line))

        step, total = int(match[1]), int(match[2])
        ms = float(time[1]) if time[2] == "ms" else round(1000 * float(time[1]), 6)
        if "val_loss" in values:
            self.take_point(ValPoint(step, float(loss[0]), ms if "train_time" in values else None), total)
        else:
            self.has_steps = True
            self.part_at(step, total)
        if "train_time" in values and (self.config or "val_loss" in values):
            self.hold_to_clock(line, step, ms, values.get("step_avg", "").removesuffix("ms"))

    def hold_to_clock(self, line: str, step: int, ms: float, average: str):
        """Note a time that does not fit its neighbours, as one that was typed in or copied hardly ever does.

        Early public trainers began their clock anew after 10 steps, and some print averages since the last
        validation: of their logs only the times of validations are looked at.
        """
        part = self.parts[-1]
        if ms < part.ms:
            self.notes.setdefault("the training time falls", quoted(line))
        part.ms = ms
        # Times are printed to 1 ms, averages to 0.01 ms.
        steps = max(step, 1)
        if self.config and NUMBER.fullmatch(average) and abs(steps * float(average) - ms) > 1 + 0.006 * steps:
            self.notes.setdefault("a time is not its steps times their average", quoted(line))

    def take_llmc(self, line: str):
        match = LLMC.fullmatch(line)
        if not match or not NUMBER.fullmatch(match[3]):
            return self.notes.setdefault("a step line cannot be read", quoted(line))
        if match[2] == "tel":
            self.take_point(ValPoint(int(match[1]), float(match[3]), None), None)

    def take_point(self, point: ValPoint, total: int | None):
        self.has_steps = True
        part = self.part_at(point.step, total)
        if part.points and part.points[-1].step == point.step:
            if str(part.points[-1]) == str(point):
                return self.notes.setdefault("a validation line is repeated, and counts once", "")
            self.start_part()
            part = self.part_at(point.step, total)
        part.points.append(point)
        self.num_points += 1

    def part_at(self, step: int, total: int | None) -> Part:
        """The run that a step line belongs to: a new one where the steps begin again."""
        part = self.start_part() if step < self.parts[-1].step else self.parts[-1]
        if part.total not in (None, total):
            self.notes.setdefault("the planned number of steps changes within a run", "")
        part.step, part.total = step, total
        return part

    def start_part(self) -> Part:
        self.end_part()
        self.parts.append(Part())
        return self.parts[-1]

    def end_part(self):
        """Forget the last run where it has no validation."""
        if not self.parts[-1].points and self.parts.pop().step >= 0:
            self.notes.setdefault("a run without a validation is left out", "")

    def runs(self, stem: str, source_sha256: str | None) -> tuple[RunFacts, ...]:
        if len(self.parts) > 1:
            self.end_part()
        if not (self.has_steps or self.has_header or self.config):
            return ()
        return tuple(self.run(part, stem if len(self.parts) == 1 else f"{stem}#{k:02}", source_sha256)
                     for k, part in enumerate(self.parts, start=1))

    def run(self, part: Part, run_id: str, source_sha256: str | None) -> RunFacts:
        points, facts, config = part.points, self.facts, self.config
        device = facts.get("device")
        world_size = int(facts["world_size"]) if "world_size" in facts else None
        on_cpu = device is not None and device.startswith("CPU")
        if on_cpu and "cpu" in facts:
            device = f"{device}, {facts['cpu']}"
        self.note_oddities(part)
        return RunFacts(
            run_id=run_id,
            val_points=tuple(points),
            total_steps=part.total,
            complete=bool(points) and points[-1].step == part.total,
            gpu_name=device or next(iter(self.gpus.values()), None),
            num_gpus=len(self.gpus) or (0 if on_cpu else world_size),
            world_size=world_size,
            seed=part.seed if part.seed is not None else whole_number(config.get("seed")),
            peak_mib=int(facts["peak_mib"]) if "peak_mib" in facts else None,
            config=config,
            val_tokens=whole_number(config.get("val_tokens")),
            step_avg_ms=points[-1].train_time_ms / points[-1].step
            if points and points[-1].step and points[-1].train_time_ms is not None else None,
            source_sha256=source_sha256,
            resumed="resumed" in facts,
            **{name: facts.get(name) for name in PLAIN_FACTS},
        )

    def note_oddities(self, part: Part):
        points = part.points
        if any(not math.isfinite(point.val_loss) for point in points):
            self.notes.setdefault("a validation loss is not a finite number", "")
        if points and part.total is not None and points[-1].step != part.total:
            self.notes.setdefault("the run is incomplete",
                           f"last validation at step {points[-1].step} of {part.total}")
        if (step := self.skipped_validation(part)) is not None:
            self.notes.setdefault("a validation is missing", f"none at step {step}")

    def skipped_validation(self, part: Part) -> int | None:
        """Return the first step before a validation at which the settings ask for another one."""
        every = whole_number(self.config.get("val_every")) or 0
        due = None if "resumed" in self.facts else 0  # a resumed run begins anywhere
        for point in part.points if every > 0 else ():
            if due is not None and point.step > due:
                return due
            due = point.step - point.step % every + every
        return None
