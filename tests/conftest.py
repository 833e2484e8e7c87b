"""Fixtures shared by all tests: a real S3 server, small stores, real data where available, and an
environment without the user's settings.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.httpsession import DEFAULT_CA_BUNDLE

from tests.support import readers
from tests.support.faultproxy import FaultProxy, running_proxy
from tests.support.s3server import S3Server, running_server
from tests.support.services import sharing_loader
from tests.support.stores import small_group as _small_group
from zarrcache import ZarrS3Reader

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """Restore SIGINT, which a shell ignores in background jobs: interrupted child processes would
    ignore it too.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Where fresh workers are needed, forkserver starts them without the imports (2 s of CPU) that
    # each spawned one repeats; both get the dataset as a pickle.
    multiprocessing.set_forkserver_preload(["torch", "zarr", "pytest"])


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect no garbage while modules and tests are made: almost all of it stays."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        _keep_out_of_the_garbage_collector()


def pytest_runtest_logfinish() -> None:
    """Do the same with modules that a test has imported: Lightning has more objects than all
    tests.
    """
    if len(sys.modules) > _modules + 50:
        _keep_out_of_the_garbage_collector()


def pytest_unconfigure() -> None:
    """Collect once. pytest does so five times, and the interpreter at its end, which is a second
    of CPU in every process of a parallel run.
    """
    _keep_out_of_the_garbage_collector()


_modules = 0


def _keep_out_of_the_garbage_collector() -> None:
    """Free what is garbage, and exempt the rest, mostly modules, from being searched again."""
    global _modules
    gc.collect()
    gc.freeze()
    _modules = len(sys.modules)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first: in a parallel run the many short ones fill the end."""
    longest = ["processes", "property", "docs", "faults", "contract", "cli", "real"]
    items.sort(key=lambda item: [room not in item.path.parent.parts for room in longest])


#: What imports Lightning, or needs processes that have (``support/ranks.py``).
_WITH_LIGHTNING = (
    "tests/processes/test_distributed_training.py",
    "tests/processes/test_monitor.py::test_lightning_",
    "tests/processes/test_monitor.py::test_a_monitor_in_lightning_",
    "tests/docs/test_electrai_guide.py",
    "tests/docs/test_probes_guide.py",
    "tests/docs/test_training_examples.py",
    "tests/contract/test_channels.py::test_data_modules_",
    "tests/cli/test_cli_lock.py::test_another_split_file_",
    "tests/unit/test_lightning.py",
    "tests/unit/test_rho_data_module.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a file in one process of a parallel run, which makes its fixtures once, and all tests
    with Lightning in one, because its import takes 4 s of CPU.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler.loadfile import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> Any:
            if nodeid.startswith(_WITH_LIGHTNING):
                return "Lightning"
            return super()._split_scope(nodeid)

    return Scheduling(config, log)


#: Tests of disks, and of processes that are watched half-way, write to the disk as users do.
_ON_DISK = ("tests/processes", "tests/faults", "tests/real", "tests/unit/disk")
_FREE_BYTES = 4 * 2**30


@pytest.fixture(scope="session")
def _memory() -> Iterator[Path | None]:
    """A directory in memory, where a parallel run may use it: the disk takes two to ten times the
    CPU for each of 200,000 small files.
    """
    shared = Path("/dev/shm")
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    if not parallel or not shared.is_dir() or shutil.disk_usage(shared).free < _FREE_BYTES:
        yield None
        return
    with tempfile.TemporaryDirectory(
        prefix="zarrcache-tests-", dir=shared, ignore_cleanup_errors=True
    ) as directory:
        yield Path(directory)


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, _memory: Path | None) -> Iterator[Path]:
    """As pytest's, which it is for a test that is run by hand: its files remain if it fails. In a
    parallel run it is in memory where that may be.
    """
    room = request.path.parent.relative_to(ROOT).as_posix()
    if _memory is None or room.startswith(_ON_DISK):
        yield request.getfixturevalue("tmp_path")
        return
    directory = Path(tempfile.mkdtemp(prefix=f"{request.function.__name__[:30]}-", dir=_memory))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def no_settings_of_the_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remove credentials, profiles, endpoints and cache settings of the user, for this process and
    its children.
    """
    empty = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        others = ("ZARRCACHE_DIR", "BOTO_CONFIG", "REQUESTS_CA_BUNDLE")
        for name in [n for n in os.environ if n.startswith("AWS_") or n in others]:
            patch.delenv(name)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            (empty / name).touch()
            patch.setenv(name, str(empty / name))
        # One authority to trust: reading the usual 140 costs 25 ms of CPU per s3fs client.
        (empty / "ca.pem").write_text(
            "".join(Path(DEFAULT_CA_BUNDLE).read_text().partition("-----END CERTIFICATE-----")[:2])
        )
        patch.setenv("AWS_CA_BUNDLE", str(empty / "ca.pem"))
        # missing credentials must fail at once, without asking a metadata service
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_writers() -> Iterator[None]:
    """Read stores right after writing them. They are listed twice, as always, but without waiting
    until the listing is stable.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in ("read", "listing"):
            patch.setattr(f"zarrcache.arrays.{module}.wait_until", lambda end_s: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def services_described_once() -> Iterator[None]:
    """Share parsed service descriptions between botocore sessions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("botocore.session.create_loader", sharing_loader())
        yield


