"""Read text files as documents, in pieces that several processes can encode: .txt, .jsonl and .parquet.

A piece of work is (texts, continues): encode the texts, each a document, except that with `continues` the
first one goes on with the document before. JSON is parsed by the encoding processes, because here it would
hold many cores up. JSON lines have a reader of our own, because pyarrow's does not name the line of an error.
"""
import codecs
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data.errors import UsageError

SUFFIXES = (".txt", ".jsonl", ".parquet")
BLOCK = 1 << 20  # bytes of text per piece: some 0.1 s of encoding, so handing it over costs next to nothing
LONGEST = 4 << 20  # characters without white space that stay together: tokenizing takes 50 bytes for each
LOOK_BACK = 4096  # characters at the end of a block among which a place to cut is looked for

# Every token of GPT-2 that contains white space has it in front, so that no token spans a change from another
# character to white space: text may be cut there without changing a single token. The set is the white space
# that Python and the tokenizer agree on.
CUT = re.compile(r"(?<=\S)[ \t\r\n]")


class JsonLines(NamedTuple):
    """Some whole lines of a .jsonl file, which stand for the texts in them."""
    path: Path
    first_line: int  # counted from 1
    field: str
    block: bytes


class TextError(UsageError):
    """Text that cannot be tokenized; the message names the file and the line and says what to do next."""


def check_names(files) -> None:
    """Raise TextError for a file that is missing or of another format, before any work is done."""
    for file in map(Path, files):
        if file.suffix not in SUFFIXES:
            raise TextError(f"{file}: expected a name ending in .txt, .jsonl or .parquet, found another; "
                            "convert or rename it")
        if not file.is_file():
            raise TextError(f"{file}: expected a text file, found none of that name; correct it")


def read_texts(paths, field: str = "text", split: bool = False) -> Iterator[tuple]:
    """Yield pieces of work, some BLOCK bytes each, from files in the order given. Raises TextError."""
    for path in map(Path, paths):
        try:
            if path.suffix == ".txt":
                yield from blocks_of_lines(path) if split else one_document(path)
            elif path.suffix == ".jsonl":
                for first_line, block in whole_lines(path):
                    yield JsonLines(path, first_line, field, block), False
            else:
                yield from parquet_rows(path, field)
        except OSError as error:
            raise TextError(f"{path}: expected a readable file, found \"{error.strerror or error}\"; correct "
                            "the name or its permissions") from error


# ----------------------------------------------------------------------------------------------- where to cut

def last_cut(text: str) -> int:
    """Return the last place near the end of a text at which a cut changes no token; 0 if there is none."""
    places = CUT.finditer(text, max(0, len(text) - LOOK_BACK))
    return max((match.start() for match in places), default=0)


def parts_of(text: str) -> Iterator[str]:
    """Yield a text in parts of at most LONGEST characters, cut where no token changes if it can be."""
    start = 0
    while len(text) - start > LONGEST:
        part = text[start:start + LONGEST]
        part = part[:last_cut(part) or LONGEST]
        yield part
        start += len(part)
    yield text[start:]


# ------------------------------------------------------------------------------------------------ .txt

def whole_lines(path) -> Iterator[tuple[int, bytes]]:
    """Yield (number of the first line, bytes) with about BLOCK bytes of whole lines."""
    line = 1
    with open(path, "rb") as file:
        if file.read(3) != codecs.BOM_UTF8:  # the byte-order mark that some editors put before UTF-8
            file.seek(0)
        while block := file.read(BLOCK):
            block += file.readline()
            yield line, block
            line += block.count(b"\n")


def not_utf8(path, first_line: int, error: UnicodeDecodeError) -> TextError:
    """Return the error for bytes of a file that begin in line `first_line` and are not UTF-8."""
    line = first_line + error.object.count(b"\n", 0, error.start)
    byte = error.object[error.start]
    return TextError(f"{path}, line {line}: expected UTF-8 text, found byte 0x{byte:02x}; convert the file "
                     "to UTF-8 (iconv) or remove the line")


