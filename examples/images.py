"""Small images of ten classes as tensors: Fashion-MNIST, CIFAR-10, or files of your own.

    load_images("fashion")   Debian's package dataset-fashion-mnist if installed, else its authors' files
    load_images("cifar10")   the official archive, in its binary version: the other one is pickled
    load_images("FOLDER")    four files with the names and in the format of MNIST

What is fetched is checked by SHA-256 and kept under data/ (or $DATA_PATH). Nothing that is read is executed.
"""
import gzip
import math
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.errors import UsageError
from data.fetch import fetch_url
from data.files import data_root

CLASSES = 10
LARGEST = 1 << 30  # bytes of an unpacked file; the largest of these data sets has 47 million

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
FASHION = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR_TRAIN = [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)]
CIFAR_TEST = ["cifar-10-batches-bin/test_batch.bin"]
CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the image by channel, row and column


class Labelled(NamedTuple):
    images: Tensor  # (n, channels, height, width) uint8
    labels: Tensor  # (n,) int64, 0 to 9


class ImageSet(NamedTuple):
    train: Labelled
    test: Labelled


def load_images(source: str) -> ImageSet:
    """Return the images of "fashion", "cifar10" or a folder. Raises UsageError."""
    if source == "cifar10":
        return load_cifar(data_root() / "data/cifar10" / Path(CIFAR_URL).name)
    if source == "fashion":
        return load_mnist(fashion_folder())
    if not Path(source).is_dir():
        raise UsageError(f"--data: expected fashion, cifar10 or a folder, found {source!r}; see --help")
    return load_mnist(Path(source))


# ------------------------------------------------------------------------------------------------------------
# The format of MNIST


def fashion_folder() -> Path:
    """Return the folder that holds Fashion-MNIST, after fetching what is missing."""
    if all((DEBIAN / name).is_file() for name in FASHION):
        return DEBIAN
    folder = data_root() / "data/fashion-mnist"
    advice = "install Debian's package dataset-fashion-mnist"
    for name, sha256 in FASHION.items():
        fetch_url(f"{FASHION_URL}/{name}", sha256, folder / name, advice)
    return folder


def load_mnist(folder: Path) -> ImageSet:
    """Return the images of four files named as MNIST's."""
    names = list(FASHION)
    return ImageSet(*(labelled(read_idx(folder / images, 3)[:, None], read_idx(folder / labels, 1),
                               folder / labels)
                      for images, labels in (names[:2], names[2:])))


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Return the uint8 array of a gzipped idx file: a header of big-endian numbers, then one byte each.
    Source: https://yann.lecun.com/exdb/mnist/, "the IDX file format"."""
    content = unpacked(path, lambda: gzip.open(path).read(LARGEST + 1))
    header = np.frombuffer(content[:4 + 4 * ndim], dtype=">u4").tolist()
    expected = f"a header of unsigned bytes in {ndim} dimensions"
    if len(header) != 1 + ndim or header[0] != 0x0800 + ndim:
        raise UsageError(f"{path}: expected {expected}, found {content[:4].hex() or 'nothing'}; this is no "
                         "such file of MNIST's format: get it again")
    shape = header[1:]
    pixels = content[4 + 4 * ndim:]
    if math.prod(shape) != len(pixels):
        raise UsageError(f"{path}: expected {math.prod(shape):,} bytes after the header, for {shape}, found "
                         f"{len(pixels):,}; the file is damaged: get it again")
    return np.frombuffer(pixels, dtype=np.uint8).reshape(shape)


# ------------------------------------------------------------------------------------------------------------
# CIFAR-10


def load_cifar(archive: Path) -> ImageSet:
    """Return the images of the official archive, after fetching it where it is missing."""
    advice = f"put the archive there by hand: {archive}"
    fetch_url(CIFAR_URL, CIFAR_SHA256, archive, advice)
    return read_cifar(archive)


def read_cifar(archive: Path) -> ImageSet:
    """Return the images of a tar archive of CIFAR-10's binary version. Nothing is unpacked to the disk."""
    def read(names: list[str]) -> Labelled:
        with tarfile.open(archive) as tar:
            content = b"".join(tar.extractfile(name).read(LARGEST) for name in names)
        if not content or len(content) % CIFAR_RECORD:
            raise UsageError(f"{archive}: expected records of {CIFAR_RECORD} bytes, found "
                             f"{len(content):,} bytes; get it again")
        records = np.frombuffer(content, dtype=np.uint8).reshape(-1, CIFAR_RECORD)
        return labelled(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0], archive)

    return unpacked(archive, lambda: ImageSet(read(CIFAR_TRAIN), read(CIFAR_TEST)))


# ------------------------------------------------------------------------------------------------------------
# Checks of both


def unpacked(path: Path, read: Callable):
    """Return what `read` returns; whatever it raises of a damaged file becomes one sentence."""
    try:
        return read()
    except (OSError, EOFError, KeyError, AttributeError, tarfile.TarError, zlib.error) as error:
        found = str(error).strip() or type(error).__name__
        raise UsageError(f"{path}: expected a whole archive of images or labels, found \"{found}\"; get it "
                         "again, or name another folder with --data") from None


def labelled(images: np.ndarray, labels: np.ndarray, path: Path) -> Labelled:
    """Return both as tensors, after checking that they belong together."""
    if len(images) != len(labels) or not len(images):
        raise UsageError(f"{path}: expected as many images as labels, and at least one, found "
                         f"{len(images):,} and {len(labels):,}; take both from one data set")
    if labels.max() >= CLASSES:
        raise UsageError(f"{path}: expected labels 0 to {CLASSES - 1}, found {labels.max()}; take a data set "
                         f"of {CLASSES} classes")
    return Labelled(torch.tensor(images), torch.tensor(labels, dtype=torch.int64))
