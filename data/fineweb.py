"""Tokenize text of your own into shards like FineWeb's, as GPT-2 tokens or as bytes.

    python data/fineweb.py --name=mine book.txt a.jsonl    to data/mine, for the track small
    python data/fineweb.py --bytes --name=mine book.txt    the same as bytes, for the track shakespeare

What is a document, each preceded by the token that starts one (50256 of GPT-2, 256 of bytes):
    .txt      the whole file
    .jsonl    the field "text" (--field) of each line
    .parquet  the column "text" (--field) of each row
Files are read in the order given, text is UTF-8. Shard 0 is for validation ({name}_val_000000.bin), the
others for training ({name}_train_000001.bin ...); a document may continue in the next shard. FineWeb itself
comes from data/cached_fineweb10B.py, as such shards.

The same text gives the same bytes for any number of threads, because their results are taken in the order of
the text. Memory is bounded by a few MiB of text per thread, the longest line or row and one shard.
"""
import argparse
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # as a script, Python looks for modules in data/ only
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data.encoding import ByteEncoding, gpt2_encoding
from data.errors import CommandLine, UsageError, run_program
from data.files import data_root, sha256_of
from data.machine import usable_cores
from data.shards import write_shard
from data.texts import check_names, read_texts

SHARD_TOKENS = 100_000_000
VAL_TOKENS = 10_485_761  # what the track small evaluates, and the target of its last token
VAL_BYTES = 262_145  # the same of the track shakespeare
PIECE = 1 << 20  # characters of a piece of work: some 0.1 s of encoding


# ----------------------------------------------------------------------------------------------- encoding


def in_pieces(parts: Iterable[tuple[bool, str]]) -> Iterator[list[tuple[bool, str]]]:
    """Yield the parts of documents in lists of about PIECE characters."""
    piece, size = [], 0
    for begins, text in parts:
        piece.append((begins, text))
        size += 1 + len(text)
        if size >= PIECE:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def encode_piece(piece: list[tuple[bool, str]], encoding) -> np.ndarray:
    """Return the tokens (n,) uint16 of a piece of work."""
    bos = np.array([encoding.bos], dtype=np.uint16)
    tokens = []
    for begins, text in piece:
        if begins:
            tokens.append(bos)
        tokens.append(encoding.encode(text))
    return np.concatenate(tokens)


def encode_all(pieces, encoding, threads: int) -> Iterator[np.ndarray]:
    """Yield encode_piece(piece) of each piece, in order, from so many threads; tiktoken encodes without
    Python's lock. Reading counts as one of them."""
    busy = deque()  # futures of encoded pieces, in order
    with ThreadPoolExecutor(threads) as pool:
        for piece in pieces:
            busy.append(pool.submit(encode_piece, piece, encoding))
            if len(busy) == threads:
                yield busy.popleft().result()
        while busy:
            yield busy.popleft().result()


# ----------------------------------------------------------------------------------------------- writing


def write_shards(encoded: Iterable[np.ndarray], folder: Path, name: str, shard_tokens: int,
                 val_tokens: int) -> list[int]:
    """Write encoded tokens, arrays (n,) uint16, as shards of shard_tokens tokens, and return their sizes.

    Shard 0 has val_tokens, the last one what remains. Raises ShardError, and UsageError, with nothing
    written, if no token is left for training.
    """
    from tqdm import tqdm
    sizes, filled = [], 0
    buffer = np.empty(max(shard_tokens, val_tokens), dtype=np.uint16)

    def flush():
        kind = "train" if sizes else "val"
        path = write_shard(folder / f"{name}_{kind}_{len(sizes):06d}.bin", buffer[:filled])
        tqdm.write(f"{path}: {filled:,} tokens, sha256 {sha256_of(path)}")
        sizes.append(filled)

    for tokens in encoded:
        while len(tokens):
            room = (shard_tokens if sizes else val_tokens) - filled
            if room == 0:  # written only now, when more follows
                flush()
                filled = 0
                continue
            taken = min(room, len(tokens))
            buffer[filled:filled + taken] = tokens[:taken]
            filled += taken
            tokens = tokens[taken:]
    if not sizes:
        raise UsageError(f"expected more than the {val_tokens:,} tokens of the validation shard, so that "
                         f"some are left for training, found {filled:,}; nothing was written: give more "
                         "text, or a smaller --val_tokens")
    flush()
    return sizes


