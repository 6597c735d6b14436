"""The shard format: token files that the trainer maps into memory.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, token count, zeros) followed by exactly
that many little-endian uint16 token ids. A document begins with the beginning-of-sequence id: 50256 for GPT-2 tokens,
256 for bytes. The format is the one of llm.c and modded-nanogpt, so their FineWeb shards can be read as they are.

    python data/shards.py FILE...     what is in these files: tokens, documents, lengths, first text, SHA-256

Imports numpy and the standard library only, because the trainer imports this file.
"""

import argparse
import hashlib
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # Python put data/ first; `data` itself must be found

import numpy as np

from data.errors import UsageError
from data.files import written_whole

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024  # 256 int32
TOKEN_DTYPE = np.dtype("<u2")  # little-endian on disk on every machine
MAX_TOKENS = 2**31 - 1  # the header holds the count as int32
BYTE_BOS = 256  # starts a document in a byte shard; ids 0-255 are the bytes themselves
GPT2_BOS = 50256  # <|endoftext|>
CHUNK = 1 << 22  # tokens looked at in one go: 8 MiB, so that scanning a mapped shard never needs a second copy of it


def data_root() -> Path:
    """The folder in which data/ lies: $DATA_PATH, or the repository."""
    return Path(os.environ.get("DATA_PATH") or Path(__file__).resolve().parent.parent)


class ShardError(UsageError):
    """A file is not a shard that can be used; the message says what was expected, what was found, what to do next."""


def write_shard(path, tokens) -> Path:
    """Write a shard that appears under its name complete, or not at all.
    path: file name, its folder is made if needed. tokens: (n,) integers in 0..65535, n >= 1. Returns the path.
    Raises ShardError for tokens that do not fit the format and for a disk that refuses (full, read-only)."""
    path, tokens = Path(path), np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not 1 <= tokens.size <= MAX_TOKENS:
        raise ShardError(f"{path}: expected a flat array of 1 to {MAX_TOKENS:,} integer token ids, found shape "
                         f"{tokens.shape} of {tokens.dtype}; nothing was written, pass the ids of one shard")
    if tokens.dtype != TOKEN_DTYPE:
        for first in range(0, tokens.size, CHUNK):
            chunk = tokens[first:first + CHUNK]
            bad = np.flatnonzero((chunk < 0) | (chunk > 65535))
            if bad.size:
                raise ShardError(f"{path}: expected token ids in 0..65535, found {chunk[bad[0]]} at position "
                                 f"{first + bad[0]:,}; nothing was written, use a vocabulary that fits 16 bits")
        tokens = tokens.astype(TOKEN_DTYPE)
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    try:
        with written_whole(path) as file:
            file.write(header.data)
            file.write(np.ascontiguousarray(tokens).data)
    except OSError as error:
        raise ShardError(f"{path}: expected to write {HEADER_BYTES + 2 * tokens.size:,} bytes, found "
                         f"\"{error.strerror or error}\"; nothing was left behind, free some space or choose another "
                         f"folder with DATA_PATH") from error
    return path


def num_tokens(path) -> int:
    """The number of tokens in a shard, after checking that the file is one and whole: magic, version, count, size.
    Reads only the header. Raises ShardError for a file that is missing, empty, cut short, too long or something else.
    """
    path, again = Path(path), "run the script in data/ that makes it again"
    try:
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise ShardError(f"{path}: expected a token shard, found no such file; {again}, or correct the name") from None
    except OSError as error:
        raise ShardError(f"{path}: expected a readable token shard, found \"{error.strerror}\"; correct its name or "
                         f"permissions") from error
    if size == 0:
        raise ShardError(f"{path}: expected a token shard, found an empty file; delete it and {again}")
    if len(head) >= 4 and int.from_bytes(head[:4], "little", signed=True) != MAGIC:
        found = int.from_bytes(head[:4], "little", signed=True)
        raise ShardError(f"{path}: expected magic {MAGIC}, found {found}; this is not a token shard: give a file made "
                         f"by a script in data/")
    if len(head) < HEADER_BYTES:
        raise ShardError(f"{path}: expected a header of {HEADER_BYTES} bytes, found a file of {size}; it is cut short, "
                         f"delete it and {again}")
    _, version, count = np.frombuffer(head, dtype="<i4")[:3].tolist()
    if version != VERSION:
        raise ShardError(f"{path}: expected shard version {VERSION}, found {version}; {again} with this repository")
    if count < 1:
        raise ShardError(f"{path}: expected a token count of at least 1 in the header, found {count}; delete it and "
                         f"{again}")
    expected = HEADER_BYTES + TOKEN_DTYPE.itemsize * count
    if size != expected:
        if size < expected:
            why = "it is cut short"
        elif (size - HEADER_BYTES) % count == 0:
            why = f"it holds {(size - HEADER_BYTES) // count} bytes per token instead of {TOKEN_DTYPE.itemsize}"
        else:
            why = "it has foreign bytes at its end"
        raise ShardError(f"{path}: expected {expected:,} bytes for {count:,} tokens, found {size:,}; {why}, delete it "
                         f"and {again}")
    return count


