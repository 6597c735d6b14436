"""Where files lie, what is in them, and files that appear whole or not at all."""
import contextlib
import hashlib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the repository


def data_root() -> Path:
    """Return the folder in which data/ lies: $DATA_PATH, or the repository."""
    return Path(os.environ.get("DATA_PATH") or ROOT)


def sha256_of(path) -> str:
    """Return the SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def written_whole(path: Path, mode: str = "wb"):
    """Yield a file under a partial name beside `path`, and give it the name once its bytes are on the disk.

    An error inside, or one of the disk (OSError), leaves what stood at `path` before as it was. mode: "wb" or
    "w" (UTF-8). The folder of `path` is made where it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename cannot cross disks.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the name without the bytes
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
