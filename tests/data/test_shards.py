"""data/shards.py and data/describe.py: the format, a sentence for every damaged file, whole writes."""

import hashlib
import os
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

from data import shards
from data.files import ROOT, sha256_of


def by_hand(tokens, magic=20240520, version=1, count=None, dtype="<u2") -> bytes:
    """A shard made without shards.py, from the description of the format."""
    head = struct.pack("<3i", magic, version, len(tokens) if count is None else count) + bytes(253 * 4)
    return head + np.array(tokens, dtype=dtype).tobytes()


def cli(*files, **env):
    return subprocess.run([sys.executable, "-m", "data.describe", *map(str, files)], capture_output=True,
                          text=True, cwd=ROOT, env=os.environ | {k: str(v) for k, v in env.items()})


@pytest.mark.parametrize("tokens", [
    np.array([256, 0, 255, 65535], dtype=np.uint16), np.array([7], dtype=np.int64), [50256, 1, 2, 3],
    np.arange(100, dtype=np.uint32)[::3], np.arange(10, dtype=">u2")])
def test_file_is_the_format_and_reads_back(tmp_path, tokens):
    path = shards.write_shard(tmp_path / "made" / "on" / "demand.bin", tokens)
    assert path.read_bytes() == by_hand(np.asarray(tokens))
    back = shards.open_shard(path)
    assert isinstance(back, np.memmap) and back.dtype == np.uint16 and not back.flags.writeable
    assert back.tolist() == np.asarray(tokens).tolist()
    assert shards.num_tokens(str(path)) == len(tokens)
    assert [p.name for p in path.parent.iterdir()] == ["demand.bin"]
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()


