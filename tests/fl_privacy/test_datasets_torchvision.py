"""Published data: read from a folder, locked, and a failed download that says what to do."""

import gzip
import hashlib
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import numpy as np
import pytest
import torchvision.datasets as published

from fl_privacy.component import ComponentError, create
from fl_privacy.datasets.arrays import DatasetError
from fl_privacy.datasets.torchvision import CIFAR10, MNIST, FashionMNIST, data_folder


def idx(array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    """An array of uint8 in the format of MNIST's files."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def images(n: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)


def write_raw(folder: Path) -> None:
    """Seven training and five test images as idx files, as torchvision unpacks them."""
    folder.mkdir(parents=True)
    for prefix, n in (("train", 7), ("t10k", 5)):
        labels = (np.arange(n) % 10).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images(n)))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))


@pytest.mark.parametrize(("kind", "name"), [(MNIST, "MNIST"), (FashionMNIST, "FashionMNIST")])
def test_files_in_the_folder_are_read_and_nothing_is_fetched(
    tmp_path: Path, kind: type[MNIST] | type[FashionMNIST], name: str
) -> None:
    write_raw(tmp_path / name / "raw")
    dataset = kind(folder=str(tmp_path))
    test = dataset.load("test")
    assert test.inputs.shape == (5, *dataset.task().input_shape)
    assert np.array_equal((test.inputs[:, 0] * 255).round().numpy(), images(5))
    assert dataset.labels("train").tolist() == list(range(7))


class CountingHandler(SimpleHTTPRequestHandler):
    fetched: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.fetched.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A local server: its address and the folder it serves."""
    folder = tmp_path / "mirror"
    handler = partial(CountingHandler, directory=str(folder))
    CountingHandler.fetched.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", folder
        server.shutdown()


def test_many_readers_fetch_as_much_as_one(
    tmp_path: Path, mirror: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, source = mirror
    write_raw(source)
    resources = []
    for file in sorted(source.iterdir()):
        archive = source / f"{file.name}.gz"
        archive.write_bytes(gzip.compress(file.read_bytes(), mtime=0))
        resources.append((archive.name, hashlib.md5(archive.read_bytes()).hexdigest()))
    monkeypatch.setattr(published.MNIST, "resources", resources)
    monkeypatch.setattr(published.MNIST, "mirrors", [address])
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def requests(readers: int) -> list[str]:
        CountingHandler.fetched.clear()
        dataset = MNIST(folder=str(tmp_path / "new" / f"for {readers}"))
        with ThreadPoolExecutor(readers) as pool:
            sizes = pool.map(lambda _: len(dataset.labels("train")), range(readers))
            assert list(sizes) == [7] * readers
        return sorted(CountingHandler.fetched)

    alone = requests(1)
    assert len(set(alone)) == len(resources)
    assert requests(8) == alone


def test_a_failed_download_names_the_files_and_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = (tmp_path / "nowhere").as_uri() + "/"
    monkeypatch.setattr(published.MNIST, "mirrors", [nowhere])
    monkeypatch.setattr(published.CIFAR10, "url", nowhere + "cifar-10-python.tar.gz")
    with pytest.raises(DatasetError, match=rf"images-idx3.*in {tmp_path}.*by hand"):
        MNIST(folder=str(tmp_path)).prepare()
    with pytest.raises(DatasetError, match=rf"cifar-10-python\.tar\.gz in {tmp_path}.*by hand"):
        CIFAR10(folder=str(tmp_path)).prepare()


def test_a_damaged_file_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    write_raw(tmp_path / "MNIST" / "raw")
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(idx(images(7))[:200])
    with pytest.raises(DatasetError, match=f"in {tmp_path}.*damaged"):
        MNIST(folder=str(tmp_path)).prepare()


def test_the_folder_is_the_setting_then_the_variable_then_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FL_PRIVACY_DATA", raising=False)
    assert data_folder("") == Path.home() / ".cache" / "fl-privacy" / "data"
    monkeypatch.setenv("FL_PRIVACY_DATA", "/elsewhere")
    assert data_folder("") == Path("/elsewhere")
    assert data_folder("/here") == Path("/here")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_a_relative_folder_is_refused(name: str) -> None:
    with pytest.raises(ComponentError, match="absolute folder"):
        create("datasets", f"{name}(folder='data')")
