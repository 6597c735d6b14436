"""record.json: what the folder of a record claims, and the logs that it rests on.

`python -m records.schema` prints the JSON schema. A Statement is what a person says; all else in a Record is
computed from the logs, and `verify` computes it again.

Losses are nats per token with 5 decimals, times training milliseconds with 1, probabilities have 3
significant digits. null is a number that the logs do not hold, or not a finite one."""
import datetime
import json
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic import ValidationError, model_validator

from data.errors import UsageError
from records import logs
from records.tracks import TRACKS

FILE = logs.RECORD_FILE
SIZE_LIMIT = 1 << 22  # bytes of a record.json; 1,000 logs take about a third of that

def one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("one line without control characters is wanted")
    return text


def iso_date(value):
    if isinstance(value, str) and not re.fullmatch(r"\d{4}-\d\d-\d\d", value, re.A):
        raise ValueError("a date like 2026-11-24 is wanted")
    return value


Line = Annotated[str, StringConstraints(min_length=1, max_length=500), AfterValidator(one_line)]
NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
Name = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
FOLDER_NAME = rf"[0-9]{{4}}-[0-9][0-9]-[0-9][0-9]_{NAME}"
FolderName = Annotated[str, StringConstraints(pattern=f"^{FOLDER_NAME}$")]
LOG_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
LogName = Annotated[str, StringConstraints(pattern=f"^{LOG_NAME}$")]  # of a file in its folder
PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,60}"
SourceName = Annotated[str, StringConstraints(pattern=rf"^{PART}(/{PART}){{0,3}}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=10**15)]
Number = Annotated[float, Field(ge=-1e15, le=1e15)]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RunEntry(Model):
    run_id: Line = Field(description="stem of the log's name; #k for the k-th of several runs in it")
    seed: int | None = Field(ge=-10**18, le=10**18)
    step: Count | None = Field(description="the claimed step, or the last validation where none is claimed")
    loss: Number | None = Field(description="validation loss at that step")
    time_ms: Number | None = Field(description="training time at that step")


class LogEntry(Model):
    file: LogName
    sha256: Sha256
    runs: list[RunEntry]


class GroupSummary(Model):
    """Mean and sample standard deviation of the runs of one recipe at the claimed step."""
    n: Count
    step: Count | None = Field(description="null where the runs differ")
    loss_mean: Number | None
    loss_sd: Number | None
    time_ms_mean: Number | None
    time_ms_sd: Number | None
    logs: list[LogEntry]


class LossTest(Model):
    """The loss rule of the track on all runs."""
    rule: Literal["t_test", "z_rule"]
    target: Number
    alpha: Number = Field(description="probability allowed to a false claim")
    p: Number | None
    passes: bool


class Speed(Model):
    """Runs against baseline: mean training time of the runs less that of the baseline, by Welch's test."""
    difference_ms: Number | None
    low_ms: Number | None = Field(description="95 % interval")
    high_ms: Number | None
    p: Number | None = Field(description="one-sided: that the runs are faster")


class Statement(Model):
    """What a person says of a submission."""
    version: Literal[1] = 1
    track: Literal[tuple(TRACKS)]
    name: Name
    date: Annotated[datetime.date, Field(strict=False), BeforeValidator(iso_date)]
    kind: Literal["record", "non-record"]
    why_no_record: Line | None = Field(description="null for a record")
    description: Line
    contributors: list[Line]
    step: Count | None = Field(
        description="whose validation counts, in a track that wants it stated; null: the last")
    planned_runs: Annotated[int, Field(ge=1, le=10_000)] | None = Field(
        description="runs planned before the first one")
    waivers: dict[Name, Line] = Field(description="reasons to accept a failure, by rule of `check`")
    baseline_record: FolderName | None = Field(
        description="folder of the record, of the same track, whose runs are the baseline; null: it lies in "
                    "baseline/")
    excluded: dict[LogName, Line] = Field(description="reasons to leave a log out, by log")

    @model_validator(mode="after")
    def kinds(self):
        if (self.kind == "record") != (self.why_no_record is None):
            raise ValueError("why_no_record is wanted of a non-record, and only there")
        return self

    @property
    def folder(self) -> str:
        """Path below records/."""
        return f"{TRACKS[self.track].folder}/{self.date}_{self.name}"


class Record(Statement):
    """A folder records/<folder of the track>/<date>_<name>/: what a person says, and what the logs say."""
    hardware: Line | None = Field(description="null, as torch and world_size, where the runs differ or do "
                                              "not say")
    torch: Line | None
    world_size: Count | None
    runs: GroupSummary
    loss_test: LossTest
    baseline: GroupSummary | None
    speed: Speed | None
    excluded_logs: list[LogEntry]
    sources: dict[SourceName, Sha256] = Field(description="files that the logs of the runs embed")

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


def read(path) -> Record:
    """The record.json at a path. UsageError, naming what is wrong first, where it is not one."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            text = file.read(SIZE_LIMIT + 1)
    except OSError as e:
        raise UsageError(f"{path}: expected a readable file, found: {e.strerror}; check the path") from None
    if len(text) > SIZE_LIMIT:
        raise UsageError(f"{path}: expected at most {SIZE_LIMIT:,} bytes, found more; it is not written by "
                         "pack")
    return parse(text, path)


def parse(data: str | bytes | dict, what="record.json", kind=Record):
    """A Record, or a Statement, from its JSON or from values. UsageError with the first problem."""
    try:
        return kind.model_validate(data) if isinstance(data, dict) else kind.model_validate_json(data)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        where = f" at {ascii('.'.join(map(str, first['loc'])))[1:-1][:100]}" if first["loc"] else ""
        raise UsageError(f"{what}: expected what the schema of a record asks for{where}, found: "
                         f"{first['msg']}; see python -m records.schema") from None


if __name__ == "__main__":
    print(json.dumps(Record.model_json_schema(), indent=2))
