"""Read text files as documents: .txt, .jsonl and .parquet.

A document comes as parts of bounded size, each a pair (begins, text): whether the document begins with it,
and UTF-8 text that can be tokenized on its own.
"""
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from data.errors import UsageError

SUFFIXES = (".txt", ".jsonl", ".parquet")
LONGEST = 1 << 20  # characters of a part: without white space the tokenizer takes 50 bytes for each
LOOK_BACK = 4096  # characters at the end of a part among which a place to cut is looked for

# Every token of GPT-2 that contains white space has it in front, so that no token spans a change from another
# character to white space: text may be cut there without changing a single token. The set is the white space
# that Python and the tokenizer agree on.
CUT = re.compile(r"(?<=\S)[ \t\r\n]")
HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair, which JSON can express and UTF-8 cannot


def check_names(files) -> None:
    """Raise UsageError for a file that is missing or of another format, before any work is done."""
    for file in map(Path, files):
        if file.suffix not in SUFFIXES:
            raise UsageError(f"{file}: expected a name ending in .txt, .jsonl or .parquet, found another; "
                             "convert or rename it")
        if not file.is_file():
            raise UsageError(f"{file}: expected a text file, found none of that name; correct it")


def read_texts(paths, field: str = "text") -> Iterator[tuple[bool, str]]:
    """Yield the parts of all documents, file by file. A .txt file is one document; each line of a .jsonl file
    and each row of a .parquet file has one in `field`. Raises UsageError."""
    for path in map(Path, paths):
        try:
            if path.suffix == ".txt":
                yield from bounded_parts(line for _, line in lines_of(path))
                continue
            rows = json_values(path, field) if path.suffix == ".jsonl" else parquet_values(path, field)
            for where, text in rows:
                if not isinstance(text, str):
                    found = "nothing" if text is None else type(text).__name__
                    raise UsageError(f"{path}, {where}: expected text in \"{field}\", found {found}; correct "
                                     "or remove it, or name another field with --field")
                yield from bounded_parts([HALF.sub("\ufffd", text)])
        except OSError as error:
            raise UsageError(f"{path}: expected a readable file, found \"{error.strerror or error}\"; "
                             "correct the name or its permissions") from error


def bounded_parts(document: Iterable[str]) -> Iterator[tuple[bool, str]]:
    """Yield a document, given in chunks of any size, in parts of at most LONGEST characters. They are cut
    where no token changes, unless there is no such place."""
    begins, rest = True, ""
    for chunk in document:
        rest += chunk
        start = 0
        while len(rest) - start > LONGEST:
            cut = last_cut(rest, start, start + LONGEST)
            yield begins, rest[start:cut]
            begins, start = False, cut
        rest = rest[start:]
    yield begins, rest


def last_cut(text: str, start: int, end: int) -> int:
    """Return the last place near the end of text[start:end] at which a cut changes no token, else the end."""
    places = CUT.finditer(text, max(start + 1, end - LOOK_BACK), end)
    return max((match.start() for match in places), default=end)


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line with its end) of a UTF-8 file. Raises UsageError."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                # Some editors put a byte-order mark before UTF-8.
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UsageError(f"{path}, line {number}: expected UTF-8 text, found byte "
                                 f"0x{line[error.start]:02x}; convert the file to UTF-8 (iconv) or remove "
                                 "the line") from None


def json_values(path: Path, field: str) -> Iterator[tuple[str, object]]:
    """Yield (where it is, value of the field) of each line that is not blank. Raises UsageError."""
    for number, line in lines_of(path):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            found = getattr(error, "msg", error)  # of JSONDecodeError, without its position in the line
            raise UsageError(f"{path}, {where}: expected a JSON object, found \"{found}\"; correct or remove "
                             "the line") from None
        yield where, row.get(field) if isinstance(row, dict) else None


def parquet_values(path: Path, field: str) -> Iterator[tuple[str, object]]:
    """Yield (where it is, value in the column) of each row. Raises UsageError."""
    import pyarrow
    import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise UsageError(f"{path}: expected a column \"{field}\", found columns {', '.join(names)}; "
                                 "name the one that holds the text with --field")
            row = 0
            for batch in file.iter_batches(batch_size=64, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield f"row {row}", value
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected a parquet file with UTF-8 text, found "
                         f"\"{str(error).splitlines()[0]}\"; it is damaged or of another format, make or "
                         "fetch it again") from error
