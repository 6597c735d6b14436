"""data/cached_fineweb10B.py against a hub on loopback: verified files, or one sentence and no file."""

import hashlib
import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.fake_hub import serve

from data import cached_fineweb10B
from data.files import ROOT
from data.loader import shards_needed
from train_gpt import Config

pytest.importorskip("huggingface_hub")
VAL, TRAIN1, TRAIN2 = "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"


def shard(seed: int, tokens: int = 1000) -> bytes:
    ids = np.random.default_rng(seed).integers(0, 50257, tokens).astype("<u2")
    return struct.pack("<3i", 20240520, 1, tokens) + bytes(253 * 4) + ids.tobytes()


@pytest.fixture
def hub():
    files = {VAL: shard(0), TRAIN1: shard(1), TRAIN2: shard(2)}
    with serve({f"{cached_fineweb10B.REPO}/{name}": body for name, body in files.items()}) as hub:
        hub.bodies = files
        yield hub


def start(folder, endpoint, *args):
    env = os.environ | {"HF_ENDPOINT": endpoint, "DATA_PATH": str(folder), "HF_HOME": str(folder / "home")}
    env.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, str(ROOT / "data" / "cached_fineweb10B.py"), *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*args):
    process = start(*args)
    out, err = process.communicate()
    return process.returncode, out, err


def visible(folder) -> list[str]:
    return sorted(p.name for p in (folder / "data" / "fineweb10B").glob("[!.]*"))


