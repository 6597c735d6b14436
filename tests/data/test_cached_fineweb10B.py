"""data/cached_fineweb10B.py against a hub on loopback: verified files, or one sentence and no file."""

import contextlib
import io
import json
import os
import struct
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.commands import python
from tests.helpers.fake_hub import serve

from data import cached_fineweb10B
from data.errors import run_program
from data.files import ROOT
from data.loader import shards_needed
from train_gpt import Config

pytest.importorskip("huggingface_hub")
VAL, TRAIN1, TRAIN2 = "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"
NOWHERE = "http://127.0.0.1:9"


def shard(seed: int, tokens: int = 1000) -> bytes:
    ids = np.random.default_rng(seed).integers(0, 50257, tokens).astype("<u2")
    return struct.pack("<3i", 20240520, 1, tokens) + bytes(253 * 4) + ids.tobytes()


@pytest.fixture
def hub():
    files = {VAL: shard(0), TRAIN1: shard(1), TRAIN2: shard(2)}
    with serve({f"{cached_fineweb10B.REPO}/{name}": body for name, body in files.items()}) as hub:
        hub.bodies = files
        yield hub


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "data" / "fineweb10B"


def run(tmp_path, endpoint, *args) -> tuple[int, str, str]:
    """The command; the hub library reads HF_ENDPOINT when it is imported, so each has its own process."""
    env = dict(HF_ENDPOINT=endpoint, HF_HUB_OFFLINE=0, HF_HOME=tmp_path, DATA_PATH=tmp_path)
    env["TQDM_POSITION"] = -1  # makes the hub library show its bar without a terminal
    done = python("data/cached_fineweb10B.py", *args, **env)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def asked_for(hub, *methods) -> list[str]:
    """The files that were asked for; the hub library also asks about other things."""
    files = [(method, path) for method, path in hub.requests if "/resolve/" in path]
    return [path.split("/")[-1] for method, path in files if method in methods]


def visible(folder) -> list[str]:
    return sorted(p.name for p in folder.glob("[!.]*"))


def test_brings_validation_first_and_what_was_verified_needs_no_hub(hub, tmp_path, folder):
    rc, out, err = run(tmp_path, hub.endpoint, 1)
    assert rc == 0, err
    assert sorted(p.name for p in folder.iterdir()) == sorted([VAL, TRAIN1, "manifest.json"])
    assert asked_for(hub, "GET") == [VAL, TRAIN1] and VAL in err and "100%" in err
    hashes = {name: sha256(hub.bodies[name]).hexdigest() for name in (VAL, TRAIN1)}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == {"repo": cached_fineweb10B.REPO, "sha256": hashes}
    for name in hashes:
        assert (folder / name).read_bytes() == hub.bodies[name]
        assert f"{name}: 1,000 tokens, sha256 {hashes[name]}\n" in out
    assert "2,000 tokens in 2 files" in out

    rc, out, err = run(tmp_path, NOWHERE, 1)
    assert rc == 0 and err == "" and "2,000 tokens in 2 files" in out
    hub.requests.clear()
    assert run(tmp_path, hub.endpoint, 2)[0] == 0  # one more: only that one is asked for
    assert set(asked_for(hub, "HEAD", "GET")) == {TRAIN2}


def test_what_is_not_whole_or_not_the_hubs_is_fetched_again_and_nothing_else(hub, tmp_path, folder):
    """Someone who has the shards already, from the upstream script, keeps them if they are the hub's."""
    folder.mkdir(parents=True)
    (folder / VAL).write_bytes(hub.bodies[VAL])
    (folder / TRAIN1).write_bytes(shard(99))  # the right size, other content
    (folder / "manifest.json").write_text("{broken")  # what cannot be read is checked against the hub again
    assert run(tmp_path, hub.endpoint, 1)[0] == 0
    assert hub.gets(VAL) == 0 and (folder / TRAIN1).read_bytes() == hub.bodies[TRAIN1]

    (folder / TRAIN1).write_bytes(hub.bodies[TRAIN1][:-2])  # cut after it was verified
    assert run(tmp_path, hub.endpoint, 1)[0] == 0
    assert hub.gets(VAL) == 0 and hub.gets(TRAIN1) == 2
    assert (folder / TRAIN1).read_bytes() == hub.bodies[TRAIN1]

    damaged = bytearray(hub.bodies[TRAIN1])
    damaged[-1] ^= 1  # a bit that flipped on the disk: size and header are as they were
    (folder / TRAIN1).write_bytes(damaged)
    noted = sha256(hub.bodies[TRAIN1]).hexdigest()
    rc, out, err = run(tmp_path, hub.endpoint, 1)
    assert rc == 0 and f"sha256 {noted} (as noted in manifest.json; --rehash computes it)" in out
    rc, out, err = run(tmp_path, hub.endpoint, 1, "--rehash")
    assert rc == 0 and f"sha256 {noted}\n" in out and "noted" not in out
    assert (folder / TRAIN1).read_bytes() == hub.bodies[TRAIN1]


