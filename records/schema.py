"""record.json: what a person says of the runs in the folder of a record, and what its logs say.

A Statement is the former. All else in the file is computed from the logs by pack and verify, and never read.
"""
import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic import model_validator

from data.errors import UsageError
from records import logs
from records.tracks import TRACKS

FILE = logs.RECORD_FILE
SIZE_LIMIT = 1 << 22  # bytes of a record.json; 1,000 logs take about a third of that


def one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("one line without control characters is wanted")
    return text


def calendar_day(text: str) -> str:
    datetime.date.fromisoformat(text)
    return text


Line = Annotated[str, StringConstraints(min_length=1, max_length=500), AfterValidator(one_line)]
NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
Name = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
DAY = "[0-9]{4}-[0-9][0-9]-[0-9][0-9]"
Day = Annotated[str, StringConstraints(pattern=f"^{DAY}$"), AfterValidator(calendar_day)]
FOLDER_NAME = f"{DAY}_{NAME}"
FolderName = Annotated[str, StringConstraints(pattern=f"^{FOLDER_NAME}$")]
LOG_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"


class Statement(BaseModel):
    """What a person says of a submission."""
    model_config = ConfigDict(frozen=True, strict=True)
    version: Literal[1] = 1
    track: Literal[tuple(TRACKS)]
    name: Name
    date: Day
    kind: Literal["record", "non-record"]
    why_no_record: Line | None  # None for a record
    description: Line
    contributors: list[Line]
    # whose validation counts, in a track that wants it stated; None: the last
    step: Annotated[int, Field(ge=0, le=10**15)] | None
    planned_runs: Annotated[int, Field(ge=1, le=10_000)] | None  # planned before the first one
    waivers: dict[Name, Line]  # reasons to accept a failure, by rule of check
    # folder of the record, of the same track, whose runs are the baseline; None: it lies in baseline/
    baseline_record: FolderName | None

    @model_validator(mode="after")
    def kinds(self):
        if (self.kind == "record") != (self.why_no_record is None):
            raise ValueError("why_no_record is wanted of a non-record, and only there")
        return self

    @property
    def folder(self) -> str:
        """Path below records/."""
        return f"{TRACKS[self.track].folder}/{self.date}_{self.name}"


def read(path: Path) -> Statement:
    """Return what a person says in a record.json. UsageError names what is wrong first."""
    try:
        with open(path, "rb") as file:
            text = file.read(SIZE_LIMIT + 1)
    except OSError as e:
        raise UsageError(f"{path}: expected a readable file, found: {e.strerror}; check the path") from None
    if len(text) > SIZE_LIMIT:
        raise UsageError(f"{path}: expected at most {SIZE_LIMIT:,} bytes, found more; it is not written by "
                         "pack")
    return parse(text, path)


def parse(data: bytes | dict, what) -> Statement:
    """A Statement from the JSON of a record or from values. UsageError with the first problem."""
    validate = Statement.model_validate if isinstance(data, dict) else Statement.model_validate_json
    try:
        return validate(data)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        where = f" at {ascii('.'.join(map(str, first['loc'])))[1:-1][:100]}" if first["loc"] else ""
        raise UsageError(f"{what}: expected what a record states{where}, found: {first['msg']}; see "
                         "Statement in records/schema.py") from None