def test_brings_validation_first_and_the_shards_asked_for(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_POSITION", "-1")  # makes the hub library show its bar without a terminal
    rc, out, err = run(tmp_path, hub.endpoint, 2)
    assert rc == 0, err
    folder = tmp_path / "data" / "fineweb10B"
    assert visible(tmp_path) == sorted([VAL, TRAIN1, TRAIN2, "manifest.json"])
    assert [p for p in folder.iterdir() if p.name.startswith(".")] == []
    fetched = [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]
    assert [path.split("/")[-1] for path in fetched] == [VAL, TRAIN1, TRAIN2]
    expected = [{"name": name, "tokens": 1000, "bytes": 3024, "sha256": hashlib.sha256(body).hexdigest()}
                for name, body in sorted(hub.bodies.items())]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == {"repo": cached_fineweb10B.REPO, "files": expected}
    for name, body in hub.bodies.items():
        assert (folder / name).read_bytes() == body
        assert f"{name}: 1,000 tokens, sha256 {hashlib.sha256(body).hexdigest()}" in out
    assert "3,000 tokens in 3 files" in out
    assert VAL in err and "100%" in err


def test_what_was_verified_needs_no_hub(hub, tmp_path):
    assert run(tmp_path, hub.endpoint, 1)[0] == 0
    rc, out, err = run(tmp_path, "http://127.0.0.1:9", 1)
    assert rc == 0 and err == "" and "2,000 tokens in 2 files" in out
    seen = len(hub.requests)
    assert run(tmp_path, hub.endpoint, 2)[0] == 0  # one more: only that one is asked for
    assert {path.split("/")[-1] for _, path, _ in hub.requests[seen:] if "/resolve/" in path} == {TRAIN2}


def test_file_cut_after_it_was_verified_is_fetched_again(hub, tmp_path):
    assert run(tmp_path, hub.endpoint, 1)[0] == 0
    path = tmp_path / "data" / "fineweb10B" / TRAIN1
    path.write_bytes(path.read_bytes()[:-2])
    assert run(tmp_path, hub.endpoint, 1)[0] == 0
    assert path.read_bytes() == hub.bodies[TRAIN1]
    assert len(hub.gets(VAL)) == 1 and len(hub.gets(TRAIN1)) == 2


def test_file_from_elsewhere_is_verified_and_not_downloaded(hub, tmp_path):
    """Someone who has the shards already, from the upstream script, keeps them if they are the hub's."""
    folder = tmp_path / "data" / "fineweb10B"
    folder.mkdir(parents=True)
    (folder / VAL).write_bytes(hub.bodies[VAL])
    (folder / TRAIN1).write_bytes(shard(99))  # the right size, other content
    assert run(tmp_path, hub.endpoint, 1)[0] == 0
    assert hub.gets(VAL) == [] and (folder / TRAIN1).read_bytes() == hub.bodies[TRAIN1]


def test_damaged_transfer_is_refused_and_deleted(hub, tmp_path):
    hub.damage.add(TRAIN1)
    rc, out, err = run(tmp_path, hub.endpoint, 1)
    assert rc == 2 and "Traceback" not in err
    assert f"with SHA-256 {hashlib.sha256(hub.bodies[TRAIN1]).hexdigest()}, found" in err.splitlines()[-1]
    assert visible(tmp_path) == sorted([VAL, "manifest.json"])
    assert list((tmp_path / "data" / "fineweb10B").glob(".*")) == []  # or it would be "continued" for ever
    hub.damage.clear()
    assert run(tmp_path, hub.endpoint, 1)[0] == 0 and len(hub.gets(VAL)) == 1


def test_foreign_file_with_the_right_hash_is_refused(hub, tmp_path):
    hub.files[f"{cached_fineweb10B.REPO}/{VAL}"] = b"not a shard " * 200
    rc, out, err = run(tmp_path, hub.endpoint, 1)
    assert rc == 2 and "expected magic 20240520" in err.splitlines()[-1] and "Traceback" not in err
    assert visible(tmp_path) == []


def test_broken_connection_is_continued_at_once(hub, tmp_path):
    hub.cut[VAL] = [700]
    rc, out, err = run(tmp_path, hub.endpoint, 1)
    assert rc == 0, err
    assert (tmp_path / "data" / "fineweb10B" / VAL).read_bytes() == hub.bodies[VAL]
    assert len(hub.gets(VAL)) == 2 and "Error while" not in err


def test_killed_download_is_continued_by_the_next(hub, tmp_path):
    """The hub library hands over 10 MiB at a time; what it holds when it is killed is lost."""
    body = hub.files[f"{cached_fineweb10B.REPO}/{VAL}"] = shard(5, 6_000_000)
    hub.stall[VAL] = 11_000_000
    process = start(tmp_path, hub.endpoint, 1)
    partial = lambda: list((tmp_path / "data" / "fineweb10B").glob(f".{VAL}.*.partial"))  # noqa: E731
    try:
        assert hub.stalled.wait(30)
        for _ in range(300):
            if partial() and partial()[0].stat().st_size >= 10 << 20:
                break
            hub.closing.wait(0.05)
    finally:
        process.kill()
        process.communicate()
    assert partial()[0].stat().st_size == 10 << 20 and visible(tmp_path) == []
    hub.stall.clear()
    rc, out, err = run(tmp_path, hub.endpoint, 1)
    assert rc == 0, err
    assert (tmp_path / "data" / "fineweb10B" / VAL).read_bytes() == body
    assert hub.gets(VAL) == [None, f"bytes={10 << 20}-"]


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid", "nonsense"])
def test_no_network_is_one_sentence(tmp_path, endpoint):
    rc, out, err = run(tmp_path, endpoint, 1)
    assert rc == 2 and out == "" and len(err.splitlines()) == 1
    assert err.startswith(f"expected {VAL} of kjj0/fineweb10B-gpt2 from the hub, "
                          "found ") and "connect to" in err
    assert visible(tmp_path) == []


def test_more_shards_than_there_are(hub, tmp_path):
    rc, out, err = run(tmp_path, hub.endpoint, 3)
    assert rc == 2 and "expected fineweb_train_000003.bin of" in err.splitlines()[-1]
    assert "no such file there" in err
    assert visible(tmp_path) == sorted([VAL, TRAIN1, TRAIN2, "manifest.json"])


def test_folder_that_cannot_be_written_is_one_sentence(hub, tmp_path):
    (tmp_path / "data").write_text("in the way")
    rc, out, err = run(tmp_path, hub.endpoint, 1)
    assert rc == 2 and len(err.splitlines()) == 1 and "expected a folder to write to" in err


@pytest.mark.parametrize("args", [["0"], ["-3"], ["many"]])
def test_impossible_numbers_are_usage_errors(tmp_path, args):
    rc, out, err = run(tmp_path, "http://127.0.0.1:9", *args)
    assert rc == 2 and "Traceback" not in err and not (tmp_path / "data").exists()


def test_default_is_what_the_track_small_needs(tmp_path, monkeypatch):
    assert cached_fineweb10B.DEFAULT_SHARDS == shards_needed(Config.for_track("small"))
    asked = []
    monkeypatch.setattr(cached_fineweb10B, "download", lambda num_train, *rest: asked.append(num_train) or [])
    cached_fineweb10B.main([])
    cached_fineweb10B.main(["3"])
    assert asked == [cached_fineweb10B.DEFAULT_SHARDS, 3]


def test_a_manifest_that_cannot_be_read_means_to_check_again(hub, tmp_path):
    assert run(tmp_path, hub.endpoint, 1)[0] == 0
    (tmp_path / "data" / "fineweb10B" / "manifest.json").write_text("{broken")
    seen = len(hub.requests)
    assert run(tmp_path, hub.endpoint, 1)[0] == 0
    asked = {path.split("/")[-1] for _, path, _ in hub.requests[seen:] if "/resolve/" in path}
    assert asked == {VAL, TRAIN1}
    assert len(hub.gets(VAL)) == len(hub.gets(TRAIN1)) == 1  # and they are the hub's: nothing is downloaded


def test_a_hash_that_was_not_computed_now_is_called_noted(hub, tmp_path):
    assert run(tmp_path, hub.endpoint, 1)[0] == 0
    path = tmp_path / "data" / "fineweb10B" / TRAIN1
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1  # a bit that flipped on the disk: size and header are as they were
    path.write_bytes(damaged)
    noted = hashlib.sha256(hub.bodies[TRAIN1]).hexdigest()
    rc, out, err = run(tmp_path, hub.endpoint, 1)
    assert rc == 0 and f"sha256 {noted} (as noted in manifest.json; --rehash computes it)" in out
    rc, out, err = run(tmp_path, hub.endpoint, 1, "--rehash")
    assert rc == 0 and f"sha256 {noted}\n" in out and "noted" not in out
    assert path.read_bytes() == hub.bodies[TRAIN1]
