"""Download FineWeb as GPT-2 tokens that others have computed: 100 M tokens a shard, from the hub dataset below.

    python data/cached_fineweb10B.py [N]      the validation shard, then N training shards, to data/fineweb10B

Without N it brings as many as the track `small` consumes, which the trainer computes from its own schedule. A download
that broke off continues where it ended. Every file is checked for size, header and the hub's SHA-256 before it gets its
name, and noted in manifest.json (name, tokens, bytes, sha256); what is noted there is not downloaded or hashed again.
"""

import argparse
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # Python put data/ first; `data` itself must be found

from data.fetch import FetchError, fetch_hub
from data.shards import HEADER_BYTES, TOKEN_DTYPE, ShardError, data_root, num_tokens

REPO = "kjj0/fineweb10B-gpt2"
MANIFEST = "manifest.json"


def shard_names(num_train: int) -> list[str]:
    """Validation first, so that a download given up early still leaves something to evaluate on. Training starts at 1.
    """
    return ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, num_train + 1)]


def shards_of_small_track() -> int:
    """The training shards that a run of the track `small` reads, computed by the trainer. Needs torch."""
    from data.loader import shards_needed  # here, not above: with N given this script needs neither torch nor the trainer
    from train_gpt import Config
    return shards_needed(Config.for_track("small"))


def read_manifest(folder: Path) -> dict[str, dict]:
    """The entries of manifest.json by file name; none if there is no such file or it cannot be read."""
    try:
        return {entry["name"]: entry for entry in json.loads((folder / MANIFEST).read_text())["files"]}
    except (OSError, ValueError, KeyError, TypeError):  # then every file is checked against the hub again
        return {}


def write_manifest(folder: Path, entries: dict[str, dict]) -> None:
    partial = folder / f".{MANIFEST}.{os.getpid()}.partial"
    partial.write_text(json.dumps({"repo": REPO, "files": sorted(entries.values(), key=lambda e: e["name"])}, indent=1))
    os.replace(partial, folder / MANIFEST)


def is_verified(folder: Path, entry: dict | None) -> bool:
    """Whether a file was verified before and still has its size and header."""
    try:
        return entry is not None and num_tokens(folder / entry["name"]) == entry["tokens"]
    except (KeyError, ShardError):
        return False


def download(num_train: int, folder: Path):
    """Make sure that the validation shard and num_train training shards are in folder, and yield the manifest entry of
    each as soon as it is. Needs no network for files that were verified before. Raises FetchError or ShardError."""
    entries = read_manifest(folder)
    for name in shard_names(num_train):
        if not is_verified(folder, entries.get(name)):
            sha256 = fetch_hub(REPO, name, folder / name, check=num_tokens)
            tokens = num_tokens(folder / name)
            entries[name] = {"name": name, "tokens": tokens, "bytes": HEADER_BYTES + TOKEN_DTYPE.itemsize * tokens,
                             "sha256": sha256}
            write_manifest(folder, entries)  # after each file, so that what is done stays done
        yield entries[name]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=f"Download GPT-2 tokens of FineWeb from the hub dataset {REPO} to data/fineweb10B under $DATA_PATH "
        f"(default: the repository): the validation shard, then N training shards. 200 MB each. Continues where an "
        f"earlier download ended; keeps files that were verified before.")
    parser.add_argument("N", nargs="?", type=int, help="training shards (default: what the track `small` consumes)")
    num_train = parser.parse_args(argv).N
    if num_train is not None and num_train < 1:
        parser.error(f"expected N of at least 1, found {num_train}; leave N out for what the track `small` consumes")
    folder = data_root() / "data" / "fineweb10B"
    files = total = 0
    try:
        for entry in download(shards_of_small_track() if num_train is None else num_train, folder):
            print(f"{folder / entry['name']}: {entry['tokens']:,} tokens, sha256 {entry['sha256']}", flush=True)
            files, total = files + 1, total + entry["tokens"]
    except (FetchError, ShardError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:  # the folder or the manifest cannot be written
        print(f"{folder}: expected a folder to write to, found \"{error.strerror or error}\"; free some space, or "
              f"choose another folder with DATA_PATH", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; start again to continue where this ended", file=sys.stderr)
        return 130
    print(f"{total:,} tokens in {files} files, listed in {folder / MANIFEST}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
