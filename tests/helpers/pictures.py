"""Made-up images of ten patterns, in the files of MNIST and of CIFAR-10."""
import gzip
import io
import struct
import tarfile
from pathlib import Path

import numpy as np

from examples.images import CIFAR_TEST, CIFAR_TRAIN, FASHION, ImageSet, load_mnist


def patterns(count: int, seed: int, size: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """Return noisy images (count, size, size) uint8 of ten waves, and which one each is."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    row, column = np.mgrid[:size, :size] / size
    waves = np.stack([np.sin(2 * np.pi * ((1 + k // 5) * row + k % 5 * column)) for k in range(10)])
    pixels = 128 + 80 * waves[labels] + rng.normal(0, 30, (count, size, size))
    return pixels.clip(0, 255).astype(np.uint8), labels.astype(np.uint8)


def idx(array: np.ndarray) -> bytes:
    """The bytes of an idx file, not yet compressed."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, train: int = 300, test: int = 100) -> Path:
    """Write a data set in the format of MNIST."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = [*patterns(train, 0), *patterns(test, 1)]
    for name, array in zip(FASHION, arrays):
        (folder / name).write_bytes(gzip.compress(idx(array)))
    return folder


def made_up(folder: Path, train: int = 300, test: int = 100) -> ImageSet:
    return load_mnist(write_mnist(folder, train, test))


def cifar_archive(records: dict[str, bytes]) -> bytes:
    """A tar archive with these members, compressed."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in records.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return out.getvalue()


def cifar_records(per_file: int = 2) -> dict[str, bytes]:
    """The six files of CIFAR-10's binary version, small: each image holds its label and number everywhere."""
    def record(label: int, value: int) -> bytes:
        return bytes([label]) + bytes([value]) * 1024 + bytes([value + 1]) * 1024 + bytes([value + 2]) * 1024

    files = {}
    for number, name in enumerate([*CIFAR_TRAIN, *CIFAR_TEST]):
        files[name] = b"".join(record((number + k) % 10, 20 * number + k) for k in range(per_file))
    return files