# ----------------------------------------------------------------------------------------------- the command


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Return the arguments, val_tokens with its default, and the folder to write to."""
    parser = CommandLine(__doc__, "python data/fineweb.py")
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help=".txt, .jsonl or .parquet")
    add("--bytes", action="store_true", help="take bytes as tokens, instead of GPT-2's")
    add("--name", default="mine",
        help="name of the shards, and of their folder in data/ under $DATA_PATH (default: %(default)s)")
    add("--field", default="text", help="where .jsonl and .parquet hold the text (default: %(default)s)")
    add("--shard_tokens", type=int, default=SHARD_TOKENS, metavar="N",
        help="tokens per shard (default: %(default)s)")
    add("--val_tokens", type=int, metavar="N",
        help=f"tokens in shard 0, for validation (default: what a track evaluates, {VAL_TOKENS}, or "
             f"{VAL_BYTES} of bytes)")
    add("--threads", type=int, default=usable_cores(), metavar="N",
        help="threads that encode (default: the cores, %(default)s)")

    args = parser.parse_args(argv)
    if args.val_tokens is None:
        args.val_tokens = VAL_BYTES if args.bytes else VAL_TOKENS
    args.folder = data_root() / "data" / args.name
    for option in ("shard_tokens", "val_tokens", "threads"):
        value = getattr(args, option)
        if value < 1:
            raise UsageError(f"expected --{option} of at least 1, found {value}; give a larger number")
    return args


def make_shards(args: argparse.Namespace) -> None:
    """Write the shards that the arguments ask for, and say what they hold and how fast that was."""
    from tqdm import tqdm
    began = time.perf_counter()
    encoding = ByteEncoding() if args.bytes else gpt2_encoding()
    encoded = encode_all(in_pieces(read_texts(args.files, args.field)), encoding, args.threads)
    documents = 0
    with tqdm(unit="tok", unit_scale=True, disable=None) as progress:
        def counted():
            nonlocal documents
            for tokens in encoded:
                documents += np.count_nonzero(tokens == encoding.bos)
                progress.update(len(tokens))
                yield tokens

        sizes = write_shards(counted(), args.folder, args.name, args.shard_tokens, args.val_tokens)

    seconds = time.perf_counter() - began
    print(f"{sum(sizes):,} tokens, {documents:,} documents, {len(sizes)} shards in {seconds:.1f} s: "
          f"{sum(sizes) / seconds:,.0f} tokens/s")
    track = "shakespeare" if args.bytes else "small"
    pattern = args.folder / args.name
    print(f"to train on them: ./run.sh --track={track} --train_files='{pattern}_train_*.bin' "
          f"--val_files='{pattern}_val_*.bin'")


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    check_names(args.files)
    pattern = f"{args.name}_*_*.bin"
    if earlier := len(list(args.folder.glob(pattern))):  # a shorter run would leave some, and train on them
        raise UsageError(f"{args.folder}: expected no shards named {args.name}, found {earlier}; remove "
                         "them, or choose another --name")
    try:
        make_shards(args)
    except UsageError as error:
        kept = len(list(args.folder.glob(pattern)))
        raise UsageError(f"{error} ({kept} whole shards in {args.folder} are kept)") if kept else error
    except KeyboardInterrupt:
        advice = f"whole shards in {args.folder} are kept; remove them to start again"
        raise KeyboardInterrupt(advice) from None


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
