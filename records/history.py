"""The public history of the speedrun: rows of the record tables, and runs whose whole curve is kept.

The data and what their columns mean: records/history/README.md. Attributes are called as the columns are."""
import csv
import datetime
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from urllib.parse import quote

from records.logs import LogFile, RunFacts, ValPoint

FOLDER = Path(__file__).parent / "history"
SOURCE = "https://github.com/KellerJordan/modded-nanogpt"
COMMIT = "f411b3d346aa52d3504324ca93c230fd84c6c07f"


@dataclass(frozen=True)
class HistoryRow:
    """A row of a record table."""
    track: str
    number: int
    minutes_or_steps: Decimal  # as upstream prints it
    date: datetime.date | None
    title: str
    hardware: str
    log_path: str  # below SOURCE at COMMIT; may be a folder, or empty
    pr: int | None
    contributors: tuple[str, ...]
    notes: str
    kind: str  # record or retiming

    @property
    def log_url(self) -> str | None:
        return f"{SOURCE}/blob/{COMMIT}/{quote(self.log_path)}" if self.log_path else None

    @property
    def pr_url(self) -> str | None:
        return f"{SOURCE}/pull/{self.pr}" if self.pr else None


@cache
def read(name: str) -> tuple[dict[str, str], ...]:
    """The rows of a file, all cells as text."""
    with open(FOLDER / name, encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


def parsed(cell: str, kind=int):
    """Return what a cell says, as a number or of another kind; None where it is empty."""
    return kind(cell) if cell else None


@cache
def records() -> tuple[HistoryRow, ...]:
    return tuple(HistoryRow(**row | {
        "number": int(row["number"]),
        "minutes_or_steps": Decimal(row["minutes_or_steps"]),
        "date": parsed(row["date"], datetime.date.fromisoformat),
        "pr": parsed(row["pr"]),
        "contributors": tuple(row["contributors"].split(";")),
    }) for row in read("records.csv"))


def numbers_with_curves(track: str) -> list[int]:
    """The records of a track of which runs with their curves are kept."""
    return sorted({int(row["number"]) for row in read("curves.csv") if row["track"] == track})


def as_log(track: str, record: int) -> LogFile:
    """The runs of a record whose curves are kept, as those of one log."""
    of_record = track, str(record)
    points = {}
    for row in read("curves.csv"):
        if (row["track"], row["number"]) == of_record:
            point = ValPoint(int(row["step"]), float(row["val_loss"]), parsed(row["train_time_ms"], float))
            points.setdefault(row["run_id"], []).append(point)
    finals = {row["run_id"]: row for row in read("finals.csv") if (row["track"], row["number"]) == of_record}
    runs = tuple(public_run(finals[run_id], curve) for run_id, curve in points.items())
    return LogFile(FOLDER / "curves.csv", runs, sha256="", size=0, problems=(), sources={})


def public_run(final: dict[str, str], points: list[ValPoint]) -> RunFacts:
    total, last = parsed(final["total_steps"]), points[-1]
    return RunFacts(
        run_id=final["run_id"],
        val_points=tuple(points),
        total_steps=total,
        complete=last.step == total,
        torch=final["torch_version"] or None,
        gpu_name=final["gpu_name"] or None,
        num_gpus=parsed(final["n_gpus"]),
        world_size=parsed(final["world_size"]),
        step_avg_ms=last.train_time_ms and last.train_time_ms / last.step,
    )
