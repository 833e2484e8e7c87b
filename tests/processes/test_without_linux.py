"""A process without what Python and the system have on Linux only, as on macOS."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.training import write_config, write_pairs

#: Names that Python lacks on macOS. Other libraries are imported before they are removed.
AS_ON_MACOS = """
import errno, fcntl, mmap, os, pkgutil, resource, signal, socket, sys
import aiohttp, diskcache, numpy, obstore.store, pytorch_lightning, rich, s3fs, torch, typer, zarr
import torch.utils.data, torch.multiprocessing

for module, names in {
    errno: "EREMOTEIO EBADFD ENOMEDIUM EUCLEAN ENOTUNIQ ENONET ECOMM ELIBACC EL2HLT EHWPOISON",
    fcntl: "F_ADD_SEALS F_GET_SEALS F_SEAL_SHRINK F_SETPIPE_SZ F_NOTIFY F_SETLEASE "
    "F_OFD_GETLK F_OFD_SETLK F_OFD_SETLKW",
    mmap: "MAP_POPULATE MAP_STACK MADV_DONTFORK MADV_HUGEPAGE MADV_POPULATE_READ MADV_REMOVE",
    os: "sched_getaffinity sched_setaffinity memfd_create MFD_CLOEXEC posix_fadvise fdatasync "
    "POSIX_FADV_DONTNEED posix_fallocate copy_file_range splice pidfd_open getrandom eventfd "
    "getxattr setxattr listxattr O_DIRECT O_PATH O_NOATIME unshare setns getresuid",
    resource: "RUSAGE_THREAD prlimit RLIMIT_MSGQUEUE",
    signal: "sigtimedwait sigwaitinfo SIGRTMIN SIGPWR",
    socket: "SO_PEERCRED TCP_USER_TIMEOUT TCP_KEEPIDLE SOCK_CLOEXEC",
}.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)


def no_proc(event, args):
    if event in ("open", "os.listdir", "os.scandir") and str(args[0]).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", args[0])


sys.addaudithook(no_proc)
sys.platform = "darwin"
"""


def run(code: str, *args: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", AS_ON_MACOS + textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_can_be_imported() -> None:
    found = run(
        """
        import importlib, zarrcache

        for module in pkgutil.walk_packages(zarrcache.__path__, "zarrcache."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
                print(module.name)
        """
    )
    assert len(found.split()) > 150


def test_a_cache_is_filled_and_read(tmp_path: Path) -> None:
    values = write_pairs(tmp_path, 3)
    found = run(
        """
        from zarrcache import DataConfig
        from zarrcache.cli import main
        from zarrcache.registry import open_reader
        from zarrcache.train import ZarrDataset

        sys.argv = ["zarrcache", "warm", config := sys.argv[1]]
        try:
            main()
        except SystemExit as done:
            assert not done.code, done.code
        reader = open_reader(DataConfig.from_yaml(config))
        dataset = ZarrDataset(reader, reader.split().train, augmentation=True)
        for epoch in range(2):
            for number in range(len(dataset)):
                dataset[number]
        stats = reader.stats
        print("hits", stats.hits, "misses", stats.misses)
        print(float(reader.load("mp-0", "data")[0].sum()))
        """,
        write_config(tmp_path),
    )
    assert float(found.split()[-1]) == pytest.approx(float(values["mp-0", "data"].mean()))
    assert "misses 0" in found
