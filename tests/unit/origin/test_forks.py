"""What a fork finds of obstore, whose threads do not exist in the child."""

from __future__ import annotations

import gc
import multiprocessing
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from zarrcache.config import FetchConfig
from zarrcache.origin import _obstore
from zarrcache.origin._botocore import S3Settings
from zarrcache.origin._in_flight import InFlight
from zarrcache.origin._s3_options import S3Options

FORK = multiprocessing.get_context("fork")

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class _Request:
    """Garbage that only the collector finds, and that says in which process it was destroyed."""

    def __init__(self, log: Path) -> None:
        self.itself, self.log = self, log

    def __del__(self) -> None:
        self.log.write_text(f"{os.getpid()}")


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
def test_garbage_of_the_parent_is_not_destroyed_in_a_child(tmp_path: Path) -> None:
    """A request of obstore would take a lock that a thread of the parent may have held."""
    assert _obstore.is_usable()
    log = tmp_path / "destroyed in"
    _Request(log)
    child = FORK.Process(target=gc.collect)
    child.start()
    child.join(60)
    assert (child.exitcode, log.exists()) == (0, False)
    gc.collect()
    assert log.read_text() == str(os.getpid())


def test_a_client_of_the_parent_is_not_destroyed_in_a_child(tmp_path: Path) -> None:
    """Not even if the child drops the last reference, as fsspec does with its file systems."""
    settings = S3Settings(
        url="http://127.0.0.1:9",
        is_virtual_hosted=False,
        region="us-east-1",
        is_signed=False,
        proxy_url=None,
        verify=True,
        stores_checksum=False,
        only_s3fs=(),
    )
    options, fetch = S3Options.of({"anon": True}), FetchConfig()
    engines = [_obstore.ObstoreEngine("bucket", options, settings, fetch, InFlight(8))]
    log = tmp_path / "destroyed in"
    end = weakref.finalize(engines[0], lambda: log.write_text(f"{os.getpid()}"))
    end.atexit = False
    child = FORK.Process(target=engines.clear)
    child.start()
    child.join(60)
    assert (child.exitcode, log.exists()) == (0, False)
    engines.clear()
    assert log.read_text() == str(os.getpid())