DAMAGED = {
    "empty": (b"", ["an empty file"]),
    "short header": (by_hand([1, 2])[:100], ["header of 1024 bytes", "found a file of 100"]),
    "two bytes": (b"ab", ["header of 1024 bytes", "found a file of 2"]),
    "text": (b"First Citizen: " * 200, ["magic 20240520", f"found {struct.unpack('<i', b'Firs')[0]}"]),
    "short text": (b"First", ["magic 20240520", "not a token shard"]),
    "other magic": (by_hand([1, 2], magic=20240801), ["magic 20240520", "found 20240801"]),
    "other version": (by_hand([1, 2], version=7), ["version 1", "found 7"]),
    "no tokens": (by_hand([]), ["at least 1", "found 0"]),
    "negative count": (by_hand([1], count=-5), ["at least 1", "found -5"]),
    "cut by a byte": (by_hand([1, 2, 3])[:-1], ["1,030 bytes for 3 tokens", "found 1,029", "cut short"]),
    "cut to the header": (by_hand([1, 2, 3])[:1024], ["found 1,024", "cut short"]),
    "too long": (by_hand([1, 2, 3]) + b"x", ["found 1,031", "foreign bytes"]),
    "uint32": (by_hand([1, 2, 3], dtype="<u4"), ["found 1,036", "4 bytes per token instead of 2"]),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file_is_refused_with_what_was_found(tmp_path, name):
    data, expected = DAMAGED[name]
    path = tmp_path / "x.bin"
    path.write_bytes(data)
    for function in (shards.num_tokens, shards.open_shard):
        with pytest.raises(shards.ShardError) as caught:
            function(path)
        message = str(caught.value)
        assert str(path) in message and "expected" in message and "found" in message and "\n" not in message
        assert all(part in message for part in expected), message
        assert message.count(";") >= 1, f"no advice in: {message}"


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(shards.ShardError, match="found no such file; run the script in data/"):
        shards.num_tokens(tmp_path / "none.bin")
    with pytest.raises(shards.ShardError, match="Is a directory"):
        shards.num_tokens(tmp_path)


@pytest.mark.parametrize("tokens, found", [
    ([1, 2, 65536], "found 65536 at position 2"), ([5, -1], "found -1 at position 1"), ([], r"shape \(0,\)"),
    ([[1, 2]], r"shape \(1, 2\)"), ([1.0, 2.0], "float64")])
def test_tokens_that_do_not_fit_write_nothing(tmp_path, tokens, found):
    with pytest.raises(shards.ShardError, match=found):
        shards.write_shard(tmp_path / "x.bin", tokens)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_sentence_and_keeps_the_earlier_file(tmp_path):
    """A file size limit makes the kernel refuse in the middle of the write, as a full disk does."""
    path = shards.write_shard(tmp_path / "x.bin", [1, 2, 3])
    before = path.read_bytes()
    code = (f"import resource, sys; sys.path.insert(0, {str(ROOT)!r}); from data import shards\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
            f"try: shards.write_shard({str(path)!r}, [9] * 100000)\n"
            f"except shards.ShardError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'expected to write 201,024 bytes, found "File too large"; nothing was left behind' in done.stdout
    assert done.stderr == "" and path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        shards.write_shard(tmp_path / "x.bin", [1, 2, 3])
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(shards.ShardError, match="expected to write .* found .*; nothing was left behind"):
        shards.write_shard(tmp_path / "file" / "x.bin", [1])


@pytest.mark.parametrize("chunk", [1, 3, 7, 1 << 22])
def test_document_starts_equals_a_plain_loop(monkeypatch, chunk):
    monkeypatch.setattr(shards, "CHUNK", chunk)
    tokens = np.random.default_rng(0).integers(0, 5, 50).astype(np.uint16)
    found = shards.document_starts(tokens, 4)
    plain = [i for i, token in enumerate(tokens.tolist()) if token == 4]
    assert found.dtype == np.int64 and found.tolist() == plain != []
    assert shards.document_starts(tokens, 9).tolist() == []
    assert shards.document_starts(tokens[:0], 4).tolist() == []


@pytest.mark.parametrize("chunk", [1, 4, 1 << 22])
def test_check_ids_names_the_first_offender(monkeypatch, chunk):
    monkeypatch.setattr(shards, "CHUNK", chunk)
    tokens = np.array([0, 5, 256, 3, 257, 1, 999], dtype=np.uint16)
    shards.check_ids(tokens, 1000, "x.bin")
    with pytest.raises(shards.ShardError, match="x.bin: expected .* size 257, found 257 at position 4;"):
        shards.check_ids(tokens, 257, "x.bin")
    with pytest.raises(shards.ShardError, match="size 256, found 256 at position 2;"):
        shards.check_ids(tokens, 256, "x.bin")


def test_cli_describes_a_byte_shard(tmp_path):
    documents = [b"To be, or not to be", b"Words, words, words.", b"x"]
    path = shards.write_shard(tmp_path / "x.bin", [t for d in documents for t in (256, *d)])
    done = cli(path)
    assert done.returncode == 0 and done.stderr == ""
    assert "tokens      43 (bytes: 256 starts a document; largest id 256)" in done.stdout
    assert "documents   3\n" in done.stdout
    lengths = r"mean 14; smallest 2, 10% \d+, median 20, 90% 21, 99% 21, largest 21 tokens"
    assert re.search(lengths, done.stdout)
    assert "'To be, or not to be" in done.stdout and sha256_of(path) in done.stdout


def test_cli_describes_a_gpt2_shard_without_the_vocabulary(tmp_path):
    path = shards.write_shard(tmp_path / "x.bin", [262, 262, 50256, 464, 262, 50256, 262])
    done = cli(path, DATA_PATH=tmp_path, TIKTOKEN_CACHE_DIR=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "documents   2 (after 2 tokens of a document begun in the shard before)" in done.stdout
    assert "(ids 262 262 50256 464 262 50256 262 ...; as text they need the GPT-2 vocabulary: " in done.stdout


def test_cli_reports_bad_files_in_a_line_each_and_goes_on(tmp_path):
    good = shards.write_shard(tmp_path / "good.bin", [256, 65])
    (tmp_path / "bad.bin").write_bytes(b"")
    done = cli(tmp_path / "none.bin", tmp_path / "bad.bin", good)
    assert done.returncode == 2 and "documents   1" in done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and "none.bin: expected" in lines[0] and "bad.bin: expected" in lines[1]


def test_importing_needs_numpy_and_the_standard_library_only():
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import numpy; before = set(sys.modules)\n"
            f"import data.shards\n"
            f"print({{m.split('.')[0] for m in set(sys.modules) - before}} - set(sys.stdlib_module_names))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "{'data'}", done.stdout + done.stderr