def open_shard(path) -> np.memmap:
    """A validated shard as a read-only (n,) uint16 array, mapped and not read: pages come in as they are touched.
    Raises ShardError as num_tokens does."""
    return np.memmap(path, dtype=TOKEN_DTYPE, mode="r", offset=HEADER_BYTES, shape=(num_tokens(path),))


def document_starts(tokens, bos: int) -> np.ndarray:
    """Positions of the id `bos` in tokens (n,), ascending, as int64 (documents,)."""
    found = [first + np.flatnonzero(tokens[first:first + CHUNK] == bos) for first in range(0, len(tokens), CHUNK)]
    return np.concatenate(found).astype(np.int64, copy=False) if found else np.zeros(0, dtype=np.int64)


def check_ids(tokens, vocab_size: int, path) -> None:
    """Raise ShardError naming the first position and id in tokens (n,) that is not below vocab_size.
    path only names the file in the message. One pass at memory speed."""
    for first in range(0, len(tokens), CHUNK):
        chunk = tokens[first:first + CHUNK]
        if chunk.max() >= vocab_size:
            at = int(np.argmax(chunk >= vocab_size))
            raise ShardError(f"{path}: expected token ids below the vocabulary size {vocab_size:,}, found "
                             f"{int(chunk[at])} at position {first + at:,}; these tokens are of another vocabulary, "
                             f"choose the data or the track that fits")


def sha256_of(path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _first_text(ids, bos: int, characters: int = 200) -> str:
    """The beginning of a shard as one readable line."""
    if bos == BYTE_BOS:
        text = bytes(i for i in ids.tolist() if i < 256).decode("utf-8", errors="replace")
    else:
        from data.fineweb import gpt2_encoding  # here, not above: the trainer must not need tiktoken to read shards
        try:
            encoding = gpt2_encoding(network=False)
        except (ImportError, OSError, ValueError) as error:
            return f"(ids {' '.join(map(str, ids[:8].tolist()))} ...; as text they need the GPT-2 vocabulary: {error})"
        text = encoding.decode([i for i in ids.tolist() if i < GPT2_BOS])
    return repr(text[:characters])


def describe(path) -> str:
    """What a shard holds, in a few lines for people. Raises ShardError."""
    tokens = open_shard(path)
    largest = max(int(tokens[first:first + CHUNK].max()) for first in range(0, len(tokens), CHUNK))
    # The header does not name the vocabulary, but English GPT-2 text always has ids above 256 and byte shards never do.
    bos, vocabulary = (BYTE_BOS, "bytes") if largest <= BYTE_BOS else (GPT2_BOS, "GPT-2")
    starts = document_starts(tokens, bos)
    lines = [str(path), f"  tokens      {len(tokens):,} ({vocabulary}: {bos} starts a document; largest id {largest})",
             f"  documents   {len(starts):,}"]
    if len(starts) == 0:
        lines[-1] += f" (id {bos} does not occur)"
    else:
        if starts[0]:
            lines[-1] += f" (after {starts[0]:,} tokens of a document begun in the shard before)"
        lengths = np.diff(np.append(starts, len(tokens)))
        low, median, high, top = np.quantile(lengths, [0.1, 0.5, 0.9, 0.99])
        lines.append(f"  lengths     mean {lengths.mean():,.0f}; smallest {lengths.min():,}, 10% {low:,.0f}, median "
                     f"{median:,.0f}, 90% {high:,.0f}, 99% {top:,.0f}, largest {lengths.max():,} tokens")
    lines += [f"  first text  {_first_text(tokens[:256], bos)}", f"  sha256      {sha256_of(path)}"]
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Say what is in token shards: tokens, documents, document lengths in "
                                     "tokens, first text, SHA-256. Exit 2 if any file is not a whole shard.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="shards (.bin) made by the scripts in data/")
    status = 0
    for path in parser.parse_args(argv).files:
        try:
            print(describe(path), flush=True)
        except ShardError as error:
            print(error, file=sys.stderr)
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