def decode(path, first_line: int, block: bytes) -> str:
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(path, first_line, error) from None


def one_document(path) -> Iterator[tuple[list[str], bool]]:
    """Yield a whole file as one document, in pieces that give the tokens of the whole."""
    rest, continues, line = "", False, 1
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with open(path, "rb") as file:
        while True:
            block = file.read(BLOCK)
            try:
                rest += decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise not_utf8(path, line, error) from None
            if not block:
                break
            line += block.count(b"\n")
            cut = last_cut(rest)
            if not cut and len(rest) >= LONGEST:  # no white space in sight: memory counts more than one token
                cut = len(rest)
            if cut:
                yield [rest[:cut]], continues
                rest = rest[cut:]
                continues = True
    if rest:
        yield [rest], continues


def blocks_of_lines(path) -> Iterator[tuple[list[str], bool]]:
    """Yield each block of lines between blank lines as a document, without its last line end."""
    texts, size, lines = [], 0, []
    for first_line, block in whole_lines(path):
        text = decode(path, first_line, block)
        for line in io.StringIO(text):  # not splitlines, which knows a dozen line ends
            if line.strip():
                lines.append(line)
                size += len(line)
            elif lines:
                texts.append("".join(lines).rstrip("\r\n"))
                lines = []
        if size >= BLOCK:
            yield texts, False
            texts, size = [], 0
    if lines:
        texts.append("".join(lines).rstrip("\r\n"))
    if texts:
        yield texts, False


# ------------------------------------------------------------------------------------------- .parquet, .jsonl

def parquet_rows(path, field: str) -> Iterator[tuple[list[str], bool]]:
    """Yield the rows of a parquet file as documents; an error names the row, counted from 1."""
    import pyarrow
    import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            check_column(path, file.schema_arrow, field)
            texts, size, row = [], 0, 0
            for batch in file.iter_batches(batch_size=64, columns=[field]):
                if batch.column(0).null_count:
                    bad = row + 1 + batch.column(0).is_null().to_pylist().index(True)
                    raise TextError(f"{path}, row {bad}: expected text in \"{field}\", found nothing (null); "
                                    "remove the row or fill it")
                texts += batch.column(0).to_pylist()
                row += len(batch)
                size += batch.nbytes
                if size >= BLOCK:
                    yield texts, False
                    texts, size = [], 0
            if texts:
                yield texts, False
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise TextError(f"{path}: expected a parquet file with UTF-8 text, found "
                        f"\"{str(error).splitlines()[0]}\"; it is damaged or of another format, make or "
                        "fetch it again") from error


def check_column(path, schema, field: str) -> None:
    """Raise TextError unless the schema of a parquet file has a column of strings with this name."""
    import pyarrow
    if field not in schema.names:
        found = f"columns {', '.join(schema.names)}"
    elif schema.field(field).type not in (pyarrow.string(), pyarrow.large_string()):
        found = f"one of {schema.field(field).type}"
    else:
        return
    raise TextError(f"{path}: expected a column \"{field}\" of strings, found {found}; name the column that "
                    "holds the text with --field")


def parse_lines(lines: JsonLines) -> list[str]:
    """Return the texts in some lines of a .jsonl file. Raises TextError."""
    path, first_line, field, block = lines
    texts = []
    for number, line in enumerate(decode(path, first_line, block).split("\n"), first_line):
        if not line.strip():
            continue  # the end of the last line; also harmless blank lines
        try:
            text = json.loads(line)[field]
            if isinstance(text, str):
                texts.append(text)
                continue
            found = f"{type(text).__name__} in \"{field}\""
        except json.JSONDecodeError as error:
            found = f"\"{error.msg}\" at column {error.colno}"
        except RecursionError:
            found = "brackets nested too deeply"
        except KeyError:
            found = "no such field"
        except TypeError:
            found = "something that is not an object"
        except ValueError:
            found = "a number of too many digits"
        raise TextError(f"{path}, line {number}: expected a JSON object with text in \"{field}\", found "
                        f"{found}; correct or remove the line, or name another field with --field")
    return texts
