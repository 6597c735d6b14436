"""Files that appear whole or not at all."""
import contextlib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the repository


@contextlib.contextmanager
def written_whole(path: Path, mode: str = "wb"):
    """Yield a file under a partial name beside `path`, and give it the name once its bytes are on the disk.

    An error inside, or one of the disk (OSError), leaves what stood at `path` before as it was. mode: "wb" or
    "w" (UTF-8). The folder of `path` is made where it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # same folder: a rename cannot cross disks
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the name without the bytes
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
