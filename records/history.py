"""The public history of the speedrun: rows of the record tables, last validations of their runs, and some
whole curves.

The data and what their columns mean: records/history/README.md. Attributes are called as the columns are."""
import csv
import datetime
import types
import typing
from dataclasses import dataclass, fields
from decimal import Decimal
from functools import cache
from pathlib import Path
from urllib.parse import quote

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


@dataclass(frozen=True)
class HistoryFinal:
    """The last validation of a run."""
    track: str
    number: int | None  # None: of no row of a table
    run_id: str
    final_val_loss: float
    final_train_time_ms: int | None
    final_step: int
    torch_version: str
    gpu_name: str
    n_gpus: int | None
    world_size: int | None
    total_steps: int | None
    n_val_points: int
    log_path: str
    kind: str  # record, retiming or other


@dataclass(frozen=True)
class HistoryPoint:
    """A validation of a run whose curve is kept."""
    track: str
    number: int
    run_id: str
    step: int
    val_loss: float
    train_time_ms: int | None


@cache
def records() -> tuple[HistoryRow, ...]:
    return read("records.csv", HistoryRow)


@cache
def finals() -> tuple[HistoryFinal, ...]:
    """Of all runs that belong to a record."""
    return read("finals.csv", HistoryFinal)


@cache
def other_finals() -> tuple[HistoryFinal, ...]:
    return read("finals_other.csv", HistoryFinal)


@cache
def curves() -> dict[tuple[str, int, str], tuple[HistoryPoint, ...]]:
    """Curves by track, number and run_id."""
    found = {}
    for point in read("curves.csv", HistoryPoint):
        found.setdefault((point.track, point.number, point.run_id), []).append(point)
    return {key: tuple(points) for key, points in found.items()}


def runs_of(record: HistoryRow) -> list[HistoryFinal]:
    """The runs of a record. A retiming is the one log that its row names."""
    return [final for final in finals() if (final.track, final.number,
                                            final.kind) == (record.track, record.number, record.kind)
            and (record.kind == "record" or final.log_path == record.log_path)]


def read(name: str, row: type) -> tuple:
    """The rows of a file as instances of a dataclass, each cell as its attribute's type wants it."""
    convert = {field.name: converter(field.type) for field in fields(row)}
    with open(FOLDER / name, encoding="utf-8", newline="") as file:
        return tuple(row(**{column: convert[column](cell) for column, cell in cells.items()})
                     for cells in csv.DictReader(file))


def converter(kind):
    """A function from the text of a cell to a value of this type; of `X | None` an empty cell is None."""
    if isinstance(kind, types.UnionType):
        kind, _ = typing.get_args(kind)
        return lambda cell, convert=converter(kind): convert(cell) if cell else None
    if kind is datetime.date:
        return datetime.date.fromisoformat
    if kind == tuple[str, ...]:
        return lambda cell: tuple(cell.split(";")) if cell else ()
    return kind
