"""The shard format: token files that the trainer maps into memory.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, token count, zeros) followed by
exactly that many little-endian uint16 token ids. A document begins with the beginning-of-sequence id: 50256
for GPT-2 tokens, 256 for bytes. Shards of llm.c and modded-nanogpt have the same format.

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


class ShardError(UsageError):
    """A file that is not a usable shard; the message says what was found and what to do next."""


def write_shard(path, tokens) -> Path:
    """Write a shard that appears under its name complete, or not at all, and return its path.

    tokens: (n,) integers in 0..65535, n >= 1. The folder is made if needed. Raises ShardError for tokens that
    do not fit the format and for a disk that refuses (full, read-only).
    """
    path, tokens = Path(path), np.asarray(tokens)
    stored = np.ascontiguousarray(tokens, dtype=TOKEN_DTYPE)
    if tokens.ndim != 1 or not 1 <= tokens.size <= MAX_TOKENS or (stored != tokens).any():
        raise ShardError(f"{path}: expected a flat array of 1 to {MAX_TOKENS:,} token ids in 0..65535, found "
                         f"shape {tokens.shape} of {tokens.dtype} or other ids; nothing was written: pass "
                         "one shard's ids, of a 16-bit vocabulary")
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    try:
        with written_whole(path) as file:
            file.write(header.data)
            file.write(stored.data)
    except OSError as error:
        raise ShardError(f"{path}: expected to write {HEADER_BYTES + 2 * tokens.size:,} bytes, found "
                         f"\"{error.strerror or error}\"; nothing was left behind, free some space or choose "
                         "another folder with DATA_PATH") from error
    return path


def num_tokens(path) -> int:
    """Return the number of tokens in a shard, after checking its header: magic, version, count, size. Raises
    ShardError for a file that is missing, cut short, too long or something else.
    """
    again = "run the script in data/ that makes it again"
    try:
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        found = (error.strerror or str(error)).lower()
        raise ShardError(f"{path}: expected a token shard, found \"{found}\"; {again}, or correct the "
                         "name or its permissions") from None
    if len(head) < HEADER_BYTES:
        found = f"a file of {size} bytes, cut short" if size else "an empty file"
        raise ShardError(f"{path}: expected a header of {HEADER_BYTES} bytes, found {found}; delete it and "
                         f"{again}")
    magic, version, count = np.frombuffer(head, dtype="<i4")[:3].tolist()
    if (magic, version) != (MAGIC, VERSION):
        raise ShardError(f"{path}: expected magic {MAGIC}, found {magic}, and version {VERSION}, found "
                         f"{version}; this is not a token shard: give a file made by a script in data/")
    expected = HEADER_BYTES + TOKEN_DTYPE.itemsize * count
    if count < 1 or size != expected:
        why = "cut short" if size < expected else "damaged"
        raise ShardError(f"{path}: expected {expected:,} bytes for {count:,} tokens, found {size:,}; it is "
                         f"{why}, delete it and {again}")
    return count


def open_shard(path) -> np.memmap:
    """Return a validated shard as a read-only (n,) uint16 array, mapped and not read: pages come in as they
    are touched. Raises ShardError as num_tokens does."""
    return np.memmap(path, dtype=TOKEN_DTYPE, mode="r", offset=HEADER_BYTES, shape=(num_tokens(path),))


def document_starts(tokens, bos: int) -> np.ndarray:
    """Return the positions of the id `bos` in tokens (n,), ascending, as int64 (documents,)."""
    return np.flatnonzero(tokens == bos)


def check_ids(tokens, vocab_size: int, path) -> None:
    """Raise ShardError with the first position and id in tokens (n,) of path that is not below vocab_size."""
    if tokens.max(initial=0) < vocab_size:
        return
    at = int(np.argmax(tokens >= vocab_size))
    raise ShardError(f"{path}: expected token ids below the vocabulary size {vocab_size:,}, found "
                     f"{int(tokens[at])} at position {at:,}; these tokens are of another vocabulary, choose "
                     "the data or the track that fits")
