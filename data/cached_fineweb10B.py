"""Download FineWeb as GPT-2 tokens that others have computed, 100 M tokens a shard, from a hub dataset.

    python data/cached_fineweb10B.py [N]      the validation shard, then N training shards, to data/fineweb10B
                                              under $DATA_PATH (default: the repository), 200 MB each

Without N it brings as many as the track `small` consumes. A download that broke off continues where it ended.
Every file is checked for size, header and the hub's SHA-256 before it gets its name, and its SHA-256 is noted
in manifest.json; what is noted there is neither downloaded nor, without --rehash, hashed again.
"""
import json
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # as a script, Python looks for modules in data/ only
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data.errors import CommandLine, UsageError, run_program
from data.fetch import fetch_hub
from data.files import data_root, sha256_of, written_whole
from data.shards import ShardError, num_tokens

REPO = "kjj0/fineweb10B-gpt2"
MANIFEST = "manifest.json"
MOST_SHARDS = 103  # that the hub has, 10.2 B tokens
DEFAULT_SHARDS = 6  # what data.loader.shards_needed computes for the track `small`


def shard_names(num_train: int) -> list[str]:
    """Return the files to fetch, validation first: without it there is nothing to evaluate on. Raises
    UsageError for more than there are."""
    if num_train > MOST_SHARDS:
        raise UsageError(f"expected at most the {MOST_SHARDS} training shards that {REPO} has, found "
                         f"{num_train:,} to be fetched; ask for less, or train fewer steps")
    return ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, num_train + 1)]


def read_manifest(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that was verified, by its name; none if they cannot be read."""
    try:
        return dict(json.loads((folder / MANIFEST).read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError):  # then every file is checked against the hub again
        return {}


def is_whole(path: Path, sha256: str, rehash: bool) -> bool:
    """Return whether a file verified before is still a whole shard and, with rehash, has its SHA-256."""
    try:
        return num_tokens(path) > 0 and (not rehash or sha256_of(path) == sha256)
    except ShardError:
        return False


def download(num_train: int, folder: Path, rehash: bool) -> Iterator[tuple[Path, str, bool]]:
    """Make sure that the validation shard and num_train training shards are in folder.

    Yields (path, SHA-256, whether it was computed now) of each as soon as it is. Needs no network for files
    that were verified before. Raises FetchError or ShardError.
    """
    verified = read_manifest(folder)
    for name in shard_names(num_train):
        path, hashed = folder / name, rehash
        if name not in verified or not is_whole(path, verified[name], rehash):
            verified[name] = fetch_hub(REPO, name, path, check=num_tokens)
            hashed = True
            with written_whole(folder / MANIFEST, "w") as file:  # each time, so that what is done stays done
                json.dump({"repo": REPO, "sha256": verified}, file, indent=1)
        yield path, verified[name], hashed


def main(argv: list[str]) -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("N", nargs="?", type=int, default=DEFAULT_SHARDS,
                        help="training shards (default: %(default)s, what the track `small` consumes)")
    parser.add_argument("--rehash", action="store_true",
                        help="compute the SHA-256 of files that are there already")
    args = parser.parse_args(argv)
    if args.N < 1:
        raise UsageError(f"expected N of at least 1, found {args.N}; leave N out for what `small` consumes")

    folder = data_root() / "data" / "fineweb10B"
    sizes = []
    try:
        for path, sha256, hashed in download(args.N, folder, args.rehash):
            noted = "" if hashed else f" (as noted in {MANIFEST}; --rehash computes it)"
            sizes.append(num_tokens(path))
            print(f"{path}: {sizes[-1]:,} tokens, sha256 {sha256}{noted}", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:  # the folder or the manifest cannot be written
        raise UsageError(f"{folder}: expected a folder to write to, found \"{error.strerror or error}\"; "
                         "free some space, or choose another folder with DATA_PATH") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt("start again to continue where this ended") from None
    print(f"{sum(sizes):,} tokens in {len(sizes)} files, listed in {folder / MANIFEST}")


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
