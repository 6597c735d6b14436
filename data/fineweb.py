"""Tokenize text into shards: FineWeb from the hub, or text of your own, as GPT-2 tokens or as bytes.

    python -m data.fineweb                               FineWeb's 10 B token sample, to data/fineweb10B
    python -m data.fineweb --shards=6                    the same, only the first 6 shards
    python -m data.fineweb --name=mine book.txt a.jsonl  your own text, to data/mine, for the track small
    python -m data.fineweb --bytes --name=mine book.txt  the same as bytes, for the track shakespeare

What is a document, each preceded by the token that starts one (50256 of GPT-2, 256 of bytes):
    .txt      the whole file; with --split, each block of lines between blank lines
    .jsonl    the field "text" (--field) of each line
    .parquet  the column "text" (--field) of each row
Files are read in the order given, text is UTF-8. Shard 0 is for validation ({name}_val_000000.bin), the
others for training ({name}_train_000001.bin ...); a document may continue in the next shard, as in the shards
published upstream.

The same text gives the same bytes for any number of processes: this process reads, the others encode, and
results are taken in the order of the text. Memory is bounded by a few MiB of text per process, the longest
document and one shard.
"""
import argparse
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # as a script, Python looks for modules in data/ only
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data.encoding import ByteEncoding, gpt2_encoding
from data.errors import UsageError, run_program
from data.fetch import FetchError, fetch_hub, hub_errors
from data.files import data_root, sha256_of
from data.shards import write_shard
from data.texts import JsonLines, TextError, check_names, parse_lines, parts_of, read_texts

REPO = "HuggingFaceFW/fineweb"
FOLDER = "sample/10BT"  # of the hub dataset: about 10 B tokens in 15 parquet files of 2 GB
SHARD_TOKENS = 100_000_000
VAL_TOKENS = 10_485_761  # of your own text: what the track small evaluates, and the target of its last token
VAL_BYTES = 262_145  # the same of the track shakespeare
IN_FLIGHT = 4  # pieces of work per process that are read ahead; more would only cost memory


# ------------------------------------------------------------------------------------------------ encoding

encoding_here = None  # of this process; set once, because sending it along with every piece would be slow


def start_encoding(encoding) -> None:
    global encoding_here
    encoding_here = encoding


def start_worker(encoding) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent alone decides
    start_encoding(encoding)


def encode_piece(piece) -> tuple[np.ndarray, int]:
    """Encode one piece of work. Returns its tokens (n,) uint16, and the number of documents begun in it."""
    texts, continues = piece
    if isinstance(texts, JsonLines):
        texts = parse_lines(texts)
    bos = np.array([encoding_here.bos], dtype=np.uint16)
    tokens = []
    for text in texts:
        tokens.append(bos)
        for part in parts_of(text):
            tokens.append(encode_text(part))
    if continues:  # the document was begun before
        tokens = tokens[1:]
    joined = np.concatenate(tokens) if tokens else bos[:0]
    return joined, len(texts) - continues


def encode_text(text: str) -> np.ndarray:
    """Encode a text; half a surrogate pair, which JSON can express, becomes the replacement character."""
    try:
        return encoding_here.encode(text)
    except UnicodeEncodeError:
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return encoding_here.encode(whole)


