"""Reading and fetching images: the formats byte by byte, and what is wrong in a sentence."""
import gzip
import hashlib
import http.server
import threading
from functools import partial

import numpy as np
import pytest

from data.errors import UsageError
from data.fetch import FetchError, fetch_url
from examples import images
from examples.images import DEBIAN, FASHION, load_images, read_cifar
from tests.helpers.pictures import cifar_archive, cifar_records, idx, patterns, write_mnist

IMAGES, LABELS, *_ = FASHION


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def served(tmp_path_factory):
    """(folder, the address of its file "file" on a server of this machine)."""
    folder = tmp_path_factory.mktemp("served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/file"
        server.shutdown()


def test_files_as_mnists_are_read_as_they_were_written(tmp_path):
    pixels, labels = patterns(300, 0)
    found = load_images(str(write_mnist(tmp_path)))
    assert found.train.images.shape == (300, 1, 28, 28) and len(found.test.labels) == 100
    assert (found.train.images[:, 0].numpy() == pixels).all() and (found.train.labels.numpy() == labels).all()


def test_cifar_is_read_by_channel_and_record(tmp_path):
    path = tmp_path / "cifar.tar.gz"
    path.write_bytes(cifar_archive(cifar_records()))
    train, test = read_cifar(path)
    assert train.images.shape == (10, 3, 32, 32) and test.labels.tolist() == [5, 6]
    assert train.labels.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert (train.images[3].reshape(3, -1).numpy() == np.array([[21], [22], [23]])).all()


GOOD = idx(patterns(300, 0)[0])


@pytest.mark.parametrize("name, content, message", [
    (IMAGES, gzip.compress(GOOD)[:-100], "expected a whole archive"),
    (IMAGES, b"", "a header of unsigned bytes in 3 dimensions, found nothing"),
    (IMAGES, b"no gzip at all", "Not a gzipped file"),
    (IMAGES, gzip.compress(b""), "found nothing"),
    (IMAGES, gzip.compress(GOOD[:-1]), "expected 235,200 bytes after the header"),
    (IMAGES, gzip.compress(GOOD[:4] + b"\xff" * 12 + GOOD[16:]), "after the header"),
    (IMAGES, gzip.compress(idx(patterns(300, 0)[1])), "in 3 dimensions, found 00000801"),
    (LABELS, gzip.compress(GOOD), "in 1 dimensions"),
    (LABELS, gzip.compress(idx(np.full(300, 10))), "expected labels 0 to 9, found 10"),
    (LABELS, gzip.compress(idx(np.zeros(299))), "found 300 and 299"),
], ids=lambda value: value if isinstance(value, str) else "")  # an archive holds the time it was made at
def test_a_damaged_file_is_refused_in_a_sentence(tmp_path, name, content, message):
    (write_mnist(tmp_path) / name).write_bytes(content)
    with pytest.raises(UsageError, match="expected .*found .*; ") as error:
        load_images(str(tmp_path))
    assert message in str(error.value) and name in str(error.value)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UsageError, match="expected fashion, cifar10 or a folder, found 'fasion'"):
        load_images("fasion")
    with pytest.raises(UsageError, match=IMAGES):
        load_images(str(tmp_path))


@pytest.mark.parametrize("change, message", [
    (lambda files: files.popitem(), "test_batch.bin"),
    (lambda files: files.update({images.CIFAR_TEST[0]: b"1234"}), "records of 3073 bytes, found 4"),
    (lambda files: files.update({images.CIFAR_TEST[0]: b"\n" + bytes(3072)}), "labels 0 to 9, found 10"),
])
def test_an_archive_of_cifar_that_lies_is_refused(tmp_path, change, message):
    files = cifar_records()
    change(files)
    path = tmp_path / "cifar.tar.gz"
    path.write_bytes(cifar_archive(files))
    with pytest.raises(UsageError, match=message):
        read_cifar(path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UsageError, match="expected a whole archive"):
        read_cifar(path)


def test_a_file_is_fetched_once_and_kept_by_its_hash(served, tmp_path):
    folder, address = served
    (folder / "file").write_bytes(b"images")
    sha256 = hashlib.sha256(b"images").hexdigest()
    path = tmp_path / "new/file"
    fetch_url(address, sha256, path, "ask a friend")
    assert path.read_bytes() == b"images"
    fetch_url("http://127.0.0.1:9/nobody", sha256, path, "ask a friend")  # is there: no network is needed
    path.write_bytes(b"damaged")
    fetch_url(address, sha256, path, "ask a friend")
    assert path.read_bytes() == b"images"


@pytest.mark.parametrize("content, message", [(b"another file", "with SHA-256 0{64}, found"), (None, "404")])
def test_what_cannot_be_fetched_leaves_nothing_behind(served, tmp_path, content, message):
    folder, address = served
    if content:
        (folder / "file").write_bytes(content)
    with pytest.raises(FetchError, match=message) as error:
        fetch_url(address, "0" * 64, tmp_path / "file", "ask a friend")
    assert "ask a friend" in str(error.value) and not list(tmp_path.iterdir())


def test_without_network_the_package_of_debian_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "DEBIAN", tmp_path / "none")
    monkeypatch.setattr(images, "FASHION_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    with pytest.raises(UsageError, match="install Debian's package dataset-fashion-mnist"):
        load_images("fashion")


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_the_package_of_debian_holds_fashion_mnist():
    for name, sha256 in FASHION.items():
        assert hashlib.sha256((DEBIAN / name).read_bytes()).hexdigest() == sha256
    train, test = load_images("fashion")
    assert train.images.shape == (60_000, 1, 28, 28) and test.images.shape == (10_000, 1, 28, 28)
    assert train.labels.bincount().tolist() == [6000] * 10
