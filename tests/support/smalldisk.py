"""Small file systems for a test, mounted by root, and faults of disks; without root the test is
skipped.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = [
    "Disk",
    "JournaledDisk",
    "failing_disk",
    "full_disk",
    "no_inodes_disk",
    "quota_disk",
    "small_disk_at",
]


@contextmanager
def small_disk_at(mount: Path, size: str, *options: str) -> Iterator[Path]:
    """Create ``mount`` and mount a tmpfs of ``size`` (``2m``) there."""
    with _mounted(mount, "-t", "tmpfs", "-o", ",".join((f"size={size}", *options)), "tmpfs"):
        yield mount


@contextmanager
def _mounted(mount: Path, *arguments: object) -> Iterator[None]:
    mount.mkdir()
    made = _run("mount", *arguments, mount)
    if made.returncode != 0:
        pytest.skip(
            "a small file system cannot be mounted here "
            f"({made.stderr.strip() or 'mount failed'}); root may"
        )
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def _run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


class Disk:
    """A file system with a fault that begins and ends."""

    def __init__(self, begin: Callable[..., object], end: Callable[[], object]) -> None:
        self.begin, self.end = begin, end


class JournaledDisk:
    """ext4 in a file, of which copies show what a power failure would leave.

    Parameters
    ----------
    directory : Path
        For the image and its copies.
    """

    def __init__(self, directory: Path) -> None:
        if shutil.which("mkfs.ext4") is None:
            pytest.skip("mkfs.ext4 is not here (package e2fsprogs)")
        self._image, self._directory, self._copies = directory / "image", directory, 0
        self._image.touch()
        os.truncate(self._image, 48 << 20)
        options = ("-E", "lazy_itable_init=0,lazy_journal_init=0")
        if _run("mkfs.ext4", "-q", "-F", *options, self._image).returncode != 0:
            pytest.skip("mkfs.ext4 is not here")

    @contextmanager
    def mounted(self, mount: Path) -> Iterator[Path]:
        """Mount it."""
        with _mounted(mount, "-o", "loop", self._image):
            yield mount

    @contextmanager
    def after_power_failure(self) -> Iterator[Path]:
        """Mount a copy of what has reached the disk by now; its journal is replayed."""
        self._copies += 1
        copy, mount = (self._directory / f"{name}-{self._copies}" for name in ("copy", "mount"))
        subprocess.run(["cp", "--sparse=always", self._image, copy], check=True)
        with _mounted(mount, "-o", "loop", copy):
            yield mount
        copy.unlink()


@contextmanager
def full_disk(mount: Path) -> Iterator[Disk]:
    """ENOSPC: another program fills the disk."""
    with small_disk_at(mount, "4m"):
        yield Disk(*_ballast(mount))


def _ballast(mount: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    ballast = mount / "ballast"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file:
            for size in (65536, 4096, 1):
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError:
                    continue

    return fill, ballast.unlink


@contextmanager
def no_inodes_disk(mount: Path) -> Iterator[Disk]:
    """ENOSPC with free blocks: all inodes are used."""
    with small_disk_at(mount, "64m", "nr_inodes=400"):
        ballast = mount / "ballast"

        def fill() -> None:
            ballast.mkdir()
            for number in range(1000):
                try:
                    (ballast / str(number)).touch()
                except OSError:
                    return
            pytest.skip("this file system does not count inodes")

        yield Disk(fill, lambda: shutil.rmtree(ballast))


@contextmanager
def quota_disk(mount: Path) -> Iterator[Disk]:
    """EDQUOT: the quota of a btrfs subvolume, which also applies to root. (ext4's needs a kernel
    with its format.)
    """
    if shutil.which("mkfs.btrfs") is None:
        pytest.skip("mkfs.btrfs is not here (package btrfs-progs)")
    image = mount.with_name("image")
    image.touch()
    os.truncate(image, 120 * 2**20)
    subprocess.run(["mkfs.btrfs", "-q", image], check=True, capture_output=True)
    with _mounted(mount, "-o", "loop", image):
        for command in (["quota", "enable"], ["qgroup", "limit", "4m"]):
            subprocess.run(["btrfs", *command, mount], check=True, capture_output=True)
        yield Disk(*_ballast(mount))


@contextmanager
def cluster_disk(mount: Path) -> Iterator[None]:
    """An ext4 that allocates in clusters of 64 KiB, which neither ``st_blksize`` nor ``statvfs``
    says.
    """
    image = mount.with_name("image")
    image.touch()
    os.truncate(image, 256 * 2**20)
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not here (package e2fsprogs)")
    made = _run("mkfs.ext4", "-q", "-F", "-O", "bigalloc", "-C", "65536", image)
    if made.returncode != 0:
        pytest.skip(f"mkfs.ext4 makes no clusters ({made.stderr.strip()})")
    with _mounted(mount, "-o", "loop", image):
        yield


@contextmanager
def failing_disk(mount: Path) -> Iterator[Disk]:
    """EIO: the device under an ext4 ends after 64 KiB, for reading and writing.

    The kernel drops cached pages of the files below a directory, or all but their first bytes;
    ``begin`` says which.
    """
    image = mount.with_name("image")
    image.touch()
    os.truncate(image, 16 * 2**20)
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not here (package e2fsprogs)")
    if _run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", image).returncode != 0:
        pytest.skip("mkfs.ext4 makes no such file system")
    with _mounted(mount, "-o", "loop,sync,errors=continue", image):
        device = _run("findmnt", "-n", "-o", "SOURCE", mount).stdout.strip()

        def fail(below: str = "", kept_bytes: int = 0) -> None:
            opened = [
                os.open(path, os.O_RDONLY) for path in (mount / below).rglob("*") if path.is_file()
            ]
            os.sync()
            for fd in opened:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
                os.pread(fd, kept_bytes, 0)
                os.close(fd)
            _shorten(device, 65536)

        yield Disk(fail, lambda: _shorten(device, 0))


def _shorten(device: str, nbytes: int) -> None:
    """Make a loop device end after so many bytes (0: at its file's end): ``lo_sizelimit`` of
    ``struct loop_info64``, LOOP_{GET,SET}_STATUS64.
    """
    fd = os.open(device, os.O_RDWR)
    try:
        info = bytearray(232)
        fcntl.ioctl(fd, 0x4C05, info, True)
        info[32:40] = struct.pack("<Q", nbytes)
        fcntl.ioctl(fd, 0x4C04, bytes(info))
    finally:
        os.close(fd)
