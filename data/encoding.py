"""The two vocabularies: text to token ids and back, as bytes or as GPT-2's byte pairs.

Each has `bos`, the id that starts a document, `encode(text)` to a uint16 array, and `decode(ids)` to bytes.
"""
import os
import tempfile
from pathlib import Path

import numpy as np

from data.errors import UsageError
from data.fetch import FetchError

BYTE_BOS = 256  # the ids below it are the bytes themselves
GPT2_BOS = 50256  # <|endoftext|>
# The names of GPT-2's vocab.bpe and encoder.json in tiktoken's cache: the SHA-1 of their addresses.
GPT2_FILES = ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")


class ByteEncoding:
    """Text as its UTF-8 bytes."""
    bos = BYTE_BOS

    def pieces(self) -> list[bytes]:
        """Return the bytes of every token; none of the one that starts a document."""
        return [bytes([i]) for i in range(BYTE_BOS)] + [b""]

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint16)

    def decode(self, ids) -> bytes:
        return bytes(int(i) for i in ids if i < BYTE_BOS)


class GPT2Encoding:
    """Text as GPT-2's byte pairs, by a tiktoken.Encoding."""
    bos = GPT2_BOS

    def __init__(self, pairs):
        self.pairs = pairs

    def pieces(self) -> list[bytes]:
        """Return the bytes of every token; none of the one that starts a document."""
        return [self.pairs.decode_single_token_bytes(i) for i in range(GPT2_BOS)] + [b""]

    def encode(self, text: str) -> np.ndarray:
        # To an array: 10 % faster than encode_ordinary, whose result is a Python list. Allowing no special
        # token makes "<|endoftext|>" in a text the ordinary characters that it is there.
        return self.pairs.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def decode(self, ids) -> bytes:
        return self.pairs.decode_bytes([int(i) for i in ids if i < GPT2_BOS])


def longest_prefixes(pieces: list[bytes]) -> np.ndarray:
    """Return for each token the one whose bytes are the longest proper prefix of its own, -1 where none is.

    pieces: the bytes of each token, b"" for those that stand for no text. In sorted order a prefix comes
    before all that it begins, so the candidates for the next token are a stack.
    """
    longest = np.full(len(pieces), -1, dtype=np.int64)
    open_ids = []  # each one's bytes begin those of the next
    for i in sorted(filter(pieces.__getitem__, range(len(pieces))), key=pieces.__getitem__):
        while open_ids and not pieces[i].startswith(pieces[open_ids[-1]]):
            open_ids.pop()
        if open_ids:
            longest[i] = open_ids[-1]
        open_ids.append(i)
    return longest


def gpt2_encoding(network: bool = True) -> GPT2Encoding:
    """Return GPT-2's vocabulary, which tiktoken downloads once (1.5 MB), checks by hash and caches. network:
    False takes it from the cache only. Raises FetchError."""
    import tiktoken
    cache = Path(tempfile.gettempdir(), "data-gym-cache")
    for variable in ("DATA_GYM_CACHE_DIR", "TIKTOKEN_CACHE_DIR"):  # as tiktoken looks it up
        cache = Path(os.environ.get(variable, cache))
    if not network and not all((cache / name).is_file() for name in GPT2_FILES):
        raise FetchError(f"expected GPT-2's vocabulary in {cache}, found none; `python -c \"import tiktoken; "
                         f"tiktoken.get_encoding('gpt2')\"` fetches it")
    try:
        return GPT2Encoding(tiktoken.get_encoding("gpt2"))
    except Exception as error:  # those of requests and tiktoken's own
        found = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FetchError(f"expected to download GPT-2's vocabulary with tiktoken, found \"{found}\"; connect "
                         "to the network, or set TIKTOKEN_CACHE_DIR to a folder that holds it") from None


def encoding_for(bos: int, network: bool = True) -> ByteEncoding | GPT2Encoding:
    """Return the vocabulary in which `bos` starts a document. Raises FetchError or UsageError."""
    if bos == BYTE_BOS:
        return ByteEncoding()
    if bos == GPT2_BOS:
        return gpt2_encoding(network)
    raise UsageError(f"expected tokens whose documents start with {BYTE_BOS} (bytes) or {GPT2_BOS} (GPT-2), "
                     f"found {bos}; their vocabulary is not known here")
