"""A directory mounted under the name of a network file system: a FUSE server that hands everything
on to a directory on disk.

The kernel then lists it as ``fuse.sshfs`` (or what the test asks for), and locks, renames, maps and
permissions are the kernel's own. It speaks the kernel's protocol itself (``/dev/fuse``), so that no
package is needed; it needs root. The server is a process of its own, which ends, and unmounts, when
its standard input does.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["can_mount", "network_mount"]

_HEADER = struct.Struct("<IIQQIIIHH")
_MNT_DETACH = 2


def can_mount() -> bool:
    """Whether this is root on a Linux with FUSE."""
    return (
        sys.platform == "linux" and os.geteuid() == 0 and os.access("/dev/fuse", os.R_OK | os.W_OK)
    )


@contextlib.contextmanager
def network_mount(directory: Path, kind: str = "sshfs", *, read_s: float = 0.0) -> Iterator[Path]:
    """Mount ``directory/net`` as ``fuse.{kind}``; its files are in ``directory/disk``.

    Each read of at most 128 KiB takes ``read_s`` longer. The kernel keeps no page of a file beyond
    its next opening.
    """
    target, disk = directory / "net", directory / "disk"
    target.mkdir()
    disk.mkdir()
    command = [sys.executable, __file__, str(target), str(disk), kind, str(read_s)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if process.stdout.readline() != "mounted\n":
            raise RuntimeError(f"{target} could not be mounted")
        yield target
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


class _Server:
    """The file system. A node is an open descriptor (``O_PATH``), so a rename changes nothing."""

    def __init__(self, fuse: int, disk: str, read_s: float) -> None:
        self._fuse, self._read_s = fuse, read_s
        root = os.open(disk, os.O_PATH | os.O_DIRECTORY)
        self._nodes = {1: root}
        # locks belong to a node: one node per file
        self._numbers = {self._identity(root): 1}
        self._lookups = {1: 1}
        self._next = 2

    def serve(self) -> None:
        """Answer until it is unmounted."""
        while True:
            try:
                request = os.read(self._fuse, 1 << 18)
            except OSError as exc:
                if exc.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                return
            length, code, unique, node, *_ = _HEADER.unpack_from(request)
            handler = _HANDLERS.get(code)
            if code in (2, 42):  # forgotten; no answer is expected
                self._forget(code, node, request[_HEADER.size : length])
                continue
            try:
                answer = (
                    handler(self, node, request[_HEADER.size : length])
                    if handler
                    else -errno.ENOSYS
                )
            except OSError as exc:
                answer = -(exc.errno or errno.EIO)
            error, body = (answer, b"") if isinstance(answer, int) else (0, answer)
            with contextlib.suppress(OSError):  # the caller was killed meanwhile
                os.write(self._fuse, struct.pack("<IiQ", 16 + len(body), error, unique) + body)

    @staticmethod
    def _identity(fd: int) -> tuple[int, int]:
        found = os.fstat(fd)
        return found.st_dev, found.st_ino

    def _path(self, node: int) -> str:
        return f"/proc/self/fd/{self._nodes[node]}"

    def _entry(self, parent: int, name: bytes) -> bytes:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._nodes[parent])
        identity = self._identity(fd)
        number = self._numbers.get(identity)
        if number is None:
            number, self._next = self._next, self._next + 1
            self._nodes[number], self._numbers[identity], self._lookups[number] = fd, number, 0
        else:
            os.close(fd)
        self._lookups[number] += 1
        return struct.pack("<QQQQII", number, 0, 1, 1, 0, 0) + self._attributes(self._nodes[number])

    @staticmethod
    def _attributes(fd: int) -> bytes:
        s = os.fstat(fd)
        times = (s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns)
        seconds, fractions = [t // 10**9 for t in times], [t % 10**9 for t in times]
        rest = (s.st_mode, s.st_nlink, s.st_uid, s.st_gid, 0, 4096, 0)
        return struct.pack("<6Q10I", s.st_ino, s.st_size, s.st_blocks, *seconds, *fractions, *rest)

    def _forget(self, code: int, node: int, body: bytes) -> None:
        lost = (
            [(node, *struct.unpack_from("<Q", body))]
            if code == 2
            else list(struct.iter_unpack("<QQ", body[8:]))
        )
        for number, times in lost:
            if number != 1 and number in self._nodes:
                self._lookups[number] -= times
                if self._lookups[number] <= 0:
                    fd = self._nodes.pop(number)
                    del self._lookups[number], self._numbers[self._identity(fd)]
                    os.close(fd)

    def init(self, node: int, body: bytes) -> bytes:
        """Version 7.31, with large writes."""
        (_, _, readahead) = struct.unpack_from("<III", body)
        return struct.pack(
            "<IIIIHHIIHHI7I", 7, 31, readahead, 1 << 5, 16, 12, 1 << 17, 1, 0, 0, 0, *[0] * 7
        )

    def lookup(self, node: int, body: bytes) -> bytes:
        return self._entry(node, body.rstrip(b"\0"))

    def getattr(self, node: int, body: bytes) -> bytes:
        return struct.pack("<QII", 1, 0, 0) + self._attributes(self._nodes[node])

    def setattr(self, node: int, body: bytes) -> bytes:
        valid, _, _, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _ = (
            struct.unpack("<II6Q8I", body)
        )
        path = self._path(node)
        if valid & 6:
            os.chown(path, uid if valid & 2 else -1, gid if valid & 4 else -1)
        if valid & 1:
            os.chmod(path, stat.S_IMODE(mode))
        if valid & 8:
            os.truncate(path, size)
        if valid & 0x30:
            now = os.stat(path)
            new = (
                atime * 10**9 + atime_ns if valid & 0x10 else now.st_atime_ns,
                mtime * 10**9 + mtime_ns if valid & 0x20 else now.st_mtime_ns,
            )
            os.utime(path, ns=new)
        return self.getattr(node, b"")

    def readlink(self, node: int, body: bytes) -> bytes:
        return os.readlink(b"", dir_fd=self._nodes[node])

    def symlink(self, node: int, body: bytes) -> bytes:
        name, target = body.split(b"\0")[:2]
        os.symlink(target, name, dir_fd=self._nodes[node])
        return self._entry(node, name)

    def mkdir(self, node: int, body: bytes) -> bytes:
        mode, _ = struct.unpack_from("<II", body)
        name = body[8:].rstrip(b"\0")
        os.mkdir(name, mode, dir_fd=self._nodes[node])
        return self._entry(node, name)

    def unlink(self, node: int, body: bytes) -> bytes:
        os.unlink(body.rstrip(b"\0"), dir_fd=self._nodes[node])
        return b""

    def rmdir(self, node: int, body: bytes) -> bytes:
        os.rmdir(body.rstrip(b"\0"), dir_fd=self._nodes[node])
        return b""

    def rename(self, node: int, body: bytes) -> bytes:
        (new,) = struct.unpack_from("<Q", body)
        old_name, new_name = body[8:].split(b"\0")[:2]
        os.rename(old_name, new_name, src_dir_fd=self._nodes[node], dst_dir_fd=self._nodes[new])
        return b""

    def rename2(self, node: int, body: bytes) -> bytes:
        return self.rename(node, body[:8] + body[16:])

    def open(self, node: int, body: bytes) -> bytes:
        flags, _ = struct.unpack_from("<II", body)
        fd = os.open(
            self._path(node),
            flags & ~(os.O_CREAT | os.O_EXCL | os.O_NOCTTY | os.O_APPEND | os.O_NOFOLLOW),
        )
        return struct.pack("<QII", fd, 0, 0)

    def create(self, node: int, body: bytes) -> bytes:
        flags, mode, _, _ = struct.unpack_from("<IIII", body)
        name = body[16:].rstrip(b"\0")
        fd = os.open(
            name, (flags & ~os.O_APPEND) | os.O_CREAT, stat.S_IMODE(mode), dir_fd=self._nodes[node]
        )
        return self._entry(node, name) + struct.pack("<QII", fd, 0, 0)

    def read(self, node: int, body: bytes) -> bytes:
        fd, offset, size = struct.unpack_from("<QQI", body)
        time.sleep(self._read_s)
        return os.pread(fd, size, offset)

    def write(self, node: int, body: bytes) -> bytes:
        fd, offset, size = struct.unpack_from("<QQI", body)
        return struct.pack("<II", os.pwrite(fd, body[40 : 40 + size], offset), 0)

    def statfs(self, node: int, body: bytes) -> bytes:
        s = os.fstatvfs(self._nodes[node])
        return struct.pack(
            "<5Q4I6I",
            s.f_blocks,
            s.f_bfree,
            s.f_bavail,
            s.f_files,
            s.f_ffree,
            s.f_bsize,
            255,
            s.f_frsize,
            *[0] * 7,
        )

    def release(self, node: int, body: bytes) -> bytes:
        os.close(struct.unpack_from("<Q", body)[0])
        return b""

    def fsync(self, node: int, body: bytes) -> bytes:
        os.fsync(struct.unpack_from("<Q", body)[0])
        return b""

    def done(self, node: int, body: bytes) -> bytes:
        return b""

    def opendir(self, node: int, body: bytes) -> bytes:
        return struct.pack("<QII", os.open(self._path(node), os.O_RDONLY | os.O_DIRECTORY), 0, 0)

    def readdir(self, node: int, body: bytes) -> bytes:
        fd, offset, size = struct.unpack_from("<QQI", body)
        answer = b""
        for number, name in enumerate(sorted(map(os.fsencode, os.listdir(fd)))):
            entry = struct.pack("<QQII", number + 2, number + 1, len(name), 0) + name
            entry += bytes(-len(entry) % 8)
            if number >= offset:
                if len(answer) + len(entry) > size:
                    break
                answer += entry
        return answer


_HANDLERS = {
    1: _Server.lookup, 3: _Server.getattr, 4: _Server.setattr, 5: _Server.readlink,
    6: _Server.symlink, 9: _Server.mkdir, 10: _Server.unlink, 11: _Server.rmdir,
    12: _Server.rename, 14: _Server.open, 15: _Server.read, 16: _Server.write,
    17: _Server.statfs, 18: _Server.release, 20: _Server.fsync, 25: _Server.done,
    26: _Server.init, 27: _Server.opendir, 28: _Server.readdir, 29: _Server.release,
    30: _Server.done, 35: _Server.create, 45: _Server.rename2,
}  # fmt: skip


def _mount(target: str, disk: str, kind: str, read_s: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    fuse = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
    if libc.mount(
        b"server:/scratch", os.fsencode(target), f"fuse.{kind}".encode(), 0, options.encode()
    ):
        raise OSError(ctypes.get_errno(), f"cannot mount {target}")

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        libc.umount2(os.fsencode(target), _MNT_DETACH)
        os._exit(0)

    os.umask(0)
    threading.Thread(target=end_with_parent, daemon=True).start()
    print("mounted", flush=True)
    _Server(fuse, disk, float(read_s)).serve()


if __name__ == "__main__":
    _mount(*sys.argv[1:])