@contextlib.contextmanager
def beside_another_download(hub, tmp_path, folder):
    """Yield the partial file of a download of VAL, by name and open, and a list. A second download waits for
    it; once the file is closed, that one's exit code and messages are in the list."""
    fcntl = pytest.importorskip("fcntl")
    folder.mkdir(parents=True)
    partial = folder / f".{VAL}.{sha256(hub.bodies[VAL]).hexdigest()[:12]}.partial"
    env = dict(HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path), DATA_PATH=str(tmp_path))
    command = [sys.executable, "data/cached_fineweb10B.py", "1"]
    ended = []
    with open(partial, "wb", buffering=0) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        second = subprocess.Popen(command, cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True)
        assert second.stderr.readline() == f"waiting for another download of {VAL}\n"
        yield partial, other, ended
    _, err = second.communicate()
    ended += second.returncode, err


def test_a_download_waits_for_another_one_of_the_same_file(hub, tmp_path, folder):
    with beside_another_download(hub, tmp_path, folder) as (partial, other, ended):
        other.write(hub.bodies[VAL])
        partial.rename(folder / VAL)
    assert ended[0] == 0 and hub.gets(VAL) == 0 and hub.gets(TRAIN1) == 1, ended
    assert list(folder.glob(".*")) == []


def test_a_download_that_waited_for_a_damaged_one_begins_anew(hub, tmp_path, folder):
    with beside_another_download(hub, tmp_path, folder) as (partial, other, ended):
        other.write(bytes(len(hub.bodies[VAL])))
        partial.unlink()
    assert ended[0] == 0 and hub.gets(VAL) == 1, ended
    assert (folder / VAL).read_bytes() == hub.bodies[VAL] and list(folder.glob(".*")) == []


def test_a_damaged_transfer_is_refused_and_deleted(hub, tmp_path, folder):
    hub.damage.add(TRAIN1)
    rc, out, err = run(tmp_path, hub.endpoint, 1)
    assert rc == 2
    assert f"with SHA-256 {sha256(hub.bodies[TRAIN1]).hexdigest()}, found" in err.splitlines()[-1]
    assert visible(folder) == sorted([VAL, "manifest.json"])
    assert list(folder.glob(".*")) == []  # or it would be "continued" for ever


def test_more_shards_than_there_are_and_files_that_are_none_are_refused(hub, tmp_path, folder):
    rc, out, err = run(tmp_path, hub.endpoint, 3)
    assert rc == 2 and "expected fineweb_train_000003.bin of" in err.splitlines()[-1]
    assert "no such file there" in err
    assert visible(folder) == sorted([VAL, TRAIN1, TRAIN2, "manifest.json"])

    hub.files[f"{cached_fineweb10B.REPO}/fineweb_train_000003.bin"] = b"not a shard " * 200
    rc, out, err = run(tmp_path, hub.endpoint, 3)
    assert rc == 2 and "expected magic 20240520" in err.splitlines()[-1]
    assert visible(folder) == sorted([VAL, TRAIN1, TRAIN2, "manifest.json"])


def test_no_network_is_one_sentence(tmp_path, folder):
    rc, out, err = run(tmp_path, NOWHERE, 1)
    assert rc == 2 and out == "" and len(err.splitlines()) == 1
    assert err.startswith(f"expected {VAL} of kjj0/fineweb10B-gpt2 from the hub, found ")
    assert "connect to" in err and visible(folder) == []


@pytest.mark.parametrize("args, code, said", [
    (["1"], 2, "expected a folder to write to"),
    (["0"], 2, "expected N of at least 1, found 0"),
    (["many"], 2, "invalid int value"),
    ([str(10**10)], 2, "expected at most the 103 training shards that"),
])
def test_refusals_without_a_hub_are_one_sentence(tmp_path, monkeypatch, args, code, said):
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    (tmp_path / "data").write_text("in the way")
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert run_program(cached_fineweb10B.main, args) == code
    assert said in err.getvalue().splitlines()[-1]


def test_by_default_it_brings_what_track_small_needs(monkeypatch):
    assert cached_fineweb10B.DEFAULT_SHARDS == shards_needed(Config.for_track("small"))
    asked = []
    monkeypatch.setattr(cached_fineweb10B, "download", lambda num_train, *rest: asked.append(num_train) or [])
    cached_fineweb10B.main([])
    cached_fineweb10B.main(["3"])
    assert asked == [cached_fineweb10B.DEFAULT_SHARDS, 3]