@pytest.fixture(scope="session")
def s3_server(
    tmp_path_factory: pytest.TempPathFactory, no_settings_of_the_machine: None
) -> Iterator[S3Server]:
    """A real S3 server: moto, or the one that ZARRCACHE_TEST_S3 names, with _KEY, _SECRET and, if
    it keeps one here, its access log in _LOG.
    """
    endpoint_url = os.environ.get("ZARRCACHE_TEST_S3")
    if endpoint_url:
        key, secret = (
            os.environ.get(f"ZARRCACHE_TEST_S3_{name}", "testing") for name in ("KEY", "SECRET")
        )
        log = os.environ.get("ZARRCACHE_TEST_S3_LOG")
        yield S3Server(
            endpoint_url.rstrip("/"),
            key,
            secret,
            log=Path(log) if log else None,
            checks_credentials=True,
        )
        return
    with running_server(tmp_path_factory.mktemp("s3") / "requests.log") as server:
        yield server


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    """The name of an empty bucket for this test."""
    return s3_server.new_bucket()


@pytest.fixture(scope="session")
def _proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with running_proxy(s3_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def fault_proxy(_proxy: FaultProxy) -> Iterator[FaultProxy]:
    """A proxy in front of ``s3_server`` that counts requests and injects faults; its clients use
    ``s3_server.kwargs_at(fault_proxy.endpoint_url)``.
    """
    _proxy.reset()
    yield _proxy
    _proxy.reset()


@pytest.fixture
def small_group(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``small_group("mp-1.zarr", shape=..., zarr_format=3, ...)`` writes a store below ``tmp_path``
    and returns its arrays.

    An absolute path is taken as it is. See ``tests.support.stores.small_group`` for the layouts.
    """

    @functools.wraps(_small_group)
    def write(path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return _small_group(tmp_path / path, *args, **kwargs)

    return write


@pytest.fixture
def make_reader(tmp_path: Path) -> Callable[..., ZarrS3Reader]:
    """``make_reader(cache={}, normalize=True, ...)`` reads the stores and the map in ``tmp_path``.

    See ``tests.support.readers.make_reader`` for the defaults.
    """
    return functools.partial(readers.make_reader, tmp_path)


@pytest.fixture
def put_store(s3_server: S3Server, _memory: Path | None) -> Callable[..., dict[str, Any]]:
    """``put_store("s3://bucket/prefix/mp-1.zarr", shape=..., ...)`` writes a store to S3 and
    returns its arrays.
    """

    def write(url: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=_memory) as directory:
            local = Path(directory, url.rstrip("/").rpartition("/")[2])
            arrays = _small_group(local, *args, **kwargs)
            s3_server.put_tree(local, url)
            return arrays

    return write


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real charge densities: the directory that ZARRCACHE_TEST_DATA names, or ../shared/data beside
    the repository.
    """
    path = Path(os.environ.get("ZARRCACHE_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not (path / "mp").is_dir():
        pytest.skip(
            f"no real densities at {path}; set ZARRCACHE_TEST_DATA to a directory that holds mp/ "
            "and vasp/"
        )
    return path
