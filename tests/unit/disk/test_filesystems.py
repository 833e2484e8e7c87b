"""File systems: the mount table as the kernel writes it, and which types are network ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from zarrcache.disk import filesystems as mounts
from zarrcache.disk.filesystems import display_name, file_system_of, is_network, refuse_network
from zarrcache.errors import ConfigError

#: Lines of real nodes.
TABLE = r"""
21 1 8:2 / / rw,relatime shared:1 - ext4 /dev/sda2 rw,discard
22 21 0:21 / /proc rw,nosuid shared:5 - proc proc rw
25 21 0:24 / /dev/shm rw,nosuid,nodev shared:3 - tmpfs tmpfs rw
60 21 0:46 / /home rw,relatime shared:30 - autofs systemd-1 rw,fd=54,pgrp=1
62 60 0:52 / /home/me rw,relatime shared:31 - nfs4 fs1.example.org:/home/me rw,vers=4.2,hard
63 62 8:4 / /home/me/my\040disk rw,relatime - xfs /dev/sdb1 rw
70 21 0:60 / /lustre/project rw,flock - lustre 10.2.0.1@o2ib:10.2.0.2@o2ib:/project rw,flock
71 21 0:61 / /gpfs rw,relatime shared:40 - gpfs gpfs1 rw
72 21 0:62 / /mnt/beegfs rw,relatime shared:41 - beegfs beegfs_nodev rw,cfgFile=/etc/beegfs.conf
73 21 0:63 /volumes/a /ceph rw,relatime - ceph 10.3.0.1:6789:/volumes/a rw,name=a,acl
74 21 0:64 / /mnt/win rw,relatime - cifs //server/share rw,vers=3.1.1,username=me
75 21 0:65 / /mnt/ssh rw,nosuid,nodev - fuse.sshfs me@host: rw,user_id=1000,group_id=1000
76 21 0:66 / /mnt/jfs rw - fuse.juicefs JuiceFS:vol rw,user_id=0,allow_other
77 21 0:67 / /ctr rw - fuse.fuse-overlayfs fuse-overlayfs rw,user_id=0,group_id=0
78 21 8:6 / /mnt/ntfs rw - fuseblk /dev/sdc1 rw,user_id=0,group_id=0
79 21 8:7 / /scratch rw - xfs /dev/nvme0n1 rw
80 79 0:70 / /scratch rw - nfs fs2:/scratch rw,vers=3

not a line of the table
"""


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The table as a file, in place of this machine's."""
    path = tmp_path / "mountinfo"
    path.write_text(TABLE)
    monkeypatch.setattr(mounts, "_MOUNTINFO", path)
    return path


@pytest.mark.parametrize(
    ("path", "kind", "network"),
    [
        ("/tmp/zarrcache", "ext4", False),
        ("/dev/shm/zarrcache", "tmpfs", False),
        ("/home/me/zarrcache", "nfs4", True),
        ("/home/me", "nfs4", True),
        ("/home/mean/zarrcache", "autofs", False),
        ("/home/me/my disk/zarrcache", "xfs", False),
        ("/lustre/project/me", "lustre", True),
        ("/lustre", "ext4", False),
        ("/gpfs/me", "gpfs", True),
        ("/gpfsx/me", "ext4", False),
        ("/mnt/beegfs/me", "beegfs", True),
        ("/ceph/me", "ceph", True),
        ("/mnt/win/me", "cifs", True),
        ("/mnt/ssh/me", "fuse.sshfs", True),
        ("/mnt/jfs/me", "fuse.juicefs", True),
        ("/ctr/me", "fuse.fuse-overlayfs", False),
        ("/mnt/ntfs/me", "fuseblk", False),
        ("/scratch/me", "nfs", True),
    ],
)
@pytest.mark.usefixtures("table")
def test_the_innermost_mount_decides_the_type(path: str, kind: str, network: bool) -> None:
    """Among them a mount over another, a space in a name, a path that only begins like a mount
    point, and paths that do not exist.
    """
    assert file_system_of(path) == kind
    assert is_network(kind) is network


def test_a_link_is_followed(tmp_path: Path, table: Path) -> None:
    """``/scratch`` is a link on many clusters."""
    (tmp_path / "far").mkdir()
    (tmp_path / "near").symlink_to(tmp_path / "far")
    table.write_text(
        f"1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:9 / {os.path.realpath(tmp_path / 'far')} rw - "
        "lustre mds:/x rw\n"
    )
    assert file_system_of(tmp_path / "near" / "cache") == "lustre"


def test_without_a_mount_table_no_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS."""
    monkeypatch.setattr(mounts, "_MOUNTINFO", tmp_path / "none")
    assert file_system_of("/") is None
    assert not is_network(None)
    refuse_network(tmp_path, is_allowed=False)


@pytest.mark.skipif(
    not Path("/proc/self/mountinfo").exists(), reason="the kernel has no such table here"
)
def test_the_mount_table_of_this_machine_is_read(tmp_path: Path) -> None:
    assert file_system_of("/proc/self") == "proc"
    assert file_system_of(tmp_path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("nfs4", "NFS (nfs4)"), ("gpfs", "GPFS (gpfs)"), ("fuse.sshfs", "fuse.sshfs"), ("9p", "9p")],
)
def test_types_have_their_common_name_beside_the_kernels(kind: str, words: str) -> None:
    assert display_name(kind) == words


@pytest.mark.parametrize(
    "path", ["/home/me/zarrcache", "/lustre/project/zc", "/gpfs/zc", "/mnt/beegfs/zc"]
)
@pytest.mark.usefixtures("table")
def test_refusal_names_directory_type_and_a_local_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """The scratch directory of the job first; a variable that names a network file system is not
    offered.
    """
    monkeypatch.setenv("SLURM_TMPDIR", "/gpfs/nowhere")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        refuse_network(Path(path), is_allowed=False)
    kind = file_system_of(path)
    assert kind is not None
    assert f"cache.dir {path} is on {display_name(kind)}, a network file system" in str(
        caught.value
    )
    assert "for example dir: ${TMPDIR}/zarrcache" in str(caught.value)
    assert "cache.allow_network_fs: true" in str(caught.value)
    refuse_network(Path(path), is_allowed=True)
    refuse_network(Path("/tmp/zarrcache"), is_allowed=True)
