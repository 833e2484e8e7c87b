"""What a fork finds of obstore, whose threads do not exist in the child."""

from __future__ import annotations

import gc
import importlib
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
    gc.unfreeze()  # what the suite has frozen
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
def test_garbage_of_the_parent_is_not_destroyed_in_a_child(tmp_path: Path) -> None:
    """A request of obstore would take a lock that a thread of the parent may have held."""
    importlib.import_module("obstore")  # without it there is no request to keep
    log = tmp_path / "destroyed in"
    _Request(log)
    child = FORK.Process(target=gc.collect)
    child.start()
    child.join(60)
    assert (child.exitcode, log.exists()) == (0, False)
    gc.collect()
    assert log.read_text() == str(os.getpid())


@pytest.mark.usefixtures("no_collection")
def test_what_the_program_has_frozen_stays_frozen() -> None:
    """A program freezes what it has imported so that its children do not copy that."""
    for is_frozen in (True, False):
        if is_frozen:
            gc.freeze()
        else:
            gc.unfreeze()
        child = FORK.Process(target=int)
        child.start()
        child.join(60)
        assert (gc.get_freeze_count() > 0) is is_frozen


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
