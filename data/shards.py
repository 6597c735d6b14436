"""The shard format: token files that the trainer maps into memory.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, token count, zeros) followed by
exactly that many little-endian uint16 token ids. A document begins with the beginning-of-sequence id: 50256
for GPT-2 tokens, 256 for bytes. The format is the one of llm.c and modded-nanogpt, so their FineWeb shards
can be read as they are. `python -m data.describe FILE` says what is in a shard.

Imports numpy and the standard library only, because the trainer imports this file.
"""
import os
from pathlib import Path

import numpy as np

from data.errors import UsageError
from data.files import written_whole

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024  # 256 int32
TOKEN_DTYPE = np.dtype("<u2")  # little-endian on disk on every machine
MAX_TOKENS = 2**31 - 1  # the header holds the count as int32
MAKERS = {  # folder of shards -> the module that fills it
    "data/fineweb10B": "data.cached_fineweb10B",
    "data/shakespeare": "data.shakespeare",
}
CHUNK = 1 << 22  # tokens looked at in one go, 8 MiB: to scan a mapped shard takes no second copy of it


class ShardError(UsageError):
    """A file that is not a usable shard; the message says what was found and what to do next."""


def write_shard(path, tokens) -> Path:
    """Write a shard that appears under its name complete, or not at all.
    path: file name, its folder is made if needed. tokens: (n,) integers in 0..65535, n >= 1. Returns the
    path. Raises ShardError for tokens that do not fit the format and for a disk that refuses (full,
    read-only)."""
    path, tokens = Path(path), np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not 1 <= tokens.size <= MAX_TOKENS:
        raise ShardError(f"{path}: expected a flat array of 1 to {MAX_TOKENS:,} integer token ids, found "
                         f"shape {tokens.shape} of {tokens.dtype}; nothing was written: pass one shard's ids")
    if tokens.dtype != TOKEN_DTYPE:
        for first in range(0, tokens.size, CHUNK):
            chunk = tokens[first:first + CHUNK]
            bad = np.flatnonzero((chunk < 0) | (chunk > 65535))
            if bad.size:
                raise ShardError(f"{path}: expected token ids in 0..65535, found {chunk[bad[0]]} at position "
                                 f"{first + bad[0]:,}; nothing was written: use a 16-bit vocabulary")
        tokens = tokens.astype(TOKEN_DTYPE)
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    try:
        with written_whole(path) as file:
            file.write(header.data)
            file.write(np.ascontiguousarray(tokens).data)
    except OSError as error:
        raise ShardError(f"{path}: expected to write {HEADER_BYTES + 2 * tokens.size:,} bytes, found "
                         f"\"{error.strerror or error}\"; nothing was left behind, free some space or choose "
                         "another folder with DATA_PATH") from error
    return path


def num_tokens(path) -> int:
    """Return the number of tokens in a shard, after checking that the file is one and whole: magic, version,
    count, size. Reads only the header. Raises ShardError for a file that is missing, empty, cut short, too
    long or something else.
    """
    path, again = Path(path), "run the script in data/ that makes it again"
    try:
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise ShardError(f"{path}: expected a token shard, found no such file; {again}, or "
                         "correct the name") from None
    except OSError as error:
        raise ShardError(f"{path}: expected a readable token shard, found \"{error.strerror}\"; correct its "
                         "name or permissions") from error
    if size == 0:
        raise ShardError(f"{path}: expected a token shard, found an empty file; delete it and {again}")
    if len(head) >= 4 and int.from_bytes(head[:4], "little", signed=True) != MAGIC:
        found = int.from_bytes(head[:4], "little", signed=True)
        raise ShardError(f"{path}: expected magic {MAGIC}, found {found}; this is not a token shard: give a "
                         "file made by a script in data/")
    if len(head) < HEADER_BYTES:
        raise ShardError(f"{path}: expected a header of {HEADER_BYTES} bytes, found a file of {size}; it is "
                         f"cut short, delete it and {again}")
    _, version, count = np.frombuffer(head, dtype="<i4")[:3].tolist()
    if version != VERSION:
        raise ShardError(f"{path}: expected shard version {VERSION}, found {version}; {again} with this "
                         "repository")
    if count < 1:
        raise ShardError(f"{path}: expected a token count of at least 1 in the header, found {count}; delete "
                         f"it and {again}")
    expected = HEADER_BYTES + TOKEN_DTYPE.itemsize * count
    if size != expected:
        if size < expected:
            why = "it is cut short"
        elif (size - HEADER_BYTES) % count == 0:
            width = (size - HEADER_BYTES) // count
            why = f"it holds {width} bytes per token instead of {TOKEN_DTYPE.itemsize}"
        else:
            why = "it has foreign bytes at its end"
        raise ShardError(f"{path}: expected {expected:,} bytes for {count:,} tokens, found {size:,}; {why}, "
                         f"delete it and {again}")
    return count


def open_shard(path) -> np.memmap:
    """Return a validated shard as a read-only (n,) uint16 array, mapped and not read: pages come in as they
    are touched. Raises ShardError as num_tokens does."""
    return np.memmap(path, dtype=TOKEN_DTYPE, mode="r", offset=HEADER_BYTES, shape=(num_tokens(path),))


def document_starts(tokens, bos: int) -> np.ndarray:
    """Return the positions of the id `bos` in tokens (n,), ascending, as int64 (documents,)."""
    found = [np.zeros(0, dtype=np.int64)]
    for first in range(0, len(tokens), CHUNK):
        found.append(first + np.flatnonzero(tokens[first:first + CHUNK] == bos))
    return np.concatenate(found)


def check_ids(tokens, vocab_size: int, path) -> None:
    """Raise ShardError naming the first position and id in tokens (n,) that is not below vocab_size.
    path only names the file in the message. One pass at memory speed."""
    for first in range(0, len(tokens), CHUNK):
        chunk = tokens[first:first + CHUNK]
        if chunk.max() >= vocab_size:
            at = int(np.argmax(chunk >= vocab_size))
            raise ShardError(f"{path}: expected token ids below the vocabulary size {vocab_size:,}, found "
                             f"{int(chunk[at])} at position {first + at:,}; these tokens are of another "
                             "vocabulary, choose the data or the track that fits")