def encode_all(pieces, encoding, processes: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield encode_piece(piece) of each piece, in order, computed by so many processes (1: this one)."""
    if processes == 1:
        start_encoding(encoding)
        yield from map(encode_piece, pieces)
        return
    # spawn, because fork copies locks that other threads (Arrow, progress bars) may hold at that moment
    spawn = get_context("spawn")
    pool = ProcessPoolExecutor(processes, spawn, initializer=start_worker, initargs=(encoding,))
    waiting = deque()
    try:
        for piece in pieces:
            waiting.append(pool.submit(encode_piece, piece))
            if len(waiting) >= IN_FLIGHT * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise TextError(f"expected {processes} working processes, found one that was ended from outside; it "
                        "may have run out of memory: start again with fewer --processes") from None
    finally:
        pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------------ writing

def shard_path(folder, name: str, index: int) -> Path:
    return Path(folder, f"{name}_{'train' if index else 'val'}_{index:06d}.bin")


def write_shards(encoded, folder, name: str, shard_tokens: int, val_tokens: int,
                 max_shards: int | None = None, progress=None) -> tuple[list[int], int]:
    """Write encoded, an iterator of (tokens (n,) uint16, documents), as shards of shard_tokens tokens.

    Shard 0 has val_tokens, the last one what remains. Stops after max_shards. progress.update(n) is told of n
    new tokens. Returns the sizes of the shards in tokens, and the number of documents read. Raises
    ShardError, and UsageError, with nothing written, if no token is left for training though max_shards
    allows for it.
    """
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
            if room == 0:  # written only now, when more follows
                flush()
                filled = 0
                if len(sizes) == max_shards:
                    return sizes, documents
                continue
            taken = min(room, len(tokens))
            buffer[filled:filled + taken] = tokens[:taken]
            filled += taken
            tokens = tokens[taken:]
            if progress is not None:
                progress.update(taken)
    if not filled:
        raise UsageError("expected text, found none; nothing was written")
    if not sizes and max_shards != 1:
        raise UsageError(f"expected more than the {val_tokens:,} tokens of the validation shard, so that "
                         f"some are left for training, found {filled:,}; nothing was written: give more "
                         f"text, or --val_tokens below {filled:,}")
    flush()
    return sizes, documents


def hub_texts(folder: Path) -> Iterator[tuple]:
    """Yield pieces of FineWeb's sample. One parquet file of 2 GB at a time is on disk, in a hidden folder."""
    from huggingface_hub import HfApi
    with hub_errors(f"the list of files in {FOLDER} of {REPO}"):
        # The revision first: it is what the output depends on, and it fails at once where the list would try
        # for long.
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


# ------------------------------------------------------------------------------------------------ the command

def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Return the arguments with their dependent defaults: out (a folder) and val_tokens."""
    parser = argparse.ArgumentParser(prog="data.fineweb", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("files", nargs="*", metavar="FILE", help=".txt, .jsonl or .parquet (default: FineWeb from the hub)")
    add("--bytes", action="store_true", help="the bytes of FILE... as tokens, instead of GPT-2's")
    add("--name", default="fineweb",
        help="prefix of the shards, and for FILE... also the folder in data/ (default: %(default)s)")
    add("--out", type=Path, metavar="FOLDER",
        help="where to write (default: data/fineweb10B, or data/NAME for FILE..., under $DATA_PATH)")
    add("--field", default="text", help="where .jsonl and .parquet hold the text (default: %(default)s)")
    add("--split", action="store_true", help="a blank line in .txt files ends a document")
    add("--shard_tokens", type=int, default=SHARD_TOKENS, metavar="N",
        help="tokens per shard (default: %(default)s)")
    add("--val_tokens", type=int, metavar="N", help="tokens in shard 0, for validation (default: "
                                                    "SHARD_TOKENS; for FILE... what a track evaluates, "
                                                    f"{VAL_TOKENS}, or {VAL_BYTES} of bytes)")
    add("--shards", type=int, metavar="N",
        help="stop after N shards, validation included (default: all text)")
    add("--processes", type=int, default=cores, metavar="N",
        help="that encode (default: the cores, %(default)s)")
    add("--overwrite", action="store_true",
        help="delete earlier shards of the same name in that folder first")

    args = parser.parse_args(argv)
    for option in ("shard_tokens", "val_tokens", "shards", "processes"):
        value = getattr(args, option)
        if value is not None and value < 1:
            parser.error(f"expected --{option} of at least 1, found {value}; give a larger number")
    if args.bytes and not args.files:
        parser.error("expected FILE... with --bytes, found none; name the text to turn into bytes")
    if args.out is None:
        args.out = data_root() / "data" / (args.name if args.files else "fineweb10B")
    if args.val_tokens is None and args.files:
        args.val_tokens = VAL_BYTES if args.bytes else VAL_TOKENS
    return args


def make_shards(args: argparse.Namespace) -> None:
    """Write the shards that the arguments ask for, and say what they hold and how fast that was."""
    from tqdm import tqdm
    encoding = ByteEncoding() if args.bytes else gpt2_encoding()
    for path in shards_named(args):
        path.unlink()
    began = time.perf_counter()
    pieces = read_texts(args.files, args.field, args.split) if args.files else hub_texts(args.out)
    with (tqdm(unit="tok", unit_scale=True, disable=None) as progress,
          closing(encode_all(pieces, encoding, args.processes)) as encoded):
        sizes, documents = write_shards(encoded, args.out, args.name, args.shard_tokens,
                                        args.val_tokens or args.shard_tokens, args.shards, progress)
    seconds = time.perf_counter() - began
    shutil.rmtree(args.out / ".hub", ignore_errors=True)
    rate = sum(sizes) / seconds
    print(f"{sum(sizes):,} tokens, {documents:,} documents, {len(sizes)} shards in {seconds:.1f} s: "
          f"{rate:,.0f} tokens/s, {rate / args.processes:,.0f} per process ({args.processes})")
    if args.files:
        track = "shakespeare" if args.bytes else "small"
        print(f"to train on them: ./run.sh --track={track} "
              f"--train_files='{args.out / args.name}_train_*.bin' "
              f"--val_files='{args.out / args.name}_val_*.bin'")


def shards_named(args: argparse.Namespace) -> list[Path]:
    """Return the shards of this name that are in the folder."""
    return sorted([*args.out.glob(f"{args.name}_train_*.bin"), *args.out.glob(f"{args.name}_val_*.bin")])


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    check_names(args.files)
    earlier = shards_named(args)
    if earlier and not args.overwrite:  # a shorter run would leave some of them, and both would be trained on
        raise UsageError(f"{args.out}: expected no shards named {args.name}, found {len(earlier)}; choose "
                         "another --name or --out, or replace them with --overwrite")
    try:
        make_shards(args)
    except UsageError as error:
        kept = len(shards_named(args))
        raise UsageError(f"{error} ({kept} whole shards in {args.out} are kept)") if kept else error
    except KeyboardInterrupt:
        advice = f"whole shards in {args.out} are kept, start again with --overwrite"
        raise KeyboardInterrupt(advice) from None


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
