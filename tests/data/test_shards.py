"""data/shards.py: the format, a sentence for every damaged file, whole writes."""

import os
import struct

import numpy as np
import pytest

from data import shards
from tests.helpers.commands import python


def by_hand(tokens, magic=20240520, version=1, count=None, dtype="<u2") -> bytes:
    """A shard made without shards.py, from the description of the format."""
    head = struct.pack("<3i", magic, version, len(tokens) if count is None else count) + bytes(253 * 4)
    return head + np.array(tokens, dtype=dtype).tobytes()


@pytest.mark.parametrize("tokens", [
    np.array([256, 0, 255, 65535], dtype=np.uint16),
    np.arange(100, dtype=np.uint32)[::3],
    np.arange(10, dtype=">u2"),
    [50256, 1, 2, 3],
])
def test_a_file_has_the_public_format_and_reads_back(tmp_path, tokens):
    path = shards.write_shard(tmp_path / "made" / "on" / "demand.bin", tokens)
    assert path.read_bytes() == by_hand(np.asarray(tokens))
    back = shards.open_shard(path)
    assert isinstance(back, np.memmap) and back.dtype == np.uint16 and not back.flags.writeable
    assert back.tolist() == np.asarray(tokens).tolist()
    assert shards.num_tokens(str(path)) == len(tokens)
    assert [p.name for p in path.parent.iterdir()] == ["demand.bin"]


DAMAGED = {
    "empty": (b"", ["an empty file"]),
    "short header": (by_hand([1, 2])[:100], ["header of 1024 bytes", "found a file of 100"]),
    "text": (b"First Citizen: " * 200, ["magic 20240520", f"found {struct.unpack('<i', b'Firs')[0]}"]),
    "other version": (by_hand([1, 2], version=7), ["version 1", "found 7"]),
    "no tokens": (by_hand([]), ["for 0 tokens", "damaged"]),
    "negative count": (by_hand([1], count=-5), ["for -5 tokens"]),
    "cut by a byte": (by_hand([1, 2, 3])[:-1], ["1,030 bytes for 3 tokens", "found 1,029", "cut short"]),
    "too long": (by_hand([1, 2, 3]) + b"x", ["found 1,031", "damaged"]),
    "uint32": (by_hand([1, 2, 3], dtype="<u4"), ["found 1,036", "damaged"]),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_with_what_was_found(tmp_path, name):
    data, expected = DAMAGED[name]
    path = tmp_path / "x.bin"
    path.write_bytes(data)
    for function in (shards.num_tokens, shards.open_shard):
        with pytest.raises(shards.ShardError) as caught:
            function(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: expected") and "\n" not in message and ";" in message
        assert all(part in message for part in expected), message


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(shards.ShardError, match="no such file.*; run the script in data/"):
        shards.num_tokens(tmp_path / "none.bin")
    with pytest.raises(shards.ShardError, match="is a directory"):
        shards.num_tokens(tmp_path)


@pytest.mark.parametrize("tokens", [[1, 2, 65536], [5, -1], [], [[1, 2]], [0.5]])
def test_tokens_that_do_not_fit_write_nothing(tmp_path, tokens):
    with pytest.raises(shards.ShardError, match=r"ids in 0..65535, found shape .*; nothing was written"):
        shards.write_shard(tmp_path / "x.bin", np.array(tokens))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence_and_keeps_the_earlier_file(tmp_path):
    """A file size limit makes the kernel refuse in the middle of the write, as a full disk does."""
    path = shards.write_shard(tmp_path / "x.bin", [1, 2, 3])
    before = path.read_bytes()
    code = f"""
import resource
from data import shards
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try: shards.write_shard({str(path)!r}, [9] * 100000)
except shards.ShardError as error: print(error)
"""
    done = python("-c", code)
    assert 'expected to write 201,024 bytes, found "File too large"; nothing was left behind' in done.stdout
    assert done.stderr == "" and path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        shards.write_shard(tmp_path / "x.bin", [1, 2, 3])
    assert list(tmp_path.iterdir()) == []


def test_the_first_token_that_is_too_large_is_named():
    tokens = np.array([0, 5, 256, 3, 257, 1, 999], dtype=np.uint16)
    shards.check_ids(tokens, 1000, "x.bin")
    shards.check_ids(tokens[:0], 1, "x.bin")
    with pytest.raises(shards.ShardError, match="x.bin: expected .* size 257, found 257 at position 4;"):
        shards.check_ids(tokens, 257, "x.bin")


def test_importing_needs_numpy_and_the_standard_library_only():
    code = """
import sys, numpy
before = set(sys.modules)
import data.shakespeare, data.shards
print({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))
"""
    done = python("-c", code)
    assert done.stdout.strip() == "{'data'}", done.stdout + done.stderr
