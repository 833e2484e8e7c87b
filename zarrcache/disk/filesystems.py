"""The type of file system that holds a directory, and whether it is local to this node."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from zarrcache.errors import ConfigError

__all__ = ["can_map_to_write", "display_name", "file_system_of", "is_network", "refuse_network"]

#: The kernel's names of network file systems, and their common names.
_NETWORK = {
    "nfs": "NFS", "nfs4": "NFS", "lustre": "Lustre", "gpfs": "GPFS", "mmfs": "GPFS", "beegfs":
    "BeeGFS", "fhgfs": "BeeGFS", "ceph": "CephFS", "cifs": "SMB", "smb3": "SMB", "smbfs": "SMB",
    "afs": "AFS", "9p": "9p", "virtiofs": "virtiofs", "panfs": "PanFS", "wekafs": "WekaFS",
    "orangefs": "OrangeFS", "pvfs2": "OrangeFS", "ocfs2": "OCFS2", "gfs2": "GFS2", "ncpfs":
    "NCP", "coda": "Coda", "vboxsf": "VirtualBox shares",
}  # fmt: skip
#: FUSE file systems on local disks. All others are treated as network file systems, which are too
#: many to list.
_LOCAL_FUSE = frozenset(
    {"fuse-overlayfs", "ntfs-3g", "exfat", "mergerfs", "bindfs", "gocryptfs", "cryfs", "encfs"}
)
#: Writing to a page of a mapped file allocates a new block here.
_COPY_ON_WRITE = frozenset({"btrfs", "bcachefs"})
_MOUNTINFO = Path("/proc/self/mountinfo")


def file_system_of(path: str | os.PathLike[str]) -> str | None:
    """The kernel's name of the file system that holds ``path``, which need not exist.

    Returns
    -------
    str or None
        For example ``ext4``, ``nfs4``, ``fuse.sshfs``; None without a mount table (macOS).
    """
    # Resolve the path first, because that makes an automounter mount it.
    real, best = (os.path.realpath(path), ("", ""))
    try:
        lines = _MOUNTINFO.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    for line in lines:
        left, _, right = line.partition(" - ")
        fields, kinds = left.split(), right.split()
        if len(fields) < 5 or not kinds:
            continue
        # The kernel writes spaces and the like as octal escapes.
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields[4])
        if (real == point or real.startswith(point.rstrip("/") + "/")) and len(point) >= len(
            best[0]
        ):
            best = (point, kinds[0])  # of several mounts at one point the last is visible
    return best[1] or None


def is_network(kind: str | None) -> bool:
    """Whether a file system of this type is on another machine, judging by its name.

    FUSE file systems count as remote, except for known local ones.
    """
    if kind is None:
        return False
    family, _, subtype = kind.partition(".")
    return kind in _NETWORK or (family == "fuse" and subtype not in _LOCAL_FUSE)


def can_map_to_write(directory: Path) -> bool:
    """Whether files in ``directory`` can safely be written through a memory map.

    SQLite does so with the index of its write-ahead log. It is unsafe over a network, and on a
    copy-on-write file system: there a written page needs a new block, and a full disk or an
    exhausted quota is not an error but SIGBUS, which kills the process (measured on btrfs,
    tests/faults/test_disk_faults.py).
    """
    kind = file_system_of(directory)
    return kind not in _COPY_ON_WRITE and not is_network(kind)


def display_name(kind: str) -> str:
    """``NFS (nfs4)``: the common name and the kernel's; one name if they are the same."""
    return f"{_NETWORK[kind]} ({kind})" if _NETWORK.get(kind, kind) != kind else kind


def refuse_network(directory: Path, *, is_allowed: bool) -> None:
    """Refuse a directory on a network file system unless ``is_allowed``.

    Raises
    ------
    ConfigError
    """
    kind = file_system_of(directory)
    if kind is None or not is_network(kind) or is_allowed:
        return
    near = _scratch()
    example = f"dir: {near}/zarrcache" if near else "its scratch directory"
    raise ConfigError(
        f"cache.dir {directory} is on {display_name(kind)}, a network file system: locks, SQLite "
        "and memory maps are slow or unsafe there. "
        f"Choose a disk of this node, for example {example}. If there is none, set "
        "cache.allow_network_fs: true (docs/guides/network-file-systems.md says what that costs)."
    )


def _scratch() -> str | None:
    """A directory for temporary files on a local disk; None if there is none."""
    for name in ("SLURM_TMPDIR", "TMPDIR", "TMP"):
        path = os.environ.get(name, "")
        if os.path.isdir(path) and not is_network(file_system_of(path)):
            return f"${{{name}}}"
    path = tempfile.gettempdir()
    return None if is_network(file_system_of(path)) else path
